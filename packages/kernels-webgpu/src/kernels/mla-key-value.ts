/** @file Keys and values of multi-head latent attention. N features of a key without position, R with, V of a value. */
import type { FusedAttrs, FusedKernel } from '@moe/core'
import type { Program } from '../commands.ts'
import { bufferOf, countOf, type DeviceOps, eachElement } from '../device-ops.ts'

const split: Program = {
  label: 'mlaKeyValue',
  buffers: ['kv f32', 'rope_key f32', 'k* f32', 'v* f32'],
  body: eachElement(`
  let nope = p(1u);
  let rope = p(2u);
  let values = p(3u);
  let width = nope + rope + values;
  let row = i / width;
  let f = i % width;
  if (f < nope) { k[row * (nope + rope) + f] = kv[row * (nope + values) + f]; return; }
  if (f < nope + rope) { k[row * (nope + rope) + f] = rope_key[row / p(4u) * rope + f - nope]; return; }
  v[row * values + f - nope - rope] = kv[row * (nope + values) + f - rope];`),
}

export const mlaKeyValue =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['mlaKeyValue']> =>
  ([kv, ropeKey], { nope }, [keySpec, valueSpec]) => {
    const [k, v] = [gpu.output('mlaKeyValue', keySpec), gpu.output('mlaKeyValue', valueSpec)]
    const sizes = [nope, ropeKey.shape[3], valueSpec.shape[3], kv.shape[2]]
    gpu.each(split, [bufferOf(kv), bufferOf(ropeKey), k, v], countOf(keySpec) + countOf(valueSpec), sizes)
    return [k, v]
  }

/** Threads for dkv first, then those for the key that all heads share. */
const joined: Program = {
  label: 'mlaKeyValueBackward',
  buffers: ['dk f32', 'dv f32', 'dkv* f32', 'drope_key* f32'],
  body: eachElement(`
  let nope = p(1u);
  let rope = p(2u);
  let values = p(3u);
  let heads = p(4u);
  if (i < p(5u)) {
    let row = i / (nope + values);
    let f = i % (nope + values);
    if (f < nope) { dkv[i] = dk[row * (nope + rope) + f]; } else { dkv[i] = dv[row * values + f - nope]; }
    return;
  }
  let at = i - p(5u);
  var sum = 0.0;
  for (var head = 0u; head < heads; head++) { sum += dk[(at / rope * heads + head) * (nope + rope) + nope + at % rope]; }
  drope_key[at] = sum;`),
}

export const mlaKeyValueBackward =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['mlaKeyValueBackward']> =>
  ([dk, dv], { nope }, [spec, ropeSpec]) => {
    const [dkv, dropeKey] = [gpu.output('mlaKeyValueBackward', spec), gpu.output('mlaKeyValueBackward', ropeSpec)]
    const sizes = [nope, ropeSpec.shape[3], dv.shape[3], dk.shape[2], countOf(spec)]
    gpu.each(joined, [bufferOf(dk), bufferOf(dv), dkv, dropeKey], countOf(spec) + countOf(ropeSpec), sizes)
    return [dkv, dropeKey]
  }
