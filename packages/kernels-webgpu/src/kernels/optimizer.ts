/** @file A step of AdamW. */
import type { FusedAttrs, FusedKernel } from '@moe/core'
import { type Program, word } from '../commands.ts'
import { bufferOf, countOf, type DeviceOps, eachElement } from '../device-ops.ts'

const step: Program = {
  label: 'adamwStep',
  buffers: ['grad f32', 'scale f32', 'param* f32', 'm* f32', 'v* f32'],
  body: `
fn f(i: u32) -> f32 { return bitcast<f32>(p(i)); }
${eachElement(`
  let g = grad[i] * scale[0];
  let mean = f(1u) * m[i] + f(2u) * g;
  let square = f(3u) * v[i] + f(4u) * g * g;
  m[i] = mean;
  v[i] = square;
  param[i] = param[i] * f(5u) - f(6u) * mean / (sqrt(square * f(7u)) + f(8u));`)}`,
}

export const adamwStep =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['adamwStep']> =>
  ([param, grad, m, v, gradScale], { lr, beta1, beta2, eps, weightDecay, step: count }, [spec]) => {
    const donated = [param, m, v].map(tensor => gpu.donated('adamwStep', tensor))
    const numbers = [
      ...[beta1, 1 - beta1, beta2, 1 - beta2, 1 - lr * weightDecay],
      ...[lr / (1 - beta1 ** count), 1 / (1 - beta2 ** count), eps],
    ]
    gpu.each(step, [bufferOf(grad), bufferOf(gradScale), ...donated], countOf(spec), numbers.map(word))
    return donated
  }
