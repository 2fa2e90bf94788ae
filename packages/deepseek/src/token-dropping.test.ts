import { Random, scope, setDefaultBackend } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { expect, test } from 'vitest'
import { DeepSeek, type DeepSeekConfigInput, type DeepSeekOptions, presets } from './index.ts'

setDefaultBackend(referenceBackend())

const config: DeepSeekConfigInput = {
  ...presets.tiny,
  vocab_size: 40,
  hidden_size: 16,
  intermediate_size: 16,
  moe_intermediate_size: 8,
  num_hidden_layers: 2,
  num_attention_heads: 2,
  n_routed_experts: 8,
  num_experts_per_tok: 2,
  q_lora_rank: 8,
  kv_lora_rank: 8,
  qk_nope_head_dim: 8,
  qk_rope_head_dim: 4,
  v_head_dim: 8,
  initializer_range: 0.3,
}

const random = new Random(3)
const [batch, length] = [16, 6]
const newRows = () => ({
  tokens: Int32Array.from({ length: batch * length }, () => random.integer(40)),
  documents: new Int32Array(batch * length),
  rows: batch,
  length,
})
const batches = [newRows(), newRows()]

/** The losses of the batches, two per step, and the number of choices that the first layer kept in each step. */
async function run(options: DeepSeekOptions['dropping'], steps: number, { start = 0, training = true } = {}) {
  const model = new DeepSeek(config, { seed: 8, dropping: options, objective: { biasSpeed: 0 } })
  model.step = start
  const losses: number[] = []
  const kept: number[] = []
  for (let step = 0; step < steps; step++) {
    for (const rows of batches) losses.push(await scope(() => model.loss(rows, { training }).nll).item())
    kept.push((await model.moeLayers[0].kept?.values())?.[0] ?? Number.NaN)
    await model.afterStep()
  }
  model.dispose()
  return { losses, kept }
}

test("V2's token dropping applies only in training, and not to undropped sequences", async () => {
  const dropping = { devices: 2, capacity_factor: 0.5 }
  const free = await run(undefined, 1)
  expect((await run({ ...dropping, undropped: 1 }, 1)).losses).toEqual(free.losses)
  const none = await run({ ...dropping, undropped: 0 }, 1)
  expect(none.losses[0]).not.toBe(free.losses[0])
  // Two batches of 16 x 4 positions with 2 choices. Each device keeps half of its balanced share.
  expect(none.kept).toEqual([2 * 0.5 * 16 * 4 * 2])
  const evaluated = await run({ ...dropping, undropped: 0 }, 1, { training: false })
  expect(evaluated.losses).toEqual((await run(undefined, 1, { training: false })).losses)
  expect(evaluated.kept).toEqual([Number.NaN])
})

test('undropped sequences depend on seed, step and tokens only, so that a resumed run selects the same', async () => {
  const dropping = { devices: 2, capacity_factor: 0.5, undropped: 0.5 }
  const uninterrupted = await run(dropping, 3)
  expect(new Set(uninterrupted.losses).size).toBe(6)
  expect(await run(dropping, 3)).toEqual(uninterrupted)
  expect((await run(dropping, 1, { start: 2 })).losses).toEqual(uninterrupted.losses.slice(4))
  // By default a tenth is undropped: 32 of 20 batches of 16 sequences, within four standard deviations.
  const model = new DeepSeek(config, { seed: 1, dropping: { devices: 2, capacity_factor: 1e-9 } })
  const [layer] = model.moeLayers
  const counts = [0]
  for (let i = 0; i < 20; i++) {
    scope(() => model.loss(newRows()))
    counts.push((await layer.kept?.values())?.[0] as number)
  }
  // The numbers differ between the batches of one step, because they depend on the tokens.
  expect(new Set(counts.slice(1).map((kept, i) => Math.floor((kept - counts[i]) / 8))).size).toBeGreaterThan(2)
  const kept = counts[20]
  // An undropped sequence keeps its 8 choices. Otherwise a device keeps one, unless undropped sequences use its budget.
  expect(kept / 8).toBeGreaterThan(32 - 4 * Math.sqrt(320 * 0.1 * 0.9))
  expect(kept / 8).toBeLessThan(32 + 4 * Math.sqrt(320 * 0.1 * 0.9) + 5)
  model.dispose()
})
