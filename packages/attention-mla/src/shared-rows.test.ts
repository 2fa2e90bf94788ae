/** @file Packed texts compute the same as single texts. */
import { backward, concat, namedParameters, Random, randn, scope, setDefaultBackend, tensor, zeroGrad } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose, tolerances } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import { MultiHeadAttention, MultiHeadLatentAttention } from './index.ts'

setDefaultBackend(referenceBackend())

const sizes = { hidden_size: 12, num_attention_heads: 2 }
const latent = { kv_lora_rank: 6, qk_nope_head_dim: 4, qk_rope_head_dim: 4, v_head_dim: 4 }
const init = { random: new Random(3), std: 0.4 }
const scaled = { type: 'yarn', factor: 4, original_max_position_embeddings: 2, llama_4_scaling_beta: 0.5 } as const
const layers = {
  MultiHeadLatentAttention: new MultiHeadLatentAttention({ ...sizes, ...latent, q_lora_rank: 8 }, init),
  'queries scaled by position': new MultiHeadLatentAttention(
    { ...sizes, ...latent, q_lora_rank: null, rope_scaling: scaled },
    init,
  ),
  MultiHeadAttention: new MultiHeadAttention({ ...sizes, num_key_value_heads: 1 }, init),
}

describe.each(Object.entries(layers))('%s', (_, layer) => {
  test('packed texts have the outputs and gradients of the single texts', async () => {
    const random = new Random(5)
    const texts = [3, 1, 5].map(time => randn([1, time, 12], random))
    const weights = randn([1, 9, 12], random)
    const starts = tensor(Int32Array.of(0, 0, 0, 3, 4, 4, 4, 4, 4), [1, 9])
    const run = async (forward: () => ReturnType<typeof layer.forward>) => {
      zeroGrad(layer)
      const out = scope(() => {
        const y = forward()
        const value = y.detach()
        backward(y.mul(weights).sum())
        return value
      })
      const gradients = namedParameters(layer).map(({ parameter }) => parameter.grad?.values())
      return { out: await out.values(), gradients: await Promise.all(gradients) }
    }
    const alone = await run(() =>
      concat(
        texts.map(text => layer.forward(text)),
        1,
      ),
    )
    const packed = await run(() => layer.forward(concat(texts, 1), { starts }))
    const withoutStarts = await run(() => layer.forward(concat(texts, 1)))
    // Rotation angles are rounded to f32, and differ between positions.
    const close = { relative: 1e-5, absolute: 1e-6 }
    assertClose('output', packed.out, alone.out, close)
    for (const [i, { name }] of namedParameters(layer).entries()) {
      const [own, expected] = [packed.gradients[i], alone.gradients[i]]
      if (own === undefined || expected === undefined) throw new Error(`${name} has no gradient`)
      assertClose(name, own, expected, tolerances.gradient)
    }
    expect(() => assertClose('without starts', withoutStarts.out, alone.out, close)).toThrow()
  })
})
