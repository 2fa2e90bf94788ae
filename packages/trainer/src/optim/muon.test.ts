import {
  disposeModule,
  full,
  namedParameters,
  Parameter,
  Random,
  randn,
  scope,
  setDefaultBackend,
  type Tensor,
  tensor,
} from '@moe/core'
import { readF64, referenceBackend } from '@moe/core/reference'
import { afterEach, beforeAll, describe, expect, test } from 'vitest'
import { BigramModel } from '../test-model.ts'
import { AdamW } from './adamw.ts'
import { hiddenMatrices, Muon, type MuonOptions, orthogonalize } from './muon.ts'

const backend = referenceBackend()
beforeAll(() => setDefaultBackend(backend))
afterEach(() => expect(backend.stats().handles).toBe(0))

/** The product of a matrix and its transpose (of the smaller side), by plain loops. */
function gram(values: ArrayLike<number>, rows: number, columns: number): number[][] {
  const at = (i: number, j: number) => (rows <= columns ? values[i * columns + j] : values[j * columns + i])
  const [small, large] = [Math.min(rows, columns), Math.max(rows, columns)]
  return Array.from({ length: small }, (_, i) =>
    Array.from({ length: small }, (_, k) => {
      let sum = 0
      for (let j = 0; j < large; j++) sum += at(i, j) * at(k, j)
      return sum
    }),
  )
}

describe('orthogonalize', () => {
  test.each([
    [4, 9],
    [9, 4],
    [5, 5],
  ])('gives %i x %i matrices singular values near 1', (rows, columns) => {
    using x = randn([rows, columns], new Random(rows))
    using y = scope(() => orthogonalize(x, 5, 'f32'))
    const product = gram(readF64(y), rows, columns)
    // All eigenvalues of the Gram matrix lie between the squares of 0.68 and 1.21, so its diagonal does, and the rest
    // is small.
    for (const [i, row] of product.entries()) {
      for (const [j, value] of row.entries()) {
        if (i === j) expect(Math.abs(value - 1)).toBeLessThan(0.55)
        else expect(Math.abs(value)).toBeLessThan(0.5)
      }
    }
  })

  test('needs the same memory for any number of iterations', () => {
    const peakOf = (iterations: number) => {
      const own = referenceBackend()
      const x = randn([4, 16, 16], new Random(1), { backend: own })
      scope(() => orthogonalize(x, iterations, 'f32'))
      return own.stats().peakBytes
    }
    expect(peakOf(6)).toBe(peakOf(2))
  })

  test('keeps singular vectors and signs, so that a scaled rotation stays a rotation', () => {
    const [c, s] = [Math.cos(0.7), Math.sin(0.7)]
    using x = tensor([5 * c, -5 * s, 5 * s, 5 * c], [2, 2])
    using y = scope(() => orthogonalize(x, 5, 'f32'))
    const values = readF64(y)
    // The polynomial applied five times, from 1/sqrt(2).
    let sigma = Math.SQRT1_2
    for (let i = 0; i < 5; i++) sigma = 3.4445 * sigma - 4.775 * sigma ** 3 + 2.0315 * sigma ** 5
    for (const [i, expected] of [c, -s, s, c].entries()) expect(values[i] / sigma).toBeCloseTo(expected, 5)
  })

  test('orthogonalizes each matrix of a stack separately', () => {
    using stack = randn([3, 4, 6], new Random(1))
    using whole = scope(() => orthogonalize(stack, 5, 'f32'))
    for (let i = 0; i < 3; i++) {
      using one = scope(() => orthogonalize(stack.narrow(0, i, i + 1).reshape([4, 6]), 5, 'f32'))
      const expected = readF64(one)
      const actual = readF64(whole).slice(i * 24, (i + 1) * 24)
      for (let j = 0; j < 24; j++) expect(actual[j]).toBeCloseTo(expected[j], 6)
    }
  })

  test('returns zeros for a matrix of zeros', () => {
    using x = full([3, 2], 0)
    using y = scope(() => orthogonalize(x))
    expect([...readF64(y)]).toEqual([0, 0, 0, 0, 0, 0])
  })
})

describe('Muon', () => {
  const named = (name: string, value: Tensor) => ({ name, parameter: new Parameter(value) })

  test('updates hidden matrices, and all other parameters with AdamW', async () => {
    const random = new Random(2)
    const make = () => [
      named('model.embed_tokens.weight', randn([4, 3], random.fork('a'))),
      named('model.layers.0.mlp.experts.up_proj', randn([2, 4, 3], random.fork('b'))),
      named('model.norm.weight', randn([3], random.fork('c'))),
      named('lm_head.weight', randn([4, 3], random.fork('d'))),
    ]
    const [ofMuon, ofAdamW] = [make(), make()]
    expect(ofMuon.map(hiddenMatrices)).toEqual([false, true, false, false])
    const muon = new Muon(ofMuon)
    const adamw = new AdamW(ofAdamW)
    using one = full([], 1)
    for (const [optimizer, parameters] of [
      [muon, ofMuon],
      [adamw, ofAdamW],
    ] as const) {
      for (const { name, parameter } of parameters) parameter.grad = randn(parameter.shape, new Random(5).fork(name))
      optimizer.step(0.01, one)
    }
    const values = (parameters: typeof ofMuon) => Promise.all(parameters.map(({ parameter }) => parameter.values()))
    const [a, b] = [await values(ofMuon), await values(ofAdamW)]
    expect([0, 2, 3].map(i => a[i])).toEqual([0, 2, 3].map(i => b[i]))
    expect(a[1]).not.toEqual(b[1])
    muon.dispose()
    adamw.dispose()
    for (const { parameter } of [...ofMuon, ...ofAdamW]) parameter.dispose()
  })

  test('scales updates like those of AdamW, whatever the size of the gradient', async () => {
    for (const size of [1e-6, 1, 1e6]) {
      const one = named('w', full([6, 24], 0))
      one.parameter.grad = scope(() => randn([6, 24], new Random(1)).mul(size))
      const muon = new Muon([one], { precision: 'f32' })
      using scale = full([], 1)
      muon.step(0.1, scale)
      const values = await one.parameter.values()
      const rms = Math.sqrt(Array.from(values).reduce((sum, x) => sum + x * x, 0) / values.length)
      // 0.2 sqrt(24) times the root mean square of 6 orthogonal rows of length 1: 0.2.
      expect(rms / 0.1).toBeGreaterThan(0.2 * 0.7)
      expect(rms / 0.1).toBeLessThan(0.2 * 1.2)
      muon.dispose()
      one.parameter.dispose()
    }
  })

  test('decays weights, and keeps the momentum', async () => {
    const one = named('w', full([2, 2], 1))
    const muon = new Muon([one], { weightDecay: 0.5, momentum: 0.9 })
    using scale = full([], 0.5)
    one.parameter.grad = full([2, 2], 0)
    muon.step(0.1, scale)
    expect([...(await one.parameter.values())].map(x => x.toFixed(6))).toEqual(new Array(4).fill('0.950000'))
    one.parameter.zeroGrad()
    one.parameter.grad = full([2, 2], 2)
    muon.step(0.1, scale)
    const [entry] = muon.entries()
    expect(entry.name).toBe('momentum.w')
    for (const value of await entry.data()) expect(value).toBeCloseTo(0.1, 6)
    muon.dispose()
    one.parameter.dispose()
  })

  test('decays only the weights that `decays` selects', async () => {
    const parameters = [named('a', full([2, 2], 1)), named('b', full([2, 2], 1)), named('norm', full([2], 1))]
    const muon = new Muon(parameters, { weightDecay: 0.5, decays: ({ name }) => name !== 'a' })
    using scale = full([], 1)
    for (const { parameter } of parameters) parameter.grad = full(parameter.shape, 0)
    muon.step(0.1, scale)
    const values = await Promise.all(parameters.map(async ({ parameter }) => (await parameter.values())[0]))
    for (const [i, expected] of [1, 0.95, 0.95].entries()) expect(values[i]).toBeCloseTo(expected, 6)
    expect(muon.settings(parameters)).toMatchObject({ matrices: 2, decaying: 1, adamw: { decaying: 1 } })
    muon.dispose()
    const all = new Muon(parameters)
    expect(all.settings(parameters)).not.toHaveProperty('decaying')
    all.dispose()
    for (const { parameter } of parameters) parameter.dispose()
  })

  test('rejects invalid settings', () => {
    const parameters = [named('w', full([2, 2], 1))]
    for (const [options, message] of [
      [{ momentum: 1 }, /Muon: momentum is 1, expected a number of at least 0 and below 1/],
      [{ iterations: 0 }, /Muon: iterations is 0, expected an integer of at least 1/],
      [{ betas: [0.9] }, /AdamW: betas is .*, expected two numbers/],
      [{ weightDecay: -0.1 }, /AdamW: weightDecay is -0.1, expected a number of at least 0/],
      [{ eps: Number.NaN }, /AdamW: eps is NaN, expected a positive number/],
    ] as const) {
      expect(() => new Muon(parameters, options as unknown as MuonOptions)).toThrow(message)
    }
    for (const { parameter } of parameters) parameter.dispose()
  })

  test('rejects state of other parameters before it loads any', async () => {
    const model = new BigramModel()
    const parameters = namedParameters(model)
    const muon = new Muon(parameters, { filter: ({ name }) => name === 'lm_head.weight' })
    const entries = new Map(muon.entries().map(entry => [entry.name, entry]))
    const source = (names: string[]) => ({
      keys: () => names,
      info: (name: string) => entries.get(name) ?? { dtype: 'f32' as const, shape: [1] },
      read: async () => new Float32Array(72).fill(9),
    })
    const names = [...entries.keys()]
    expect(names).toEqual(['momentum.lm_head.weight', 'm.embed_tokens.weight', 'v.embed_tokens.weight'])
    await expect(muon.load(source(names.slice(1)), 3)).rejects.toMatchObject({ code: 'E_STATE_DICT' })
    await expect(muon.load(source([...names, 'm.other']), 3)).rejects.toThrow(/m\.other is unexpected/)
    for (const entry of entries.values()) expect([...(await entry.data())].every(value => value === 0)).toBe(true)
    await muon.load(source(names), 3)
    for (const entry of muon.entries()) expect((await entry.data())[0]).toBe(9)
    muon.dispose()
    disposeModule(model)
  })
})
