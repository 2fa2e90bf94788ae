/** @file The same training code and seed give the same losses as kernels-cpu, with routing, balance bias, MTP, clipping and optimizer. */
import { type Backend, fallbacks, type Precision, Random, setDefaultBackend } from '@moe/core'
import { assertClose } from '@moe/core/testing'
import { DeepSeek, type DeepSeekConfigInput, presets, type Recompute } from '@moe/deepseek'
import { createBackend as createCpuBackend } from '@moe/kernels-cpu'
import { TokenDataset, train } from '@moe/trainer'
import { describe, expect, test } from 'vitest'
import { denseVariants, productVariants, testBackend, unavailable, wgmmaVariants } from './test-backend.ts'

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

/** Returns texts of tokens that mostly follow from the previous one, so that there is something to learn. */
function data(size = 2000): TokenDataset {
  const random = new Random(3)
  let token = 1
  const tokens = Int32Array.from({ length: 2000 }, () => {
    token = random.next() < 0.8 ? (token * 7 + 3) % 90 : random.integer(90)
    return 2 + token
  })
  return TokenDataset.fromTokens(Array.from({ length: 2000 / size }, (_, i) => tokens.slice(i * size, (i + 1) * size)))
}

async function losses(
  backend: Backend,
  precision: Precision,
  {
    recompute,
    ...options
  }: { steps?: number; accumulate?: number; record?: boolean; isolate?: boolean; recompute?: Recompute } = {},
): Promise<number[]> {
  setDefaultBackend(backend)
  const model = new DeepSeek(config, { seed: 1, objective: { biasSpeed: 0.01 }, recompute })
  const found: number[] = []
  await train(model, {
    data: { training: data(options.isolate ? 10 : 2000) },
    steps: 20,
    ...options,
    batchSize: 2,
    sequenceLength: 24,
    lr: 5e-3,
    precision,
    progress: false,
    handleSignals: false,
    onEvent: event => {
      if (event.type === 'step') found.push(event.loss)
    },
  })
  model.dispose()
  return found
}

describe.skipIf(unavailable)('the losses of twenty steps are those of kernels-cpu', () => {
  const inFp8 = wgmmaVariants.map(wgmma => ({
    precision: 'fp8' as const,
    by: wgmma ? 'wgmma' : 'mma',
    options: { wgmma },
  }))
  test.each([...denseVariants, ...inFp8])(
    'in $precision, $by',
    async ({ precision, options }) => {
      // f32 rounding of 20 steps: a relative error of at most 2e-5 per step, growing with the steps. In bf16, and where fp8 uses bf16, the CPU may
      // multiply in f32: operands differ by 2^-9, and so may choices between nearly tied experts.
      const relative = precision === 'f32' ? 5e-4 : 2e-2
      const expected = await losses(await createCpuBackend(), precision)
      expect(expected).toHaveLength(20)
      expect(expected[19]).toBeLessThan(expected[0] - 0.2)
      const backend = await testBackend({ guarded: false, ...options })
      assertClose('losses', await losses(backend, precision), expected, { relative, absolute: 0 })
      backend.dispose()
      // The emulator is slow, hence the time limit.
    },
    180_000,
  )
})

test.skipIf(unavailable)(
  'a recorded step, with one micro-batch or several, is bitwise identical to separate ops, with a few launches',
  async () => {
    for (const accumulate of [1, 2]) {
      const runs: number[][] = []
      const launches: number[] = []
      for (const record of [false, true]) {
        const backend = await testBackend({ guarded: false })
        let captures = 0
        const counted: typeof backend = {
          ...backend,
          capture(fn, options) {
            captures++
            return backend.capture(fn, options)
          },
        }
        runs.push(await losses(counted, 'bf16', { steps: 5, accumulate, record }))
        launches.push(backend.stats().launches)
        expect(captures).toBe(record ? 3 : 0)
        backend.dispose()
      }
      expect(runs[1]).toEqual(runs[0])
      // Of five steps, one runs op by op and one is recorded.
      expect(launches[1]).toBeLessThan(0.5 * launches[0])
    }
  },
  180_000,
)

test.skipIf(unavailable)(
  'recomputation changes no bit of the losses, recorded or not, and recomputing whole layers saves memory',
  async () => {
    const runs: number[][] = []
    const peaks: number[] = []
    for (const recompute of [undefined, 'selective', 'layers'] as const) {
      for (const record of [false, true]) {
        const backend = await testBackend({ guarded: false })
        runs.push(await losses(backend, 'bf16', { steps: 4, record, recompute }))
        if (!record) peaks.push(backend.stats().peakBytes)
        backend.dispose()
      }
    }
    for (const run of runs) expect(run).toEqual(runs[0])
    expect(peaks[2]).toBeLessThan(peaks[0])
  },
  180_000,
)

test.skipIf(unavailable).each(productVariants)(
  'packed texts give the losses of kernels-cpu, recorded or not, in $precision, wgmma $wgmma',
  async ({ precision, wgmma }) => {
    const options = { steps: 6, isolate: true }
    const runs: number[][] = []
    for (const record of [false, true]) {
      const backend = await testBackend({ guarded: false, wgmma })
      runs.push(await losses(backend, precision, { ...options, record }))
      backend.dispose()
    }
    expect(runs[1]).toEqual(runs[0])
    const relative = precision === 'f32' ? 5e-4 : 2e-2
    assertClose('losses', runs[0], await losses(await createCpuBackend(), precision, options), {
      relative,
      absolute: 0,
    })
    const declined = fallbacks().filter(({ backend, op }) => backend === 'kernels-cuda' && /attention/i.test(op))
    expect(declined).toEqual([])
  },
  180_000,
)
