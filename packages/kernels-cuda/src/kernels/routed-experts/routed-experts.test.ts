import {
  backward,
  dispatchPlan,
  fallbacks,
  Parameter,
  Random,
  routedExperts,
  scope,
  type Tensor,
  tensor,
  withPrecision,
} from '@moe/core'
import { normalizedError } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import type { CudaBackend } from '../../backend.ts'
import { exact } from '../../test-against-cpu.ts'
import {
  hopperFp8Bits,
  inexact,
  keepFp8Bits,
  reverseOrder,
  testBackend,
  unavailable,
  wgmmaVariants,
} from '../../test-backend.ts'
import { expectedOf, fp8ResultsOf, type Numbers, type Results, type Sizes } from './expected.ts'

type Case = Sizes & { readonly name: string; readonly among?: readonly number[] }

const cases: readonly Case[] = [
  { name: 'empty experts, first, last and between', N: 70, K: 3, E: 6, D: 40, I: 24, among: [1, 2, 4] },
  { name: 'odd sizes', N: 50, K: 2, E: 3, D: 33, I: 17 },
  { name: 'even sizes that are not multiples of 8', N: 90, K: 2, E: 2, D: 30, I: 22 },
  { name: 'more experts than a warp has lanes', N: 130, K: 4, E: 40, D: 24, I: 40 },
  { name: 'several tiles of features', N: 150, K: 1, E: 2, D: 300, I: 9 },
  { name: 'several tiles of inner features', N: 70, K: 2, E: 1, D: 12, I: 290 },
  { name: 'rows that fill tiles', N: 256, K: 1, E: 2, D: 16, I: 16 },
  { name: 'large tiles of gate and up', N: 250, K: 1, E: 1, D: 20, I: 102 },
  { name: 'full tiles and a partial one', N: 130, K: 1, E: 1, D: 504, I: 120 },
  { name: 'few rows of odd sizes', N: 3, K: 2, E: 4, D: 5, I: 7 },
  { name: 'slots after the last expert', N: 80, K: 2, E: 3, D: 24, I: 16, among: [0, 2, 3] },
  { name: 'one of each', N: 1, K: 1, E: 1, D: 1, I: 1 },
]

/** Precisions in which activations between the products are stored in fewer bits, with and without wgmma. */
const variants = wgmmaVariants.flatMap(wgmma => (['bf16', 'fp8'] as const).map(precision => ({ precision, wgmma })))
type Variant = (typeof variants)[number]

function chosenOf({ N, K, E, among = Array.from({ length: E }, (_, e) => e) }: Case): Int32Array {
  const random = new Random(5)
  return Int32Array.from({ length: N * K }, () => among[random.integer(among.length)])
}

/** Normally distributed numbers that bf16 represents exactly; weights are scaled so that results have a magnitude of 1. */
function normalNumbers(sizes: Case): Numbers {
  const { N, K, E, D, I } = sizes
  const random = new Random(N)
  const of = (...shape: number[]) => exact(random, ...shape).data as Float32Array
  const scaled = (data: Float32Array, size: number) => data.map(value => value * 2 ** -Math.round(Math.log2(size) / 2))
  return {
    ...sizes,
    x: of(N, D),
    gate: scaled(of(E, I, D), D),
    up: scaled(of(E, I, D), D),
    down: scaled(of(E, D, I), I),
    weights: of(N, K),
    chosen: chosenOf(sizes),
    dout: of(N, D),
  }
}

/** Returns numbers with more bits than bf16, to detect operands that are rounded to bf16 before fp8. */
function finer(numbers: Numbers): Numbers {
  const { x, gate, up, down, dout } = numbers
  const [a, b, c, d, e] = [x, gate, up, down, dout].map(data => data.map(value => value * (1 + 2 ** -9 / 3)))
  return { ...numbers, x: a, gate: b, up: c, down: d, dout: e }
}

/**
 * Returns powers of two, so that no result is rounded: tokens and gradients have one nonzero element each, down one per row; gate's results are so large that
 * silu is the identity.
 */
function exactNumbers(sizes: Case): Numbers {
  const { N, K, E, D, I } = sizes
  const random = new Random(N + 1)
  const any = (...values: number[]) => values[random.integer(values.length)]
  const fill = (size: number, value: () => number) => Float32Array.from({ length: size }, value)
  const oneOf = (rows: number, columns: number, at: (row: number) => number) => {
    const data = new Float32Array(rows * columns)
    for (let r = 0; r < rows; r++) data[r * columns + (at(r) % columns)] = any(1, 2)
    return data
  }
  return {
    ...sizes,
    x: oneOf(N, D, n => n * 7 + 3),
    gate: fill(E * I * D, () => any(32, 64)),
    up: fill(E * I * D, () => any(-2, -1, 1, 2)),
    down: oneOf(E * D, I, r => r * 5 + Math.floor(r / D)).map(value => value * any(-1, 1)),
    weights: fill(N * K, () => any(0.5, 1, 2)),
    chosen: chosenOf(sizes),
    dout: oneOf(N, D, n => n * 3 + 1),
  }
}

/** The backend and the precision of products. */
interface On {
  readonly backend: CudaBackend
  readonly precision: Variant['precision']
}

/** Creates parameters on a backend. Frozen ones get no gradient. */
function parametersOf(numbers: Numbers, backend: CudaBackend, frozen: readonly string[] = []) {
  const { N, K, E, D, I } = numbers
  const shapes = { x: [N, D], gate: [E, I, D], up: [E, I, D], down: [E, D, I], weights: [N, K] }
  const made = Object.entries(shapes).map(([name, shape]) => {
    const data = tensor(numbers[name as keyof typeof shapes], shape, { backend })
    return [name, new Parameter(data, { trainable: !frozen.includes(name) })] as const
  })
  return Object.fromEntries(made) as Record<keyof typeof shapes, Parameter>
}

function forward(
  numbers: Numbers,
  { backend, precision }: On,
  { x, weights, ...experts }: ReturnType<typeof parametersOf>,
): Tensor {
  const indices = tensor(numbers.chosen, [numbers.N, numbers.K], { backend })
  // Indices beyond the experts belong to no expert.
  const { offsets, ...plan } = dispatchPlan(indices, numbers.E + 1)
  const own = { ...plan, offsets: offsets.narrow(0, 0, numbers.E + 1) }
  return withPrecision(precision, () => routedExperts(x, experts, weights, own))
}

type Found = Readonly<Record<string, Float32Array | null>>

/** Returns the results on this backend. Checks that the device did not decline the op. */
async function resultsOf(numbers: Numbers, on: On, frozen: readonly string[] = []): Promise<Found> {
  const { backend } = on
  const declined = JSON.stringify(fallbacks())
  const parameters = parametersOf(numbers, backend, frozen)
  const out = scope(() => {
    const result = forward(numbers, on, parameters)
    backward(result, { gradient: tensor(numbers.dout, result.shape, { backend }) })
    return result.detach()
  })
  expect(JSON.stringify(fallbacks())).toBe(declined)
  const found: Record<string, Float32Array | null> = { out: (await out.values()) as Float32Array }
  for (const [name, parameter] of Object.entries(parameters)) {
    found[`d${name}`] = parameter.grad === null ? null : ((await parameter.grad.values()) as Float32Array)
    parameter.zeroGrad()
    parameter.dispose()
  }
  out.dispose()
  expect(backend.stats().handles).toBe(0)
  return found
}

async function onBackend<T>({ wgmma, precision }: Variant, fn: (on: On) => Promise<T>): Promise<T> {
  const backend = await testBackend({ wgmma })
  try {
    return await fn({ backend, precision })
  } finally {
    backend.dispose()
  }
}

/** Returns the function with its results remembered. All variants have the same numbers and expected results. */
function once<A extends object, R>(fn: (argument: A) => R): (argument: A) => R {
  const results = new Map<A, R>()
  return argument => {
    const result = results.get(argument) ?? fn(argument)
    results.set(argument, result)
    return result
  }
}
const exactNumbersOf = once(exactNumbers)
const normalNumbersOf = once(normalNumbers)
const finerNumbersOf = once((sizes: Case) => finer(normalNumbers(sizes)))
const expectedOnce = once(expectedOf)
const fp8ResultsOnce = once((numbers: Numbers) => fp8ResultsOf(numbers, 'bf16'))

/** Checks results in bf16. */
function expectWithinBounds(found: Found, numbers: Numbers): void {
  for (const [name, { values, bounds }] of Object.entries(expectedOnce(numbers)) as Array<[string, Results['out']]>) {
    const actual = found[name] as Float32Array
    const largest = values.reduce((most, value) => Math.max(most, Math.abs(value)), 0)
    // Margin for second-order errors and f32 sums.
    const beyond = actual.findIndex((value, i) => !(Math.abs(value - values[i]) <= bounds[i] * 1.05 + largest * 1e-5))
    expect(beyond, `${name}[${beyond}] is ${actual[beyond]}, not ${values[beyond]} +- ${bounds[beyond]}`).toBe(-1)
    // About six roundings, each with a variance of at most a sixth of 2^-16.
    if (numbers.N > 10) expect(normalizedError(actual, values), name).toBeLessThan(2 ** -15)
  }
}

/** Checks the mean square errors of results in fp8. */
function expectRounded(found: Found, expected: ReturnType<typeof fp8ResultsOf>, maxError: number): void {
  for (const [name, values] of Object.entries(expected)) {
    expect(normalizedError(found[name] as Float32Array, values), name).toBeLessThan(maxError)
  }
}

/**
 * Mean square error of accumulation with 14 bits on Hopper's tensor cores. Each of 4 times 33 terms loses up to 2^-13 of about the magnitude of the sum, which
 * is 2^-11 in total, and so moves at most one in 2^8 to the next fp8 value, 2^-3 away.
 */
const fp8SumError = 2 ** -14

describe.skipIf(unavailable).each(variants)('routedExperts, $precision, wgmma $wgmma', variant => {
  const { precision, wgmma } = variant

  test.each(cases)('$name: results of powers of two are exact', async sizes => {
    const numbers = exactNumbersOf(sizes)
    const found = await onBackend(variant, on => resultsOf(numbers, on))
    for (const [name, { values }] of Object.entries(expectedOnce(numbers))) {
      // All results are multiples of a half; silu differs from the identity by 1e-12.
      const wrong = found[name]?.findIndex((value, i) => value !== Math.round(values[i] * 2) / 2) as number
      expect(wrong, `${name}[${wrong}] is ${found[name]?.[wrong]}, not ${values[wrong]}`).toBe(-1)
    }
  })

  test.each(cases)('$name: results of normally distributed numbers are within rounding errors', async sizes => {
    const numbers = precision === 'fp8' ? finerNumbersOf(sizes) : normalNumbersOf(sizes)
    const found = await onBackend(variant, on => resultsOf(numbers, on))
    // Differences come from f32 sums on another side of a rounding step than f64 sums. An error of 2^-21 in SwiGLU moves one in 2^12 to the next bf16 value, and few of these to the next fp8 value.
    if (precision === 'fp8') expectRounded(found, fp8ResultsOnce(numbers), inexact ? fp8SumError : 2 ** -26)
    else expectWithinBounds(found, numbers)
  })

  test.skipIf(precision !== 'fp8' || !wgmma).each(cases)(
    '$name: results of normally distributed numbers are close with 14-bit accumulation',
    async sizes => {
      const numbers = finerNumbersOf(sizes)
      keepFp8Bits(hopperFp8Bits)
      try {
        const found = await onBackend(variant, on => resultsOf(numbers, on))
        expectRounded(found, fp8ResultsOnce(numbers), fp8SumError)
      } finally {
        keepFp8Bits(0)
      }
    },
  )

  test('results are bitwise identical in every run, in any order of blocks', async () => {
    const numbers = normalNumbers(cases[0])
    const first = await onBackend(variant, on => resultsOf(numbers, on))
    const second = await onBackend(variant, on => {
      reverseOrder(true)
      return resultsOf(numbers, on)
    })
    expect(second).toEqual(first)
  })

  test('freezing parameters changes no other gradient and saves launches', async () => {
    const numbers = normalNumbers(cases[0])
    const names = ['x', 'gate', 'up', 'down', 'weights']
    await onBackend(variant, async on => {
      const { backend } = on
      const launched = async (frozen: readonly string[]) => {
        const before = backend.stats().launches
        return { found: await resultsOf(numbers, on, frozen), launches: backend.stats().launches - before }
      }
      const all = await launched([])
      const sets = [...names.map(name => [name]), ...names.map(name => names.filter(other => other !== name))]
      for (const frozen of [...sets, ['gate', 'up', 'down']]) {
        const { found, launches } = await launched(frozen)
        for (const name of names) {
          expect(found[`d${name}`], `${name} without ${frozen}`).toEqual(
            frozen.includes(name) ? null : all.found[`d${name}`],
          )
        }
        // The gradient of the routing weights is computed along with that of SwiGLU.
        if (frozen.join() !== 'weights') expect(launches, `without ${frozen}`).toBeLessThan(all.launches)
      }
    })
  })

  test('NaN and infinity affect only their tokens and experts', async () => {
    const sizes = { ...cases[0], N: 60, K: 1 }
    const numbers = { ...normalNumbers(sizes), chosen: Int32Array.from({ length: 60 }, (_, n) => [1, 2, 4][n % 3]) }
    numbers.x[4 * sizes.D] = Number.NaN
    numbers.dout[7 * sizes.D + 1] = Number.POSITIVE_INFINITY
    const found = await onBackend(variant, on => resultsOf(numbers, on))
    const finite = (data: Float32Array | null, size: number) =>
      Array.from({ length: (data as Float32Array).length / size }, (_, i) => i).filter(i =>
        data?.subarray(i * size, (i + 1) * size).every(Number.isFinite),
      )
    const others = (without: number[], count: number) =>
      Array.from({ length: count }, (_, i) => i).filter(i => !without.includes(i))
    const { D, I, E } = sizes
    expect(finite(found.out, D)).toEqual(others([4], 60))
    expect(finite(found.dx, D)).toEqual(others([4, 7], 60))
    expect(finite(found.dweights, 1)).toEqual(others([4, 7], 60))
    // Tokens 4 and 7 are routed to expert 2.
    for (const name of ['dgate', 'dup', 'ddown']) expect(finite(found[name], D * I), name).toEqual(others([2], E))
  })

  test('saves only the results of gate and up, in bf16, and only if a gradient is needed', async () => {
    const numbers = normalNumbers(cases[0])
    const { N, K, I, D } = numbers
    await onBackend(variant, async ({ backend }) => {
      const results: unknown[] = []
      for (const frozen of [[], ['x', 'gate', 'up', 'down', 'weights']]) {
        const parameters = parametersOf(numbers, backend, frozen)
        const out = scope(() => {
          const plan = dispatchPlan(tensor(numbers.chosen, [N, K], { backend }), numbers.E)
          const { x, weights, ...experts } = parameters
          const before = backend.stats().bytes
          const result = withPrecision(precision, () => routedExperts(x, experts, weights, plan))
          const saved = frozen.length === 0 ? 2 * N * K * I * 2 : 0
          expect(backend.stats().bytes - before).toBe(N * D * 4 + saved)
          return result.detach()
        })
        results.push(await out.values())
        for (const one of [out, ...Object.values(parameters)]) one.dispose()
      }
      expect(results[1]).toEqual(results[0])
    })
  })

  test('launches the expected kernels, with and without saved activations', async () => {
    await onBackend(variant, async ({ backend }) => {
      const numbers = normalNumbers(cases[0])
      const names = ['x', 'gate', 'up', 'down', 'weights']
      for (const frozen of [[], names]) {
        const parameters = parametersOf(numbers, backend, frozen)
        const { x, weights, ...experts } = parameters
        scope(() => {
          const plan = dispatchPlan(tensor(numbers.chosen, [numbers.N, numbers.K], { backend }), numbers.E)
          const before = backend.stats().launches
          withPrecision(precision, () => routedExperts(x, experts, weights, plan))
          // In bf16: rounding, gather, gate and up with SwiGLU, down, combine. In fp8, each operand is quantized separately, and gate, up and SwiGLU are three kernels.
          expect(backend.stats().launches - before).toBe(precision === 'bf16' ? 5 : 10)
        })
        for (const one of Object.values(parameters)) one.dispose()
      }
    })
  })

  test('declines sizes for which separate ops are better, and accepts empty inputs', async () => {
    await onBackend(variant, async ({ backend }) => {
      const declined = () =>
        fallbacks().find(({ backend: name, op }) => name === backend.name && op === 'routedExperts')?.count ?? 0
      for (const sizes of [
        ...(precision === 'bf16' ? [{ name: 'few rows', N: 8, K: 2, E: 2, D: 8, I: 4 }] : []),
        { name: 'no tokens', N: 0, K: 2, E: 2, D: 8, I: 4 },
      ]) {
        const numbers = normalNumbers(sizes)
        const parameters = parametersOf(numbers, backend)
        const before = declined()
        const values = scope(() => {
          const out = forward(numbers, { backend, precision }, parameters)
          backward(out, { gradient: tensor(numbers.dout, out.shape, { backend }) })
          return out.detach()
        })
        expect(declined()).toBe(before + 1)
        expect((await values.values()).length).toBe(sizes.N * sizes.D)
        expect(parameters.down.grad?.shape).toEqual([2, 8, 4])
      }
    })
  })

  test('a graph replays the op with other tokens', async () => {
    const numbers = normalNumbers(cases[0])
    const backend = await testBackend({ wgmma, guarded: false })
    const parameters = parametersOf(numbers, backend)
    const gradient = tensor(numbers.dout, [numbers.N, numbers.D], { backend })
    const step = (): Tensor[] =>
      scope(() => {
        const out = forward(numbers, { backend, precision }, parameters)
        backward(out, { gradient })
        const results = [out.detach(), ...Object.values(parameters).map(({ grad }) => (grad as Tensor).detach())]
        for (const parameter of Object.values(parameters)) parameter.zeroGrad()
        return results
      })
    const values = async (tensors: Tensor[]) => Promise.all(tensors.map(t => t.values()))
    step()
    const graph = backend.capture(step)
    for (const seed of [1, 2]) {
      backend.write(parameters.x, exact(new Random(seed), numbers.N, numbers.D).data as Float32Array)
      graph.replay()
      expect(await values(graph.result)).toEqual(await values(step()))
    }
    graph.dispose()
    backend.dispose()
  })

  test('an out-of-memory error leaves nothing allocated', async () => {
    const numbers = normalNumbers(cases[0])
    const backend = await testBackend({ wgmma, guarded: false, memoryLimit: 120_000 })
    const parameters = parametersOf(numbers, backend)
    const before = backend.stats().handles
    expect(() => scope(() => forward(numbers, { backend, precision }, parameters))).toThrow(
      /routedExperts: cannot allocate/,
    )
    expect(backend.stats().handles).toBe(before)
    backend.dispose()
  })
})

test.skipIf(unavailable).each(wgmmaVariants)(
  'in fp8, results are close to those of separate ops, wgmma %s',
  async wgmma => {
    const numbers = normalNumbers(cases[0])
    const found = await onBackend({ precision: 'fp8', wgmma }, on => resultsOf(numbers, on))
    // Rounding to bf16 first moves about one number in 32 to the next fp8 value; neighbours are 2^-4 apart.
    expectRounded(found, fp8ResultsOf(numbers, 'f32'), 2 ** -11)
  },
)
