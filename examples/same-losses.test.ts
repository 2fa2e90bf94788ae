/** @file The same training code and seed give the same losses on every backend, including routing, balance bias and optimizer. */
import { type Backend, Random, setDefaultBackend } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose } from '@moe/core/testing'
import { DeepSeek, type DeepSeekConfigInput, presets } from '@moe/deepseek'
import { TokenDataset, train } from '@moe/trainer'
import { expect, test } from 'vitest'

const config: DeepSeekConfigInput = {
  ...presets.tiny,
  vocab_size: 96,
  hidden_size: 32,
  intermediate_size: 64,
  moe_intermediate_size: 16,
  num_hidden_layers: 2,
  num_attention_heads: 2,
  n_routed_experts: 8,
  num_experts_per_tok: 2,
  q_lora_rank: 16,
  kv_lora_rank: 16,
  qk_nope_head_dim: 8,
  qk_rope_head_dim: 8,
  v_head_dim: 8,
  initializer_range: 0.1,
}

/** Sequences in which a token mostly determines the next one, so that there is something to learn. */
function data(): TokenDataset {
  const random = new Random(3)
  const documents = Array.from({ length: 6 }, () => {
    let token = random.integer(90)
    return Int32Array.from({ length: 400 }, () => {
      token = random.next() < 0.8 ? (token * 7 + 3) % 90 : random.integer(90)
      return 2 + token
    })
  })
  return TokenDataset.fromTokens(documents)
}

async function losses(backend: Backend): Promise<number[]> {
  setDefaultBackend(backend)
  const model = new DeepSeek(config, { seed: 1, objective: { biasSpeed: 0.01 } })
  const found: number[] = []
  await train(model, {
    data: { training: data() },
    steps: 20,
    batchSize: 4,
    sequenceLength: 32,
    lr: 5e-3,
    progress: false,
    handleSignals: false,
    onEvent: event => {
      if (event.type === 'step') found.push(event.loss)
    },
  })
  model.dispose()
  return found
}

const expected = await losses(referenceBackend())

test('the reference learns', () => {
  expect(expected).toHaveLength(20)
  expect(expected[19]).toBeLessThan(expected[0] - 0.3)
})

const backends = {
  'kernels-cpu': async () => (await import('@moe/kernels-cpu')).createBackend(),
  'backend-tfjs on wasm': async () => (await import('@moe/backend-tfjs')).createBackend(),
}

for (const [name, make] of Object.entries(backends)) {
  test(`${name} has the losses of the f64 reference for 20 steps`, async () => {
    // f32 rounding of 20 steps: a relative 2e-5 per step at most, growing with the steps.
    assertClose('losses', await losses(await make()), expected, { relative: 5e-4, absolute: 0 })
  })
}
