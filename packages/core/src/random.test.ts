import { describe, expect, test } from 'vitest'
import { philox4x32, Random } from './random.ts'

const words = (text: string) => text.split(' ').map(word => Number.parseInt(word, 16))

describe('philox4x32-10', () => {
  // The known-answer vectors of Random123 (kat_vectors): counter, key, result.
  const vectors = [
    ['00000000 00000000 00000000 00000000', '00000000 00000000', '6627e8d5 e169c58d bc57ac4c 9b00dbd8'],
    ['ffffffff ffffffff ffffffff ffffffff', 'ffffffff ffffffff', '408f276d 41c83b0e a20bc7c6 6d5451fd'],
    ['243f6a88 85a308d3 13198a2e 03707344', 'a4093822 299f31d0', 'd16cfe09 94fdcceb 5001e420 24126ea1'],
  ]
  for (const [counter, key, result] of vectors) {
    test(`returns the known answer of Random123 for the counter ${counter}`, () => {
      const out = new Uint32Array(6)
      philox4x32(words(counter), words(key), out, 1)
      expect(Array.from(out)).toEqual([0, ...words(result), 0])
    })
  }
})

describe('Random', () => {
  test('rejects a seed that is not an integer', () => {
    for (const [seed, shown] of [
      ['1', '"1"'],
      [1.5, '1.5'],
      [undefined, 'undefined'],
      [2 ** 53, '9007199254740992'],
    ]) {
      expect(() => new Random(seed as number)).toThrow(
        expect.objectContaining({
          code: 'E_ATTR',
          message: expect.stringContaining(`Random: the seed is ${shown}; pass an integer`),
        }),
      )
    }
    expect(new Random(-1).uniform(1)).not.toEqual(new Random(1).uniform(1))
  })

  test('rejects a stream of more than 32 bits, which would repeat another, and a position between blocks', () => {
    for (const stream of [2 ** 32, -1, 0.5, Number.NaN])
      expect(() => new Random(1, stream)).toThrow(`Random: the stream is ${stream}; pass an integer`)
    for (const position of [-1, 0.5, Number.NaN])
      expect(() => new Random(1, 0, position)).toThrow(`Random: the position is ${position}; pass a number of blocks`)
  })

  test('the first block of a stream is philox of (position, stream) under the seed', () => {
    const out = new Uint32Array(4)
    const seed = 2 ** 40 + 5
    philox4x32([3, 0, 9, 0], [5, 256], out)
    const expected = ((out[0] >>> 5) * 2 ** 26 + (out[1] >>> 6)) / 2 ** 53
    expect(new Random(seed, 9, 3).next()).toBe(expected)
  })

  test('positions beyond 2^32 do not wrap', () => {
    expect(new Random(1, 0, 2 ** 32).next()).not.toBe(new Random(1, 0, 0).next())
  })

  test('a stream resumes from its position', () => {
    const whole = new Random(1, 2)
    whole.next()
    whole.normal(5)
    const rest = new Random(1, 2, whole.position)
    expect(rest.uniform(9)).toEqual(whole.uniform(9))
    expect(rest.position).toBe(whole.position)
  })

  test('the same seed and stream give the same numbers, whatever is drawn elsewhere', () => {
    const a = new Random(4)
    const b = new Random(4)
    b.fork('other').normal(100)
    expect(a.normal(11)).toEqual(b.normal(11))
  })

  test('normal numbers equal those of the Box-Muller transform', () => {
    const n = 100_000
    const numbers = new Random(3, 4).normal(n, 0.5)
    const out = new Uint32Array(4)
    for (let i = 0; i < n; i += 4) {
      philox4x32([i / 4, 0, 4, 0], [3, 0], out)
      for (let j = 0; j < 4; j += 2) {
        const radius = 0.5 * Math.sqrt(-2 * Math.log((out[j] + 1) / 4294967297))
        const angle = (2 * Math.PI * out[j + 1]) / 4294967296
        expect(Math.abs(numbers[i + j] - radius * Math.cos(angle))).toBeLessThan(2 ** -24 * radius)
        expect(Math.abs(numbers[i + j + 1] - radius * Math.sin(angle))).toBeLessThan(2 ** -24 * radius)
      }
    }
  })

  test('a seed gives the same bits in every version and engine', () => {
    const digest = (values: Float32Array) =>
      new Uint32Array(values.buffer).reduce((hash, word) => Math.imul(hash ^ word, 0x01000193) >>> 0, 0x811c9dc5)
    const random = new Random(3, 4)
    expect(digest(random.normal(100_001, 0.5))).toBe(3656777061)
    expect(digest(random.uniform(1001))).toBe(2198406111)
    expect([random.next(), random.integer(1000), random.shuffle([0, 1, 2, 3, 4, 5, 6, 7]).join('')]).toEqual([
      0.7238510720434471,
      322,
      '14562703',
    ])
    expect(random.fork('model.norm.weight').fork(7)).toMatchObject({ seed: 3, stream: 1109721726, position: 0 })
  })

  test('a generator with the fields of another continues like it', () => {
    const random = new Random(2 ** 40 + 5, 9)
    random.normal(7)
    const other = Object.assign(new Random(1), JSON.parse(JSON.stringify(random)))
    expect(other.uniform(9)).toEqual(random.uniform(9))
    expect(other.fork('a').next()).toBe(random.fork('a').next())
  })

  test('seeds, streams and forks are independent', () => {
    const n = 4096
    const sources = {
      'seed 1': new Random(1),
      'seed 2': new Random(2),
      'stream 1': new Random(1, 1),
      'fork a': new Random(1).fork('a'),
      'fork b': new Random(1).fork('b'),
      'fork of a fork': new Random(1).fork('a').fork('b'),
      'fork 0': new Random(1).fork(0),
      'fork 1': new Random(1).fork(1),
    }
    const draws = Object.entries(sources).map(([name, source]) => [name, source.normal(n)] as const)
    for (const [i, [nameA, a]] of draws.entries()) {
      for (const [nameB, b] of draws.slice(i + 1)) {
        const correlation = a.reduce((sum, x, at) => sum + x * b[at], 0) / n
        // Standard error 1 / sqrt(n) = 0.016.
        expect(Math.abs(correlation), `${nameA} and ${nameB}`).toBeLessThan(0.07)
      }
    }
  })

  test('a fork does not depend on how much was drawn before it', () => {
    const a = new Random(1)
    a.normal(100)
    expect(a.fork('weight').next()).toBe(new Random(1).fork('weight').next())
  })

  test('uniform numbers are in [0, 1) and evenly spread', () => {
    const values = new Random(5).uniform(10_001)
    const bins = new Array<number>(10).fill(0)
    for (const x of values) {
      expect(x >= 0 && x < 1).toBe(true)
      bins[Math.floor(x * 10)]++
    }
    // Chi-squared with 9 degrees of freedom: above 27.9 once in a thousand seeds.
    expect(bins.reduce((sum, count) => sum + (count - 1000.1) ** 2 / 1000.1, 0)).toBeLessThan(27.9)
  })

  test('normal numbers have the moments of a normal distribution', () => {
    const values = new Random(6).normal(40_001, 2)
    const moment = (k: number) => values.reduce((sum, x) => sum + (x / 2) ** k, 0) / values.length
    expect(moment(1)).toBeCloseTo(0, 1)
    expect(moment(2)).toBeCloseTo(1, 1)
    expect(moment(3)).toBeCloseTo(0, 1)
    expect(Math.abs(moment(4) - 3)).toBeLessThan(0.15)
    expect(values.every(Number.isFinite)).toBe(true)
  })

  test('integers cover 0 .. n-1, and a shuffle keeps every item', () => {
    const random = new Random(7)
    expect(new Set(Array.from({ length: 200 }, () => random.integer(6)))).toEqual(new Set([0, 1, 2, 3, 4, 5]))
    const items = Array.from({ length: 100 }, (_, i) => i)
    const shuffled = random.shuffle(items.slice())
    expect(shuffled).not.toEqual(items)
    expect(shuffled.toSorted((a, b) => a - b)).toEqual(items)
  })
})
