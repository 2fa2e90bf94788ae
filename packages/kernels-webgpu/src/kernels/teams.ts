/** @file Teams: the threads of a workgroup share a row. */
import type { TensorSpec } from '@moe/core'
import { countOf } from '../device-ops.ts'

/** Threads per row. */
export const TEAM = 128

/** WGSL of `main` for row `i` of p(0) rows, with `size` = p(1) features from `start` on; `team_sum` adds the values of all threads. */
export const eachRow = (functions: string, body: string): string => `
var<workgroup> parts: array<f32, ${TEAM}>;
fn team_sum(own: f32, thread: u32) -> f32 {
  workgroupBarrier();
  parts[thread] = own;
  for (var step = ${TEAM / 2}u; step > 0u; step >>= 1u) {
    workgroupBarrier();
    if (thread < step) { parts[thread] += parts[thread + step]; }
  }
  workgroupBarrier();
  return parts[0];
}
${functions}
@compute @workgroup_size(${TEAM})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let i = group.y * groups.x + group.x;
  if (i >= p(0u)) { return; }
  let size = p(1u);
  let start = i * size;
${body}
}`

/** WGSL of `team_max`; needs the functions of `special` before it. */
export const largest = `
fn team_max(own: f32, thread: u32) -> f32 {
  workgroupBarrier();
  parts[thread] = own;
  for (var step = ${TEAM / 2}u; step > 0u; step >>= 1u) {
    workgroupBarrier();
    if (thread < step) { parts[thread] = max_(parts[thread], parts[thread + step]); }
  }
  workgroupBarrier();
  return parts[0];
}`

export const featuresOf = ({ shape }: TensorSpec): number => shape[shape.length - 1]

/** Number of rows of a tensor and of their features. If either is zero, there is nothing to do. */
export const rowsOf = (spec: TensorSpec): readonly [rows: number, features: number] => {
  const features = featuresOf(spec)
  return [features === 0 ? 0 : countOf(spec) / features, features]
}
