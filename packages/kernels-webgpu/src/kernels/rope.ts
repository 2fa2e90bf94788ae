/** @file Rotary position embedding. */
import type { FusedAttrs, FusedKernel } from '@moe/core'
import type { Program } from '../commands.ts'
import { bufferOf, countOf, type DeviceOps, eachElement } from '../device-ops.ts'

/** `plain` is x itself if the leading features are x's own. */
const rotated: Program = {
  label: 'rope',
  buffers: ['x f32', 'cosines f32', 'sines f32', 'plain f32', 'y* f32'],
  body: eachElement(`
  let width = p(1u);      // of a row of y
  let own = p(2u);        // of a row of x
  let front = p(3u);      // features in front
  let front_row = p(4u);  // of a row of plain
  let turned = width - front;
  let half = turned / 2u;
  let heads = p(5u);
  let times = p(6u);
  let row = i / width;
  let at = i % width;
  if (at < front) { y[i] = plain[row * front_row + at]; return; }
  let feature = at - front;
  let interleaved = p(8u) == 1u;
  let pair = select(feature % half, feature / 2u, interleaved);
  let second = select(feature >= half, feature % 2u == 1u, interleaved);
  let first_at = row * own + own - turned + select(pair, 2u * pair, interleaved);
  let a = x[first_at];
  let b = x[first_at + select(half, 1u, interleaved)];
  let time = row / heads;
  let angle = select(time % times, time, p(7u) == 1u) * half + pair;
  let c = cosines[angle];
  var s = sines[angle];
  if (p(9u) == 1u) { s = -s; }
  y[i] = select(a * c - b * s, b * c + a * s, second);`),
}

export const rope =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['rope']> =>
  ([x, cos, sin, plain], { interleaved, inverse }, [spec]) => {
    const y = gpu.output('rope', spec)
    const [, times, heads, width] = spec.shape
    const own = x.shape[3]
    const half = cos.shape[cos.shape.length - 1]
    const source = plain ?? x
    const flags = [cos.shape.length === 3, interleaved, inverse].map(Number)
    const parameters = [width, own, width - 2 * half, source.shape[3], heads, times, ...flags]
    gpu.each(rotated, [...[x, cos, sin, source].map(bufferOf), y], countOf(spec), parameters)
    return [y]
  }
