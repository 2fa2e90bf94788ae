/** @file RMSNorm (Zhang & Sennrich 2019), over the last axis. */
import { needDtype, needShape, shapeError } from '../checks.ts'
import { showShape } from '../shape.ts'
import type { Tensor } from '../tensor.ts'
import { type FusedDefinition, runFused } from './definition.ts'

export const rmsNormDefinition: FusedDefinition<'rmsNorm'> = {
  name: 'rmsNorm',
  infer([x, weight]) {
    needDtype('rmsNorm', 'input', x, 'f32')
    needDtype('rmsNorm', 'weight', weight, 'f32')
    needShape('rmsNorm', 'weight', weight, [-1])
    const [features] = weight.shape
    if (x.shape[x.rank - 1] !== features) {
      const problem = `x has shape ${showShape(x.shape)}, the weight ${showShape(weight.shape)}`
      throw shapeError('rmsNorm', problem, `pass x [..., ${features}]`)
    }
    return [x, { shape: x.shape.slice(0, -1), dtype: 'f32' }]
  },
  decompose([x, weight], { eps }) {
    const rstd = x.mul(x).mean(-1, true).add(eps).rsqrt()
    return [x.mul(rstd).mul(weight), rstd.reshape(x.shape.slice(0, -1))]
  },
  vjp({ inputs: [x, weight], outputs: [, rstd] }, [dy, dRstd]) {
    if (dRstd !== null) throw new Error('rstd of rmsNorm carries no gradient')
    return dy === null ? [null, null] : runFused(rmsNormBackwardDefinition, [x, weight, rstd, dy], {})
  },
}

export const rmsNormBackwardDefinition: FusedDefinition<'rmsNormBackward'> = {
  name: 'rmsNormBackward',
  infer: ([x, weight]) => [x, weight],
  decompose([x, weight, rstd, dy]) {
    const r = rstd.reshape([...rstd.shape, 1])
    const normal = x.mul(r)
    const g = dy.mul(weight)
    const dx = g.sub(normal.mul(g.mul(normal).mean(-1, true))).mul(r)
    const rows = x.shape.map((_, i) => i).slice(0, -1)
    return [dx, dy.mul(normal).sum(rows)]
  },
  vjp: null,
}

/**
 * Returns x / sqrt(mean(x^2) + eps) * weight over the last axis, for `x [..., D]` and `weight [D]`.
 * @throws MoeError E_SHAPE, E_DTYPE
 */
export function rmsNorm(x: Tensor, weight: Tensor, eps = 1e-6): Tensor {
  return runFused(rmsNormDefinition, [x, weight], { eps })[0]
}
