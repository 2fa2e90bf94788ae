import type { UnaryCode } from '@moe/core'
import { Random } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { availableIsas, runOp, testBackend } from '../../test-backend.ts'

const exact: { readonly [C in UnaryCode]: (x: number) => number } = {
  neg: x => -x,
  abs: Math.abs,
  sign: Math.sign,
  exp: Math.exp,
  log: Math.log,
  sqrt: Math.sqrt,
  rsqrt: x => 1 / Math.sqrt(x),
  sin: Math.sin,
  cos: Math.cos,
  tanh: Math.tanh,
  sigmoid: x => 1 / (1 + Math.exp(-x)),
  floor: Math.floor,
}

/** Maximum error of each function in units in the last place of f32, except for denormal results. */
const ulps: { readonly [C in UnaryCode]?: number } = { exp: 2, log: 2, sin: 2, cos: 2, tanh: 3, sigmoid: 3, rsqrt: 2 }

const special = [
  0,
  -0,
  1,
  -1,
  Infinity,
  -Infinity,
  NaN,
  1e-40,
  -1e-40,
  3e38,
  -3e38,
  88.7,
  89,
  -87,
  -104,
  1e6,
  -1e6,
  0.5,
]

const ulp = (x: number) => Math.max(2 ** (Math.floor(Math.log2(Math.abs(x))) - 23), 2 ** -149)

async function apply(code: UnaryCode, data: ArrayLike<number>, options: object) {
  const backend = await testBackend(options)
  const shape = [data.length]
  const [y] = await runOp(backend, 'unary', [{ data, shape }], { code }, [{ shape, dtype: 'f32' }])
  backend.dispose()
  return y
}

describe.each(await availableIsas())('unary ops on %s', isa => {
  test.each(Object.keys(exact) as UnaryCode[])('%s is within its error bound in ulps', async code => {
    const random = new Random(5)
    const values: number[] = [...special]
    for (const scale of [0.01, 1, 20, 80]) values.push(...random.normal(5001).map(x => x * scale))
    const x = Float32Array.from(values, v =>
      (code === 'log' || code === 'sqrt' || code === 'rsqrt') && v < -1 ? -v : v,
    )
    const y = await apply(code, x, { isa })
    let worst = 0
    x.forEach((v, i) => {
      const e = exact[code](v)
      const f = Math.fround(e)
      if (!Number.isFinite(f) || f === 0 || Math.abs(f) < 2e-38) {
        if (Number.isFinite(f)) expect(Math.abs(y[i] - f), `${code}(${v})`).toBeLessThan(2e-38)
        else expect(y[i], `${code}(${v})`).toBe(f)
        return
      }
      worst = Math.max(worst, Math.abs(y[i] - e) / ulp(e))
    })
    expect(worst).toBeLessThanOrEqual((ulps[code] ?? 0) + 0.5)
  })

  test('give equal bits for any number of threads and any length', async () => {
    const x = new Random(6).normal(100_003)
    const one = await apply('exp', x, { isa, threads: 1 })
    const two = await apply('exp', x, { isa, threads: 2 })
    expect(two).toEqual(one)
    expect(await apply('exp', x.slice(0, 70_001), { isa, threads: 2 })).toEqual(one.slice(0, 70_001))
  })
})

test('unary ops support integers', async () => {
  const backend = await testBackend()
  const data = [0, 1, -1, 7, -7, -(2 ** 31), 2 ** 31 - 1]
  const shape = [data.length]
  const apply = async (code: UnaryCode) => [
    ...(await runOp(backend, 'unary', [{ data, shape, dtype: 'i32' }], { code }, [{ shape, dtype: 'i32' }]))[0],
  ]
  expect(await apply('neg')).toEqual(data.map(x => -x | 0))
  expect(await apply('abs')).toEqual(data.map(x => Math.abs(x) | 0))
  expect(await apply('sign')).toEqual(data.map(x => Math.sign(x) | 0))
})
