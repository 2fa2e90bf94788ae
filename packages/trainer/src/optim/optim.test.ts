import { readFile } from 'node:fs/promises'
import { fileURLToPath } from 'node:url'
import { readSafetensors } from '@moe/checkpoint'
import {
  decodeHost,
  disposeModule,
  encodeHost,
  fromBf16,
  fromHost,
  full,
  type NamedParameter,
  Parameter,
  Random,
  type StateSource,
  setDefaultBackend,
  tensor,
  toBf16,
  zeros,
} from '@moe/core'
import { readF64, referenceBackend } from '@moe/core/reference'
import fc from 'fast-check'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import type { TrainOptions } from '../options.ts'
import { BigramModel } from '../test-model.ts'
import { train } from '../train.ts'
import { AdamW, decaysMatrices } from './adamw.ts'
import { clipScale, gradientNorm } from './clip.ts'
import { Muon } from './muon.ts'
import type { Optimizer } from './optimizer.ts'
import {
  piecewise,
  type Schedule,
  type ScheduleSegment,
  warmupConstant,
  warmupCosine,
  warmupStableDecay,
} from './schedule.ts'

const backend = referenceBackend()
beforeAll(() => setDefaultBackend(backend))
afterAll(() => expect(backend.stats().handles).toBe(0))

const fixture = (name: string) => fileURLToPath(new URL(`../../../core/fixtures/${name}`, import.meta.url))

function parameterOf(values: ArrayLike<number>, grad: ArrayLike<number>, shape = [values.length]): Parameter {
  const parameter = new Parameter(tensor(Float32Array.from(values), shape))
  parameter.grad = tensor(Float32Array.from(grad), shape)
  return parameter
}

test('optimizers reject anything but named parameters, and steps without a learning rate', async () => {
  const parameter = parameterOf([1, 2], [1, 1])
  for (const Kind of [AdamW, Muon]) {
    for (const invalid of [undefined, { weight: parameter }, [parameter]] as unknown as NamedParameter[][])
      expect(() => new Kind(invalid)).toThrow(/not an array of \{ name, parameter \}; pass namedParameters\(model\)/)
    const optimizer = new Kind([{ name: 'weight', parameter }])
    using one = full([], 1)
    expect(() => optimizer.step(undefined as unknown as number, one)).toThrow(
      /rate is undefined; pass a number to every step/,
    )
    expect(await parameter.values()).toEqual(Float32Array.of(1, 2))
    optimizer.dispose()
  }
  parameter.dispose()
})

test('an error for state of other parameters lists a limited number of them', async () => {
  const parameters = Array.from({ length: 25 }, (_, i) => ({
    name: `layers.${i}.weight`,
    parameter: new Parameter(full([2, 2], i)),
  }))
  const source = { keys: () => ['other'], info: () => ({ shape: [1] }), read: async () => new Float32Array(1) }
  for (const Kind of [AdamW, Muon]) {
    const optimizer = new Kind(parameters)
    const error = await optimizer.load(source as unknown as StateSource, 3).catch(error => error)
    expect(error).toMatchObject({ code: 'E_STATE_DICT' })
    const all: string[] = error.details.problems
    expect(all.length).toBeGreaterThanOrEqual(25)
    expect(error.message.split('\n')).toEqual([
      expect.stringMatching(/: the stored optimizer state does not fit the model:$/),
      ...all.slice(0, 20).map(line => `  ${line}`),
      `  and ${all.length - 20} more (see the error's details)`,
      'resume with the model that the run was started with',
    ])
    optimizer.dispose()
  }
  for (const { parameter } of parameters) parameter.dispose()
})

describe('AdamW', () => {
  test('gives the results of torch.optim.AdamW over four steps', async () => {
    const { cases } = JSON.parse(await readFile(fixture('ops.json'), 'utf8'))
    const { steps, lr, betas, eps, weightDecay } = cases.adamw
    await using file = await readSafetensors(fixture('ops.safetensors'))
    const read = async (name: string) => (await file.read(`adamw.${name}`)).data as Float32Array
    const [grads, params] = [await read('grads'), await read('params')]
    const parameter = new Parameter(fromHost(await read('param'), [5, 7], 'f32'))
    const optimizer = new AdamW([{ name: 'weight', parameter }], { betas, eps, weightDecay })
    using one = full([], 1)
    for (let step = 0; step < steps; step++) {
      parameter.grad = fromHost(grads.slice(step * 35, (step + 1) * 35), [5, 7], 'f32')
      optimizer.step(lr, one)
      parameter.zeroGrad()
      const expected = params.subarray(step * 35, (step + 1) * 35)
      const actual = await parameter.values()
      for (let i = 0; i < 35; i++) expect(actual[i]).toBeCloseTo(expected[i], 6)
    }
    for (const entry of optimizer.entries()) {
      const expected = await read(entry.name === 'm.weight' ? 'exp_avg' : 'exp_avg_sq')
      const actual = await entry.data()
      for (let i = 0; i < 35; i++)
        expect(Math.abs(actual[i] - expected[i])).toBeLessThan(1e-6 + 1e-5 * Math.abs(expected[i]))
    }
    optimizer.dispose()
    parameter.dispose()
  })

  test('decays matrices, but neither vectors nor embedding tables', async () => {
    const named = ['model.embed_tokens.weight', 'model.norm.weight', 'model.layers.0.mlp.experts.gate_proj'].map(
      (name, i) => ({
        name,
        parameter: parameterOf([1, 1], [0, 0], [[1, 2], [2], [1, 2, 1]][i]),
      }),
    )
    expect(named.map(decaysMatrices)).toEqual([false, false, true])
    const optimizer = new AdamW(named, { weightDecay: 0.5 })
    using one = full([], 1)
    optimizer.step(0.1, one)
    const after = await Promise.all(named.map(async ({ parameter }) => (await parameter.values())[0]))
    expect(after[0]).toBe(1)
    expect(after[1]).toBe(1)
    expect(after[2]).toBeCloseTo(0.95, 6)
    expect(optimizer.settings(named)).toEqual({ betas: [0.9, 0.95], eps: 1e-8, weightDecay: 0.5, decaying: 1 })
    optimizer.dispose()
    const without = new AdamW(named, { weightDecay: 0 })
    expect(without.settings(named)).toMatchObject({ weightDecay: 0, decaying: 0 })
    without.dispose()
    for (const { parameter } of named) parameter.dispose()
  })

  test('has no state for buffers, and does not change parameters without a gradient', async () => {
    const buffer = new Parameter(tensor([1, 2]), { trainable: false })
    const idle = new Parameter(tensor([3]))
    const optimizer = new AdamW([
      { name: 'buffer', parameter: buffer },
      { name: 'idle', parameter: idle },
    ])
    expect(optimizer.entries().map(entry => entry.name)).toEqual(['m.idle', 'v.idle'])
    using one = full([], 1)
    optimizer.step(1, one)
    expect([...(await idle.values())]).toEqual([3])
    optimizer.dispose()
    buffer.dispose()
    idle.dispose()
  })
})

describe('moments in bf16', () => {
  const rounded = (x: number) => fromBf16(toBf16(x))

  test('are those of f32, rounded after each step', async () => {
    const random = new Random(4)
    const parameter = new Parameter(tensor(random.normal(50)))
    const p = Float64Array.from(await parameter.values())
    const [m, v] = [new Float64Array(50), new Float64Array(50)]
    const settings = { betas: [0.9, 0.95], eps: 1e-6, weightDecay: 0.2, decays: () => true } as const
    const optimizer = new AdamW([{ name: 'weight', parameter }], { ...settings, moments: 'bf16' })
    using half = full([], 0.5)
    for (let step = 1; step <= 20; step++) {
      const grad = random.normal(50)
      parameter.grad = tensor(grad)
      optimizer.step(0.01, half)
      parameter.zeroGrad()
      for (let i = 0; i < 50; i++) {
        const g = grad[i] / 2
        const [first, second] = [0.9 * m[i] + 0.1 * g, 0.95 * v[i] + 0.05 * g * g]
        p[i] -= 0.01 * 0.2 * p[i]
        p[i] -= (0.01 * (first / (1 - 0.9 ** step))) / (Math.sqrt(second / (1 - 0.95 ** step)) + 1e-6)
        m[i] = rounded(first)
        v[i] = rounded(second)
      }
    }
    const entries = Object.fromEntries(optimizer.entries().map(entry => [entry.name, entry]))
    for (const [name, expected] of Object.entries({ 'm.weight': m, 'v.weight': v })) {
      expect(entries[name].dtype).toBe('bf16')
      expect(Array.from(await entries[name].data())).toEqual(Array.from(expected, toBf16))
    }
    const after = await parameter.values()
    for (let i = 0; i < 50; i++) expect(after[i]).toBeCloseTo(p[i], 6)
    optimizer.dispose()
    parameter.dispose()
  })

  /** Moments of an element after steps with these gradients. */
  async function momentsAfter(gradients: readonly number[], betas: readonly [number, number]) {
    const parameter = new Parameter(tensor([0]))
    const optimizer = new AdamW([{ name: 'weight', parameter }], { betas, moments: 'bf16' })
    using one = full([], 1)
    for (const gradient of gradients) {
      parameter.grad = tensor([gradient])
      optimizer.step(0, one)
      parameter.zeroGrad()
    }
    const [m, v] = await Promise.all(optimizer.entries().map(async ({ data }) => fromBf16((await data())[0])))
    optimizer.dispose()
    parameter.dispose()
    return { m, v }
  }

  // A moment stops changing if a step changes it by less than half of its last bit: at an error of 2^-8 / (1 - beta).
  test('converge to a constant within the precision of bf16, from above and below', async () => {
    const rates = fc.double({ min: 0.5, max: 1 - 2 ** -6, noNaN: true })
    const sizes = fc.double({ min: -6, max: 6, noNaN: true }).map(power => 2 ** power)
    await fc.assert(
      fc.asyncProperty(sizes, sizes, rates, rates, async (before, size, beta1, beta2) => {
        // At the slowest rate, a step reduces the error by at least 3/4 of 2^-6; rounding loses the rest. After 2300 steps, a moment that
        // starts at 2^24 times its limit comes within e^-10 of it.
        const gradients = [...new Array<number>(100).fill(before), ...new Array<number>(2300).fill(size)]
        const { m, v } = await momentsAfter(gradients, [beta1, beta2])
        const bound = (beta: number) => Math.exp(-10) + 2 ** -8 / (1 - beta)
        expect(Math.abs(m - size) / Math.min(m, size)).toBeLessThanOrEqual(bound(beta1))
        expect(Math.abs(v - size ** 2) / Math.min(v, size ** 2)).toBeLessThanOrEqual(bound(beta2))
      }),
      { numRuns: 20 },
    )
  })

  test('decay to zero at every allowed rate, and rates that are too slow are errors', async () => {
    const exponent = 1 - 2 ** -8
    for (const rate of [0.5, 0.95, exponent]) {
      const { m, v } = await momentsAfter([1, ...new Array<number>(2500).fill(0)], [rate, rate])
      expect(m).toBeLessThan(1e-3 * (1 - rate))
      expect(v).toBeLessThan(1e-3 * (1 - rate))
    }
    const parameter = new Parameter(tensor([0]))
    for (const betas of [
      [0.9, 0.999],
      [0.997, 0.95],
    ] as const)
      expect(() => new AdamW([{ name: 'weight', parameter }], { betas, moments: 'bf16' })).toThrow(
        expect.objectContaining({
          code: 'E_CONFIG',
          message: expect.stringMatching(/would never decay; use a rate of at most 0\.99609375/),
        }),
      )
    expect(() => new Muon([{ name: 'weight', parameter }], { momentum: 0.999, moments: 'bf16' })).toThrow(
      /decay rate of 0\.999/,
    )
    expect(() => new AdamW([{ name: 'weight', parameter }], { moments: 'f16' as 'bf16' })).toThrow(
      "moments is \"f16\", expected 'f32' or 'bf16'",
    )
    parameter.dispose()
  })

  test('are those of f32 on average if gradients are noise', async () => {
    const random = new Random(5)
    const size = 4000
    const runs = (['f32', 'bf16'] as const).map(moments => {
      const parameter = new Parameter(zeros([size]))
      return { parameter, optimizer: new AdamW([{ name: 'weight', parameter }], { moments }) }
    })
    using one = full([], 1)
    for (let step = 0; step < 100; step++) {
      const grad = random.normal(size)
      for (const { parameter, optimizer } of runs) {
        parameter.grad = tensor(grad)
        optimizer.step(1e-3, one)
        parameter.zeroGrad()
      }
    }
    const [exact, rounded] = await Promise.all(
      runs.map(({ optimizer }) =>
        Promise.all(optimizer.entries().map(async ({ dtype, data }) => decodeHost(dtype, await data()))),
      ),
    )
    const mean = (values: ArrayLike<number>) => Array.from(values).reduce((sum, x) => sum + x, 0) / size
    // Rounding to eight bits changes a value by up to 0.4 %. Over 20 steps, errors in one direction would add up to 4 %.
    expect(mean(rounded[1]) / mean(exact[1])).toBeCloseTo(1, 3)
    expect(mean(Array.from(rounded[0], (m, i) => m - exact[0][i]))).toBeCloseTo(0, 4)
    for (const { parameter, optimizer } of runs) {
      optimizer.dispose()
      parameter.dispose()
    }
  })

  test.each([AdamW, Muon])('are rounded when loaded from f32, and loaded exactly from bf16: %o', async Kind => {
    const matrix = new Parameter(tensor([1, 2, 3, 4], [2, 2]))
    const parameters = [
      { name: 'matrix', parameter: matrix },
      { name: 'norm', parameter: parameterOf([1, 2], [0, 0]) },
    ]
    const names = (optimizer: Optimizer) => optimizer.entries().map(({ name }) => name)
    const wide = new Kind(parameters)
    const narrow = new Kind(parameters, { moments: 'bf16' })
    expect(narrow.entries().every(({ dtype }) => dtype === 'bf16')).toBe(true)
    expect(narrow.settings(parameters)).not.toEqual(wide.settings(parameters))
    const numbers = [1.0039, -3.14159, 1e-20, 1.01171875]
    const source = (dtype: 'f32' | 'bf16'): StateSource => ({
      keys: () => names(wide),
      info: name => ({ dtype, shape: name.endsWith('norm') ? [2] : [2, 2] }),
      read: async name => encodeHost(dtype, numbers.slice(0, name.endsWith('norm') ? 2 : 4)),
    })
    for (const dtype of ['f32', 'bf16'] as const) {
      await narrow.load(source(dtype), 3)
      for (const { data } of narrow.entries()) {
        const stored = await data()
        expect(Array.from(stored)).toEqual(numbers.slice(0, stored.length).map(toBf16))
      }
    }
    await wide.load(source('bf16'), 3)
    for (const { data } of wide.entries()) {
      const stored = await data()
      expect(Array.from(stored)).toEqual(numbers.slice(0, stored.length).map(rounded))
    }
    for (const optimizer of [wide, narrow]) optimizer.dispose()
    for (const { parameter } of parameters) parameter.dispose()
  })
})

describe('clipping', () => {
  const gradients = fc.array(fc.array(fc.float({ min: -100, max: 100, noNaN: true }), { minLength: 1, maxLength: 6 }), {
    minLength: 1,
    maxLength: 4,
  })

  test('equals a computation in float64', () => {
    fc.assert(
      fc.property(
        gradients,
        fc.double({ min: 0.1, max: 50, noNaN: true }),
        fc.double({ min: 0.1, max: 2, noNaN: true }),
        (grads, limit, factor) => {
          const parameters = grads.map(grad => parameterOf(grad, grad))
          using norm = gradientNorm(parameters)
          using scale = clipScale(norm, limit, factor)
          const plain = Math.sqrt(grads.flat().reduce((sum, g) => sum + g * g, 0))
          expect(readF64(norm)[0]).toBeCloseTo(plain, 9)
          expect(readF64(scale)[0]).toBeCloseTo(factor * Math.min(1, limit / (plain * factor + 1e-6)), 6)
          for (const parameter of parameters) parameter.dispose()
        },
      ),
    )
  })

  test('gives the norm of torch.nn.utils.clip_grad_norm_', async () => {
    const { cases } = JSON.parse(await readFile(fixture('ops.json'), 'utf8'))
    await using file = await readSafetensors(fixture('ops.safetensors'))
    for (const name of ['clip', 'clip_inactive']) {
      const keys = file.keys().filter(key => key.startsWith(`${name}.grad`) && !key.includes('clipped'))
      expect(keys.length).toBeGreaterThan(0)
      const parameters: Parameter[] = []
      for (const key of keys) {
        const { data } = await file.read(key)
        parameters.push(parameterOf(data as Float32Array, data as Float32Array))
      }
      using norm = gradientNorm(parameters)
      expect(await norm.item()).toBeCloseTo(cases[name].norm, 5)
      for (const parameter of parameters) parameter.dispose()
    }
  })

  test('only scales by the factor without a limit', async () => {
    using norm = full([], 12)
    using scale = clipScale(norm, Number.POSITIVE_INFINITY, 0.25)
    expect(await scale.item()).toBe(0.25)
  })
})

describe('piecewise', () => {
  test('follows the segments, reaches the end of each, and stays at the end of the last', () => {
    const schedule = piecewise([
      { steps: 4, from: 0, to: 1 },
      { steps: 2, at: 1 },
      { steps: 2, to: 0.5, shape: 'cosine' },
      { steps: 1, at: 0.25 },
      { steps: 2, to: 0.05 },
    ])
    const values = Array.from({ length: 13 }, (_, step) => schedule(step))
    expect(values).toEqual(
      [0.25, 0.5, 0.75, 1, 1, 1, 0.75, 0.5, 0.25, 0.15, 0.05, 0.05, 0.05].map(value => expect.closeTo(value, 12)),
    )
  })

  test('equals warmupCosine with the same segments', () => {
    const [cosine, segments] = [
      warmupCosine({ steps: 50, warmup: 7, floor: 0.2 }),
      piecewise([
        { steps: 7, from: 0, to: 1 },
        { steps: 43, to: 0.2, shape: 'cosine' },
      ]),
    ]
    for (let step = 0; step < 60; step++) expect(segments(step)).toBeCloseTo(cosine(step), 12)
  })

  test("expresses DeepSeek-V3's learning rate, with segments in tokens", () => {
    const trillions: ScheduleSegment[] = [
      { steps: 10, at: 2.2e-4 },
      { steps: 4.3, to: 2.2e-5, shape: 'cosine' },
      { steps: 0.333, at: 2.2e-5 },
      { steps: 0.167, at: 7.3e-6 },
    ]
    const steps = 14_800
    const schedule = piecewise(trillions, { steps })
    expect([9_999, 14_299, 14_632, 14_633, steps - 1].map(schedule)).toEqual([2.2e-4, 2.2e-5, 2.2e-5, 7.3e-6, 7.3e-6])
    // In the middle of the decay.
    expect(schedule(12_149)).toBeCloseTo((2.2e-4 + 2.2e-5) / 2, 10)
    // A short run has each segment in proportion, in whole steps.
    const short = piecewise(trillions, { steps: 15 })
    expect(Array.from({ length: 15 }, (_, step) => short(step)).filter(rate => rate === 2.2e-4)).toHaveLength(10)
  })

  test('stays between the ends of each segment, for any lengths', () => {
    const segment = fc.record({
      steps: fc.integer({ min: 0, max: 9 }),
      from: fc.double({ min: 0, max: 1, noNaN: true }),
      to: fc.double({ min: 0, max: 1, noNaN: true }),
      shape: fc.constantFrom('linear' as const, 'cosine' as const),
    })
    fc.assert(
      fc.property(fc.array(segment, { minLength: 1, maxLength: 5 }), segments => {
        fc.pre(segments.some(({ steps }) => steps > 0))
        const schedule = piecewise(segments)
        let step = 0
        for (const { steps, from, to } of segments)
          for (let i = 0; i < steps; i++) {
            const value = schedule(step++)
            expect(value).toBeGreaterThanOrEqual(Math.min(from, to) - 1e-12)
            expect(value).toBeLessThanOrEqual(Math.max(from, to) + 1e-12)
            if (i === steps - 1) expect(value).toBe(to)
          }
      }),
    )
  })

  test('rejects invalid segments by name', () => {
    const expectError = (segments: unknown, options = {}) =>
      expect(() => piecewise(segments as ScheduleSegment[], options))
    expectError([]).toThrow(/the segments are/)
    expectError([{ steps: 1, to: 1 }]).toThrow(/from of segment 0 is missing/)
    expectError([{ steps: 1.5, at: 1 }]).toThrow(/steps of segment 0 is 1.5/)
    expectError([{ steps: 1, at: Number.NaN }]).toThrow(/at of segment 0 is NaN/)
    expectError([{ steps: 1, from: 0, to: 1, shape: 'sine' }]).toThrow(/shape of segment 0 is .?sine/)
    expectError([{ steps: 0, at: 1 }]).toThrow(/all segments are empty/)
    expectError([{ steps: 1, at: 1 }], { steps: 0.5 }).toThrow(/steps is 0.5/)
    expectError([{ steps: 1, at: 1, until: 3 }]).toThrow(/unknown option until/)
  })
})

describe('schedules', () => {
  test('warm up to 1, then decay to the floor along half a cosine', () => {
    const schedule = warmupCosine({ steps: 110, warmup: 10, floor: 0.1 })
    expect(schedule(0)).toBeCloseTo(0.1)
    expect(schedule(9)).toBe(1)
    expect(schedule(59)).toBeCloseTo(0.55)
    expect(schedule(109)).toBeCloseTo(0.1)
    expect(schedule(500)).toBeCloseTo(0.1)
  })

  test('stay at 1 between warm-up and decay', () => {
    const schedule = warmupStableDecay({ steps: 100, warmup: 10, decay: 20 })
    expect([schedule(9), schedule(50), schedule(79)]).toEqual([1, 1, 1])
    expect(schedule(84)).toBeCloseTo(1 - Math.sqrt(5 / 20))
    expect(schedule(99)).toBeCloseTo(0)
  })

  test('warm up for a tenth of the run, at most 100 steps, and decay for a fifth, unless they are told otherwise', () => {
    for (const [steps, warmup, decay] of [
      [50, 5, 10],
      [2000, 100, 400],
    ]) {
      const all = (schedule: Schedule) => Array.from({ length: steps }, (_, step) => schedule(step))
      expect(all(warmupCosine({ steps }))).toEqual(all(warmupCosine({ steps, warmup, floor: 0.1 })))
      expect(all(warmupStableDecay({ steps }))).toEqual(all(warmupStableDecay({ steps, warmup, decay, floor: 0 })))
    }
  })

  test('stay between 0 and 1, and never rise after the warm-up', () => {
    const sizes = fc
      .tuple(fc.integer({ min: 1, max: 300 }), fc.nat(), fc.nat(), fc.double({ min: 0, max: 1, noNaN: true }))
      .map(([steps, a, b, floor]) => ({ steps, warmup: a % (steps + 1), decay: b % (steps + 1), floor }))
      .filter(({ steps, warmup, decay }) => warmup + decay <= steps)
    fc.assert(
      fc.property(sizes, options => {
        const { decay, ...rest } = options
        for (const schedule of [
          warmupCosine(rest),
          warmupStableDecay(options),
          warmupConstant({ warmup: rest.warmup }),
        ]) {
          for (let step = 0; step < options.steps + 3; step++) {
            const value = schedule(step)
            expect(value).toBeGreaterThanOrEqual(0)
            expect(value).toBeLessThanOrEqual(1)
            if (step > options.warmup) expect(value).toBeLessThanOrEqual(schedule(step - 1))
          }
        }
      }),
    )
  })

  test('report all invalid options at once', () => {
    expect(() => warmupCosine({ steps: 10, warmup: 20, floor: 2 })).toThrow(/floor is 2, warmup of 20/)
    expect(() => warmupStableDecay({ steps: 10, warmup: 6, decay: 6 })).toThrow(
      expect.objectContaining({ code: 'E_CONFIG' }),
    )
    expect(() => warmupConstant({ warmup: 0.5 })).toThrow(/warmup is 0.5/)
  })
})

test('unknown options are rejected, also by train', async () => {
  const parameter = parameterOf([1, 2], [1, 1])
  for (const Kind of [AdamW, Muon]) {
    const make = (options: unknown) => () => new Kind([{ name: 'weight', parameter }], options as object)
    expect(make({ weight_decay: 1 })).toThrow(`${Kind.name}: unknown option weight_decay; did you mean weightDecay?`)
    expect(make(null)).toThrow(`${Kind.name}: expected an options object, got null`)
  }
  parameter.dispose()
  expect(() => warmupCosine({ steps: 9, warmpu: 1 } as never)).toThrow('did you mean warmup?')
  expect(() => warmupConstant(undefined as never)).toThrow(
    'warmupConstant: expected an options object, got undefined; pass an object: { warmup }',
  )
  const model = new BigramModel()
  const training = (options: object | null) =>
    train(model, options as TrainOptions).catch((error: Error) => error.message)
  expect(await training({ learnigRate: 1e-3 })).toMatch(
    /^train: unknown option learnigRate; known options are .*batchSize.*lr/,
  )
  expect(await training({ batch_size: 1 })).toMatch(/did you mean batchSize/)
  expect(await training(null)).toMatch(
    /^train: expected an options object, got null; pass an object: \{.*data, tokenizer/,
  )
  disposeModule(model)
})
