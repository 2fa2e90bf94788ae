import { Random, randn, setDefaultBackend, softmax, tensor, where } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose } from '@moe/core/testing'
import { expect, test } from 'vitest'
import { MultiHeadAttention } from './index.ts'

setDefaultBackend(referenceBackend())

test('query heads share the keys and values of their group', async () => {
  const [heads, groups, features, time, hidden] = [6, 2, 4, 5, 12]
  const random = new Random(2)
  const layer = new MultiHeadAttention(
    { hidden_size: hidden, num_attention_heads: heads, num_key_value_heads: groups, head_dim: features },
    { random, std: 0.4 },
  )
  const x = randn([1, time, hidden], random)
  const out = await layer.forward(x).values()
  // The published form, head by head: softmax(q k^T / sqrt(D)) v with q and k rotated in halves.
  const flat = x.reshape([time, hidden])
  const half = features / 2
  const angles = Array.from({ length: time * half }, (_, i) => Math.floor(i / half) * 10000 ** (-(i % half) / half))
  const [cos, sin] = [Math.cos, Math.sin].map(f => tensor(angles.map(f), [time, half]))
  const head = (weight: typeof layer.q_proj.weight, i: number) =>
    flat.matmul(weight.detach().narrow(0, i * features, (i + 1) * features), { transposeB: true })
  const rotated = (weight: typeof layer.q_proj.weight, i: number) => {
    const y = head(weight, i)
    const [a, b] = [y.narrow(1, 0, half), y.narrow(1, half, features)]
    return [a.mul(cos).sub(b.mul(sin)), b.mul(cos).add(a.mul(sin))]
  }
  const steps = tensor(Float32Array.from({ length: time }, (_, i) => i))
  const causal = steps.reshape([1, time]).le(steps.reshape([time, 1]))
  let expected = tensor(new Float32Array(time * hidden), [time, hidden])
  for (let h = 0; h < heads; h++) {
    const g = Math.floor(h / (heads / groups))
    const [q, k] = [rotated(layer.q_proj.weight, h), rotated(layer.k_proj.weight, g)]
    const scores = q[0].matmul(k[0], { transposeB: true }).add(q[1].matmul(k[1], { transposeB: true }))
    const p = softmax(where(causal, scores.mul(features ** -0.5), tensor([Number.NEGATIVE_INFINITY], [])))
    const o = layer.o_proj.weight.detach().narrow(1, h * features, (h + 1) * features)
    expected = expected.add(p.matmul(head(layer.v_proj.weight, g)).matmul(o, { transposeB: true }))
  }
  assertClose('output', out, await expected.values(), { relative: 1e-5, absolute: 1e-6 })
})

test('all invalid sizes are reported together', () => {
  const config = { hidden_size: 12, num_attention_heads: 4, num_key_value_heads: 3 }
  expect(() => new MultiHeadAttention(config)).toThrow(/4 heads is not a multiple of 3.*head_dim = 3 is odd/)
  expect(() => new MultiHeadAttention({ ...config, hidden_size: 10 })).toThrow(
    /hidden_size = 10 is not a multiple of num_attention_heads = 4; pass head_dim/,
  )
})
