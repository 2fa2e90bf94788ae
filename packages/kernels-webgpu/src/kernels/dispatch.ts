/** @file Dispatch plan: choices sorted by expert, stably, on the device. Slot s = token * K + choice. */
import type { FusedAttrs, FusedKernel } from '@moe/core'
import type { Program } from '../commands.ts'
import { bufferOf, countOf, type DeviceOps } from '../device-ops.ts'

const TEAM = 256

/**
 * A team per expert reads all choices; the number of choices of earlier experts is where the expert's rows start. Each thread handles a run of slots, and its own count and
 * those of the threads before it determine where it writes.
 */
const planned: Program = {
  label: 'dispatchPlan',
  buffers: ['indices i32', 'order* i32', 'positions* i32', 'offsets* i32', 'counts* i32'],
  body: `
var<workgroup> before: array<u32, ${TEAM}>;
var<workgroup> own: array<u32, ${TEAM}>;
@compute @workgroup_size(${TEAM})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let expert = i32(group.x);
  let slots = p(0u);
  let run = (slots + ${TEAM - 1}u) / ${TEAM}u;
  let first = min(thread * run, slots);
  let end = min(first + run, slots);
  var less = 0u;
  var equal = 0u;
  for (var slot = first; slot < end; slot++) {
    less += u32(indices[slot] < expert);
    equal += u32(indices[slot] == expert);
  }
  before[thread] = less;
  own[thread] = equal;
  workgroupBarrier();
  var at = 0u;
  var all = 0u;
  for (var n = 0u; n < ${TEAM}u; n++) {
    at += before[n] + select(0u, own[n], n < thread);
    all += own[n];
  }
  if (thread == 0u) {
    offsets[expert] = i32(at);
    counts[expert] = i32(all);
    if (group.x + 1u == p(1u)) { offsets[p(1u)] = i32(slots); }
  }
  for (var slot = first; slot < end; slot++) {
    if (indices[slot] == expert) {
      order[at] = i32(slot);
      positions[slot] = i32(at);
      at++;
    }
  }
}`,
}

export const dispatchPlan =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['dispatchPlan']> =>
  ([indices], { experts }, specs) => {
    const outputs = specs.map(spec => gpu.output('dispatchPlan', spec))
    gpu.launch(planned, [bufferOf(indices), ...outputs], [countOf(indices), experts], [experts])
    return outputs
  }
