/** @file The tables of ops that only use TensorFlow.js kernels, and tests of how these kernels handle NaN. */
import type { FusedName, PrimitiveName, TensorSpec, Value } from '@moe/core'
import type { TfTensor } from '../namespace.ts'
import type { Runner } from '../runner.ts'
import { binary, cast, compare, fill, unary, where } from './elementwise.ts'
import { dispatchPlan, groupedMatmul, groupedMatmulWeightGrad, softmax } from './fused.ts'
import { concat, cumsum, expand, matmul, pad, permute, reduce, slice, topk } from './movement.ts'
import type { Device, Ops } from './ops.ts'
import { scatterAddRows, setRows, takeRows } from './rows.ts'

export type DeviceKernel = (
  device: Device,
  op: Ops,
  inputs: readonly Value[],
  attrs: never,
  outputs: readonly TensorSpec[],
) => TfTensor[] | undefined

export const devicePrimitives: { readonly [P in Exclude<PrimitiveName, 'reshape'>]: DeviceKernel } = {
  unary,
  binary,
  compare,
  where,
  cast,
  fill,
  reduce,
  cumsum,
  topk,
  matmul,
  takeRows,
  scatterAddRows,
  setRows,
  permute,
  expand,
  slice,
  pad,
  concat,
}

export const deviceFused: { readonly [F in FusedName]?: DeviceKernel } = {
  softmax,
  dispatchPlan,
  groupedMatmul,
  groupedMatmulWeightGrad,
}

/** Tests kernels whose treatment of NaN differs between backends. Without synchronous reads it assumes the worst. */
export function probeDevice(runner: Runner, op: Ops, syncReads: boolean): Device {
  const pessimist: Device = { runner, syncReads, maxKeepsNaN: false, maximumKeepsNaN: false }
  if (!syncReads) return pessimist
  const all: TfTensor[] = []
  const made = (tensor: TfTensor) => {
    all.push(tensor)
    return tensor
  }
  const a = made(op.upload(Float32Array.of(Number.NaN, 1, 2, 3), [2, 2]))
  const b = made(op.upload(Float32Array.of(1, Number.NaN, 3, 2), [2, 2]))
  const reduced = [a, b].map(x => op.read(made(op.max(x, [1]))))
  const paired = ['Maximum', 'Minimum'].map(name => op.read(made(runner.run(name, { a, b }))))
  for (const tensor of all) tensor.dispose()
  return {
    ...pessimist,
    maxKeepsNaN: reduced.every(values => Number.isNaN(values[0])),
    maximumKeepsNaN: paired.every(values => Number.isNaN(values[0]) && Number.isNaN(values[1])),
  }
}
