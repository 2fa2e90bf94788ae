/** @file Which token goes where: choices sorted by expert, stably, without asking the host. Slot s = token * K + choice. */
import type { FusedAttrs, FusedKernel } from '@moe/core'
import type { Program } from '../commands.ts'
import { bufferOf, countOf, type DeviceOps, eachElement } from '../device-ops.ts'

const counted: Program = {
  label: 'dispatchPlan counts',
  buffers: ['indices i32', 'counts* i32'],
  body: eachElement(`
  var count = 0;
  for (var slot = 0u; slot < p(1u); slot++) { count += i32(indices[slot] == i32(i)); }
  counts[i] = count;`),
}

const placed: Program = {
  label: 'dispatchPlan places',
  buffers: ['indices i32', 'counts i32', 'order* i32', 'positions* i32', 'offsets* i32'],
  body: eachElement(`
  var at = 0;
  for (var e = 0u; e < i; e++) { at += counts[e]; }
  offsets[i] = at;
  if (i + 1u == p(0u)) { offsets[i + 1u] = at + counts[i]; }
  for (var slot = 0u; slot < p(1u); slot++) {
    if (indices[slot] == i32(i)) {
      order[at] = i32(slot);
      positions[slot] = at;
      at++;
    }
  }`),
}

/** A thread for each expert: what it reads, all others read, too. */
export const dispatchPlan =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['dispatchPlan']> =>
  ([indices], { experts }, specs) => {
    const [order, positions, offsets, counts] = specs.map(spec => gpu.output('dispatchPlan', spec))
    const slots = countOf(indices)
    gpu.each(counted, [bufferOf(indices), counts], experts, [slots])
    gpu.each(placed, [bufferOf(indices), counts, order, positions, offsets], experts, [slots])
    return [order, positions, offsets, counts]
  }
