import { expect, test } from 'vitest'
import {
  attention,
  backward,
  dispatchPlan,
  groupedMatmul,
  linearCrossEntropy,
  Parameter,
  Random,
  randn,
  routedExperts,
  scope,
  setDefaultBackend,
  swiglu,
  type Tensor,
  tensor,
  withPrecision,
} from './index.ts'
import { readF64, referenceBackend, roundOperand } from './reference/index.ts'

setDefaultBackend(referenceBackend())
const random = new Random(1)
const normal = (...shape: number[]) => randn(shape, random)

/** Returns x `[rows, columns]`, rounded in tiles along axis `along`. */
function rounded(x: Tensor, along: 0 | 1): Tensor {
  const [rows, columns] = x.shape
  const layout =
    along === 1
      ? { outer: rows, k: columns, stepOuter: columns, stepK: 1 }
      : { outer: columns, k: rows, stepOuter: 1, stepK: columns }
  return tensor(roundOperand(Float64Array.from(readF64(x)), layout), x.shape)
}
const transposed = { transposeB: true }

test('each of the three products of a linear layer rounds its operands along the summed axis', () => {
  const [x, w, dy] = [new Parameter(normal(150, 260)), new Parameter(normal(140, 260)), normal(150, 140)]
  const y = withPrecision('fp8', () => x.matmul(w, transposed))
  expect(readF64(y)).toEqual(readF64(rounded(x, 1).matmul(rounded(w, 1), transposed)))
  backward(y.mul(dy).sum())
  expect(readF64(x.grad as Tensor)).toEqual(readF64(rounded(dy, 1).matmul(rounded(w, 0))))
  expect(readF64(w.grad as Tensor)).toEqual(readF64(rounded(dy, 0).matmul(rounded(x, 0), { transposeA: true })))
})

test("the tiles for an expert's weight gradient begin at the expert's first row", () => {
  const [x, w, dy] = [new Parameter(normal(300, 9)), new Parameter(normal(2, 5, 9)), normal(300, 5)]
  const y = withPrecision('fp8', () => groupedMatmul(x, w, tensor(Int32Array.of(0, 70, 300), [3])))
  backward(y.mul(dy).sum())
  const expected = [
    [0, 70],
    [70, 300],
  ].flatMap(([from, to]) => {
    const [a, b] = [dy, x].map(of => rounded(of.detach().narrow(0, from, to), 0))
    return [...readF64(a.matmul(b, { transposeA: true }))]
  })
  expect([...readF64(w.grad as Tensor)]).toEqual(expected)
})

test('routedExperts rounds the operands of its three products', () => {
  const [tokens, features, inner] = [6, 16, 8]
  const experts = { gate: normal(2, inner, features), up: normal(2, inner, features), down: normal(2, features, inner) }
  const x = normal(tokens, features)
  const plan = dispatchPlan(tensor(new Int32Array(tokens), [tokens, 1]), 2)
  const out = withPrecision('fp8', () =>
    routedExperts(x, experts, tensor(new Float32Array(tokens).fill(1), [tokens, 1]), plan),
  )
  const first = (w: Tensor) => rounded(w.narrow(0, 0, 1).reshape(w.shape.slice(1)), 1)
  const product = (a: Tensor, w: Tensor) => rounded(a, 1).matmul(first(w), transposed)
  const expected = product(swiglu(product(x, experts.gate), product(x, experts.up)), experts.down)
  expect(readF64(out)).toEqual(readF64(expected))
})

test('attention, batched products and linearCrossEntropy do not use fp8', () => {
  const [q, batch, hidden, head] = [normal(1, 5, 2, 8), normal(2, 4, 8), normal(4, 8), normal(11, 8)]
  const targets = tensor(Int32Array.of(0, 3, 10, 1), [4])
  const expectSameInFp8 = (fn: () => Tensor) => {
    const [wide, policy] = [fn(), withPrecision('fp8', fn)]
    expect(readF64(policy)).toEqual(readF64(wide))
  }
  scope(() => {
    expectSameInFp8(() => attention(q, q, q))
    expectSameInFp8(() => batch.matmul(batch, transposed))
    expectSameInFp8(() => batch.matmul(batch, { ...transposed, precision: 'fp8' }))
    expectSameInFp8(() => linearCrossEntropy(hidden, head, targets))
  })
})
