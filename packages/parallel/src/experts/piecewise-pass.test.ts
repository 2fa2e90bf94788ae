import { backward, Linear, Parameter, Random, randn, scope, setDefaultBackend, type Tensor, zeroGrad } from '@moe/core'
import { readF64, referenceBackend } from '@moe/core/reference'
import { beforeEach, expect, test } from 'vitest'
import { PiecewisePass } from './piecewise-pass.ts'

beforeEach(() => setDefaultBackend(referenceBackend()))

const numbers = (t: Tensor | null | undefined) => (t ? Array.from(readF64(t)) : null)
const doubled = async (x: Tensor) => x.mul(2)

test.each([
  ['computed while a message is in flight', false],
  ['deferred', true],
])(
  'a pass in pieces gives the same gradients as one graph, with weight gradients %s',
  // Residual connections, an exchange between ranks, and an input that several pieces use.
  async (_, deferWeightGradients) => {
    const layers = [1, 2, 5].map(seed => new Linear(4, 4, { random: new Random(seed) }))
    const [first, second, third] = layers
    const dy = randn([3, 4], new Random(4))
    const x = new Parameter(randn([3, 4], new Random(3)))
    const weights = () => layers.map(({ weight }) => weight.grad)
    // y = third(x + 2 second(h) * h), h = first(x)
    const expected = scope(() => {
      const h = first.forward(x)
      const y = third.forward(x.add(second.forward(h).mul(2).mul(h)))
      backward(y, { gradient: dy })
      return [y, x.grad, ...weights()].map(numbers)
    })
    for (const layer of layers) zeroGrad(layer)

    const pass = new PiecewisePass()
    const leaf = pass.input(x)
    const [h] = pass.piece([leaf], t => [first.forward(t)])
    const [inner] = pass.piece([h], t => [second.forward(t)])
    /** For each layer, whether its weight has a gradient: when the message is sent, while it is in flight, and at the end. */
    const seen: boolean[][] = []
    const record = () => seen.push(weights().map(gradient => gradient !== null))
    const sent = await pass.exchange(inner, doubled, async gradient => {
      for (let microtask = 0; microtask < 10; microtask++) await Promise.resolve()
      record()
      for (let turn = 0; turn < 2; turn++) await new Promise(setImmediate)
      record()
      return doubled(gradient)
    })
    const [y] = pass.piece([leaf, sent, h], (a, b, c) => [third.forward(a.add(b.mul(c)))])
    await pass.backwardInput([y], [dy], { deferWeightGradients })
    record()
    expect(seen).toEqual([
      [false, false, false],
      [false, false, !deferWeightGradients],
      [false, false, !deferWeightGradients],
    ])
    const back = numbers(pass.gradient(leaf))
    pass.backwardWeight()
    expect([numbers(y), back, ...weights().map(numbers)]).toEqual(
      expected.map(values => values?.map(value => expect.closeTo(value, 12))),
    )
    pass.dispose()
  },
)

test('an exchange that fails while weight gradients are computed rejects the backward pass, and nothing else', async () => {
  const layer = new Linear(2, 2, { random: new Random(1) })
  const pass = new PiecewisePass()
  const leaf = pass.input(randn([2, 2], new Random(2)))
  const sent = await pass.exchange(leaf, doubled, () => Promise.reject(new Error('no network')))
  const [y] = pass.piece([sent], t => [layer.forward(t)])
  await expect(pass.backward(y, randn([2, 2], new Random(3)))).rejects.toThrow('no network')
  pass.dispose()
})

test('a piece may return its input unchanged, as the sum of a single loss does', async () => {
  const pass = new PiecewisePass()
  const leaf = pass.input(randn([2], new Random(1)))
  const [same] = pass.piece([leaf], x => [x])
  await pass.backward(same, randn([2], new Random(2)))
  expect(numbers(pass.gradient(leaf))).toEqual(numbers(randn([2], new Random(2))))
  pass.dispose()
})

test('an exchange whose result is not used sends zeros in the backward pass; a gradient of another shape is an error', async () => {
  const pass = new PiecewisePass()
  const x = pass.input(randn([2, 2], new Random(1)))
  const back: unknown[] = []
  await pass.exchange(x, doubled, async gradient => {
    back.push(numbers(gradient))
    return gradient.mul(1)
  })
  const [y] = pass.piece([x], t => [t.mul(3)])
  await expect(pass.backward(y, randn([2], new Random(1)))).rejects.toThrow(
    /gradient has shape \[2\], but the result has shape \[2,2\]/,
  )
  await pass.backward(y, randn([2, 2], new Random(2)))
  expect(back).toEqual([[0, 0, 0, 0]])
  expect(numbers(pass.gradient(x))).toEqual(numbers(randn([2, 2], new Random(2)).mul(3)))
  pass.dispose()
})
