/** @file The table of ops on host memory: all primitives except reshape, and the fused ops for which it pays. */
import type { FusedName, PrimitiveName, TensorSpec, Value } from '@moe/core'
import type { TfTensor } from '../namespace.ts'
import { attention, attentionBackward } from './attention.ts'
import { crossEntropy, crossEntropyBackward } from './cross-entropy.ts'
import { binary, cast, compare, fill, unary, where } from './elementwise.ts'
import {
  combineTokens,
  combineTokensBackward,
  dispatchPlan,
  groupedMatmul,
  groupedMatmulWeightGrad,
  permuteTokens,
  permuteTokensBackward,
} from './experts.ts'
import { matmul } from './matmul.ts'
import type { Host } from './memory.ts'
import { concat, expand, pad, permute, slice } from './movement.ts'
import { adamwStep, globalNorm } from './optimizer.ts'
import { cumsum, reduce, topk } from './reduce.ts'
import { rope } from './rope.ts'
import { routerTopk } from './router.ts'
import { scatterAddRows, setRows, takeRows } from './rows.ts'
import { rmsNorm, rmsNormBackward, softmax, softmaxBackward, swiglu, swigluBackward } from './rowwise.ts'

export type HostKernel = (
  host: Host,
  inputs: readonly Value[],
  attrs: never,
  outputs: readonly TensorSpec[],
) => TfTensor[] | undefined

export const hostPrimitives: { readonly [P in Exclude<PrimitiveName, 'reshape'>]: HostKernel } = {
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

export const hostFused: { readonly [F in FusedName]?: HostKernel } = {
  softmax,
  softmaxBackward,
  rmsNorm,
  rmsNormBackward,
  swiglu,
  swigluBackward,
  rope,
  attention,
  attentionBackward,
  crossEntropy,
  crossEntropyBackward,
  routerTopk,
  dispatchPlan,
  permuteTokens,
  permuteTokensBackward,
  combineTokens,
  combineTokensBackward,
  groupedMatmul,
  groupedMatmulWeightGrad,
  adamwStep,
  globalNorm,
}
