/** @file A step of AdamW, and of an exponential moving average. */
import type { FusedAttrs, FusedKernel } from '@moe/core'
import { type Program, word } from '../commands.ts'
import { bufferOf, countOf, type DeviceOps, eachElement } from '../device-ops.ts'
import { toBf16 } from './packed.ts'

/** WGSL: the words from 1 on as numbers. */
const numbers = 'fn f(i: u32) -> f32 { return bitcast<f32>(p(i)); }'
/** WGSL: computes the new moments `mean` and `square` of element `i` from the old ones, and its update. */
const taken = (mean: string, square: string) => `
  let g = grad[i] * scale[0];
  let mean = f(1u) * ${mean} + f(2u) * g;
  let square = f(3u) * ${square} + f(4u) * g * g;
  param[i] = param[i] * f(5u) - f(6u) * mean / (sqrt(square * f(7u)) + f(8u));`

const step: Program = {
  label: 'adamwStep',
  buffers: ['grad f32', 'scale f32', 'param* f32', 'm* f32', 'v* f32'],
  body: `
${numbers}
${eachElement(`${taken('m[i]', 'v[i]')}
  m[i] = mean;
  v[i] = square;`)}`,
}

/** Moments in bf16, two per word: one thread computes both. Word 9 is the number of elements. */
const stepOfPairs: Program = {
  label: 'adamwStep, moments in bf16',
  buffers: ['grad f32', 'scale f32', 'param* f32', 'm* u32', 'v* u32'],
  body: `
${numbers}
${toBf16}
fn one(i: u32, m: u32, v: u32) -> vec2<u32> {${taken('bitcast<f32>(m << 16u)', 'bitcast<f32>(v << 16u)')}
  return vec2<u32>(to_bf16(mean), to_bf16(square));
}
${eachElement(`
  let low = one(2u * i, m[i] & 0xffffu, v[i] & 0xffffu);
  var high = vec2<u32>();
  if (2u * i + 1u < p(9u)) { high = one(2u * i + 1u, m[i] >> 16u, v[i] >> 16u); }
  m[i] = low.x | (high.x << 16u);
  v[i] = low.y | (high.y << 16u);`)}`,
}

export const adamwStep =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['adamwStep']> =>
  ([param, grad, m, v, gradScale], { lr, beta1, beta2, eps, weightDecay, step: t }, [spec]) => {
    const donated = [param, m, v].map(tensor => gpu.donated('adamwStep', tensor))
    const values = [
      ...[beta1, 1 - beta1, beta2, 1 - beta2, 1 - lr * weightDecay],
      ...[lr / (1 - beta1 ** t), 1 / (1 - beta2 ** t), eps],
    ]
    const buffers = [bufferOf(grad), bufferOf(gradScale), ...donated]
    const count = countOf(spec)
    if (m.dtype === 'f32') gpu.each(step, buffers, count, values.map(word))
    else gpu.each(stepOfPairs, buffers, Math.ceil(count / 2), [...values.map(word), count])
    return donated
  }

const average: Program = {
  label: 'emaStep',
  buffers: ['value f32', 'average* f32'],
  body: eachElement('average[i] += (value[i] - average[i]) * bitcast<f32>(p(1u));'),
}

export const emaStep =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['emaStep']> =>
  ([before, value], { decay, step: t }, [spec]) => {
    const y = gpu.donated('emaStep', before)
    gpu.each(average, [bufferOf(value), y], countOf(spec), [word((1 - decay) / (1 - decay ** t))])
    return [y]
  }
