/** @file Rotary position embedding (Su et al. 2021) of the last features of every head. */
import { needDtype, needShape, shapeError } from '../checks.ts'
import { zeros } from '../create.ts'
import { checkOptions, type OptionNames } from '../options.ts'
import { concat } from '../primitives.ts'
import { showShape } from '../shape.ts'
import type { Tensor } from '../tensor.ts'
import { type FusedDefinition, runFused } from './definition.ts'

export const ropeDefinition: FusedDefinition<'rope'> = {
  name: 'rope',
  infer([x, cos, sin, plain]) {
    for (const [name, value] of Object.entries({ input: x, cos, sin })) needDtype('rope', name, value, 'f32')
    const [batch, time, heads, features] = x.shape
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
    if (plain === undefined) return [x]
    needDtype('rope', 'plain', plain, 'f32')
    needShape('rope', 'plain', plain, [batch, time, heads, -1])
    return [{ shape: [batch, time, heads, plain.shape[3] + 2 * half], dtype: 'f32' }]
  },
  decompose([x, cosTable, sinTable, given], { interleaved, inverse }) {
    const [batch, time, heads, features] = x.shape
    const half = cosTable.shape[cosTable.rank - 1]
    const first = features - 2 * half
    const table = (t: Tensor) => t.detach().reshape([cosTable.rank === 3 ? batch : 1, time, 1, half])
    const cos = table(cosTable)
    const sin = inverse ? table(sinTable).neg() : table(sinTable)
    const turned = x.narrow(3, first, features)
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
    const plain = given ?? (first === 0 ? undefined : x.narrow(3, 0, first))
    return [plain === undefined ? rotated : concat([plain, rotated], 3)]
  },
  vjp({ inputs: [x, cos, sin, plain], attrs }, [dy]) {
    if (dy === null) return [null, null, null, null]
    const back = { ...attrs, inverse: !attrs.inverse }
    if (plain === undefined) return [runFused(ropeDefinition, [dy, cos, sin], back)[0], null, null]
    // The first features of x do not occur in y.
    const none = zeros([...x.shape.slice(0, 3), x.shape[3] - 2 * cos.shape[cos.rank - 1]], x)
    const dx = runFused(ropeDefinition, [dy, cos, sin, none], back)[0]
    return [dx, null, null, dy.narrow(3, 0, plain.shape[3])]
  },
}

/** Options of `rope`. */
export interface RopeOptions {
  /** If true, pairs features 2i and 2i + 1, as in DeepSeek's released layout; if false, i and i + R/2. Default true. */
  readonly interleaved?: boolean | undefined
  /** `[B, T, H, F]`: features in front of the rotated ones, instead of the first D - R of `x`. */
  readonly plain?: Tensor | undefined
}

const names: OptionNames<RopeOptions> = { interleaved: true, plain: true }

/**
 * Rotates the last R of the D features of `x [B, T, H, D]` by the angles whose `cos` and `sin` are `[T, R/2]` or `[B,
 * T, R/2]`. Returns `[B, T, H, D]`, or with `plain` `[B, T, H, F + R]`. The tables get no gradient.
 * @throws MoeError E_SHAPE, E_DTYPE
 */
export function rope(x: Tensor, cos: Tensor, sin: Tensor, options: RopeOptions = {}): Tensor {
  checkOptions('rope', options, names)
  const { interleaved = true, plain } = options
  const inputs = plain === undefined ? [x, cos, sin] : [x, cos, sin, plain]
  return runFused(ropeDefinition, inputs, { interleaved, inverse: false })[0]
}
