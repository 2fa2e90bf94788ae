/** @file Permutes token rows to their experts and combines them. Slot s = token * K + choice; D features. */
import type { FusedAttrs, FusedKernel } from '@moe/core'
import type { Program } from '../commands.ts'
import { bufferOf, countOf, type DeviceOps, eachElement } from '../device-ops.ts'
import { eachRow, TEAM } from './teams.ts'

const permuted: Program = {
  label: 'permuteTokens',
  buffers: ['x f32', 'order i32', 'y* f32'],
  body: eachElement(`
  let size = p(1u);
  y[i] = x[u32(order[i / size]) / p(2u) * size + i % size];`),
}

export const permuteTokens =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['permuteTokens']> =>
  ([x, order], { topK }, [spec]) => {
    const y = gpu.output('permuteTokens', spec)
    gpu.each(permuted, [bufferOf(x), bufferOf(order), y], countOf(spec), [x.shape[1], topK])
    return [y]
  }

/** A token is the sum of its K rows, each multiplied by its weight if there are weights. */
const gathered = (weighted: boolean): Program => ({
  label: weighted ? 'combineTokens' : 'permuteTokensBackward',
  buffers: ['y f32', 'positions i32', ...(weighted ? ['weights f32'] : []), 'x* f32'],
  body: eachElement(`
  let size = p(1u);
  let first = i / size * p(2u);
  var sum = 0.0;
  for (var slot = first; slot < first + p(2u); slot++) {
    sum += y[u32(positions[slot]) * size + i % size]${weighted ? ' * weights[slot]' : ''};
  }
  x[i] = sum;`),
})

export const permuteTokensBackward =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['permuteTokensBackward']> =>
  ([dy, positions], { topK }, [spec]) => {
    const dx = gpu.output('permuteTokensBackward', spec)
    gpu.each(gathered(false), [bufferOf(dy), bufferOf(positions), dx], countOf(spec), [dy.shape[1], topK])
    return [dx]
  }

export const combineTokens =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['combineTokens']> =>
  ([y, weights, , positions], _, [spec]) => {
    const out = gpu.output('combineTokens', spec)
    const buffers = [y, positions, weights].map(bufferOf)
    gpu.each(gathered(true), [...buffers, out], countOf(spec), [y.shape[1], weights.shape[1]])
    return [out]
  }

const combinedBackward: Program = {
  label: 'combineTokensBackward',
  buffers: ['y f32', 'weights f32', 'positions i32', 'dout f32', 'dy* f32', 'dweights* f32'],
  body: eachRow(
    '',
    `
  let row = u32(positions[i]) * size;
  let token = i / p(2u) * size;
  let weight = weights[i];
  var own = 0.0;
  for (var f = thread; f < size; f += ${TEAM}u) {
    let d = dout[token + f];
    dy[row + f] = weight * d;
    own += y[row + f] * d;
  }
  let sum = team_sum(own, thread);
  if (thread == 0u) { dweights[i] = sum; }`,
  ),
}

export const combineTokensBackward =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['combineTokensBackward']> =>
  ([y, weights, , positions, dout], _, [spec, weightSpec]) => {
    const [dy, dweights] = [gpu.output('combineTokensBackward', spec), gpu.output('combineTokensBackward', weightSpec)]
    const slots = countOf(weightSpec)
    const buffers = [...[y, weights, positions, dout].map(bufferOf), dy, dweights]
    gpu.launch(combinedBackward, buffers, [slots, y.shape[1], weights.shape[1]], [slots])
    return [dy, dweights]
  }
