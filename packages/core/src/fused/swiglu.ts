/** @file The gated activation of feed-forward networks (Shazeer 2020). */
import { needDtype, needShape } from '../checks.ts'
import type { Tensor } from '../tensor.ts'
import { type FusedDefinition, runFused } from './definition.ts'

export const swigluDefinition: FusedDefinition<'swiglu'> = {
  name: 'swiglu',
  infer([gate, up]) {
    needDtype('swiglu', 'gate', gate, 'f32')
    needDtype('swiglu', 'up', up, 'f32')
    needShape('swiglu', 'up', up, gate.shape)
    return [gate]
  },
  decompose: ([gate, up]) => [gate.mul(gate.sigmoid()).mul(up)],
  vjp: ({ inputs: [gate, up] }, [dy]) =>
    dy === null ? [null, null] : runFused(swigluBackwardDefinition, [gate, up, dy], {}),
}

export const swigluBackwardDefinition: FusedDefinition<'swigluBackward'> = {
  name: 'swigluBackward',
  infer: ([gate, up]) => [gate, up],
  decompose([gate, up, dy]) {
    const s = gate.sigmoid()
    // d silu(g) / dg = s (1 + g (1 - s))
    const slope = s.mul(gate.mul(s.neg().add(1)).add(1))
    return [dy.mul(up).mul(slope), dy.mul(gate).mul(s)]
  },
  vjp: null,
}

/** Returns silu(gate) * up, elementwise, for inputs of the same shape. @throws MoeError E_SHAPE, E_DTYPE */
export function swiglu(gate: Tensor, up: Tensor): Tensor {
  return runFused(swigluDefinition, [gate, up], {})[0]
}
