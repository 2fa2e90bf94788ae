/** @file Rotary position embedding (Su et al. 2021) of the last features of every head. */
import { needDtype, shapeError } from '../infer.ts'
import { checkOptions } from '../options.ts'
import { showShape } from '../shape.ts'
import { concat, type FusedDefinition, runFused, type Tensor } from '../tensor.ts'

export const ropeDefinition: FusedDefinition<'rope'> = {
  name: 'rope',
  infer([x, cos, sin]) {
    for (const [name, value] of Object.entries({ input: x, cos, sin })) needDtype('rope', name, value, 'f32')
    const [batch, time, , features] = x.shape
    const half = cos.shape[cos.rank - 1]
    const fits =
      x.rank === 4 &&
      showShape(cos.shape) === showShape(sin.shape) &&
      ((cos.rank === 2 && cos.shape[0] === time) ||
        (cos.rank === 3 && cos.shape[0] === batch && cos.shape[1] === time)) &&
      2 * half <= features
    if (!fits) {
      throw shapeError(
        'rope',
        `input ${showShape(x.shape)}, cos ${showShape(cos.shape)}, sin ${showShape(sin.shape)}`,
        'pass x [B,T,H,D] and tables [T,R/2] or [B,T,R/2] with R <= D',
      )
    }
    return [x]
  },
  decompose([x, cosTable, sinTable], { interleaved, inverse }) {
    const [batch, time, heads, features] = x.shape
    const half = cosTable.shape[cosTable.rank - 1]
    const plain = features - 2 * half
    const table = (t: Tensor) => t.detach().reshape([cosTable.rank === 3 ? batch : 1, time, 1, half])
    const cos = table(cosTable)
    const sin = inverse ? table(sinTable).neg() : table(sinTable)
    const turned = x.narrow(3, plain, features)
    const pairs = interleaved
      ? turned.reshape([batch, time, heads, half, 2])
      : turned.reshape([batch, time, heads, 2, half])
    const axis = interleaved ? 4 : 3
    const part = (i: number) => pairs.narrow(axis, i, i + 1).reshape([batch, time, heads, half])
    const a = part(0)
    const b = part(1)
    const whole = (t: Tensor) => t.reshape(interleaved ? [batch, time, heads, half, 1] : [batch, time, heads, 1, half])
    const out = concat([whole(a.mul(cos).sub(b.mul(sin))), whole(b.mul(cos).add(a.mul(sin)))], axis)
    const rotated = out.reshape([batch, time, heads, 2 * half])
    return [plain === 0 ? rotated : concat([x.narrow(3, 0, plain), rotated], 3)]
  },
  vjp: ({ inputs: [, cos, sin], attrs }, [dy]) => [
    dy === null ? null : runFused(ropeDefinition, [dy, cos, sin], { ...attrs, inverse: !attrs.inverse })[0],
    null,
    null,
  ],
}

const names = { interleaved: true }

/**
 * Rotates the last R of D features of `x [B, T, H, D]` by the angles whose `cos` and `sin` are `[T, R/2]` or `[B, T, R/2]`.
 * interleaved (DeepSeek's released layout) pairs features 2i and 2i+1, otherwise i and i + R/2. The tables get no gradient.
 */
export function rope(x: Tensor, cos: Tensor, sin: Tensor, options: { interleaved?: boolean } = {}): Tensor {
  checkOptions('rope', options, names)
  return runFused(ropeDefinition, [x, cos, sin], { interleaved: options.interleaved ?? true, inverse: false })[0]
}
