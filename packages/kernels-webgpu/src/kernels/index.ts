/** @file The tables of kernels. */
import type { FusedKernels, PrimitiveKernels } from '@moe/core'
import type { DeviceOps } from '../device-ops.ts'
import { attention, latentAttention } from './attention.ts'
import { attentionBackward } from './attention-tiles.ts'
import { dispatchPlan } from './dispatch.ts'
import { binary, cast, compare, fill, unary, where } from './elementwise.ts'
import { globalNorm } from './global-norm.ts'
import { indexScores } from './index-scores.ts'
import { linearCrossEntropy, linearCrossEntropyBackward } from './linear-cross-entropy.ts'
import { groupedMatmul, groupedMatmulWeightGrad, matmul, quantizedGroupedMatmul, quantizedMatmul } from './matmul.ts'
import { mlaKeyValue, mlaKeyValueBackward } from './mla-key-value.ts'
import { concat, expand, pad, permute, reshape, slice } from './movement.ts'
import { adamwStep, emaStep } from './optimizer.ts'
import { cumsum, reduce, topk } from './reduce.ts'
import { rope } from './rope.ts'
import { routerTopk, routerTopkBackward } from './router.ts'
import { scatterAddRows, setRows, takeRows } from './rows.ts'
import {
  crossEntropy,
  crossEntropyBackward,
  rmsNorm,
  rmsNormBackward,
  softmax,
  softmaxBackward,
  swiglu,
  swigluBackward,
} from './rowwise.ts'
import { combineTokens, combineTokensBackward, permuteTokens, permuteTokensBackward } from './tokens.ts'

export const primitivesOn = (gpu: DeviceOps): PrimitiveKernels => ({
  unary: unary(gpu),
  binary: binary(gpu),
  compare: compare(gpu),
  where: where(gpu),
  cast: cast(gpu),
  fill: fill(gpu),
  reduce: reduce(gpu),
  cumsum: cumsum(gpu),
  topk: topk(gpu),
  matmul: matmul(gpu),
  takeRows: takeRows(gpu),
  scatterAddRows: scatterAddRows(gpu),
  setRows: setRows(gpu),
  reshape: reshape(gpu),
  permute: permute(gpu),
  expand: expand(gpu),
  slice: slice(gpu),
  pad: pad(gpu),
  concat: concat(gpu),
})

export const fusedOn = (gpu: DeviceOps): FusedKernels => ({
  softmax: softmax(gpu),
  softmaxBackward: softmaxBackward(gpu),
  rmsNorm: rmsNorm(gpu),
  rmsNormBackward: rmsNormBackward(gpu),
  swiglu: swiglu(gpu),
  swigluBackward: swigluBackward(gpu),
  rope: rope(gpu),
  linearCrossEntropy: linearCrossEntropy(gpu),
  linearCrossEntropyBackward: linearCrossEntropyBackward(gpu),
  mlaKeyValue: mlaKeyValue(gpu),
  mlaKeyValueBackward: mlaKeyValueBackward(gpu),
  crossEntropy: crossEntropy(gpu),
  crossEntropyBackward: crossEntropyBackward(gpu),
  attention: attention(gpu),
  attentionBackward: attentionBackward(gpu),
  latentAttention: latentAttention(gpu),
  indexScores: indexScores(gpu),
  routerTopk: routerTopk(gpu),
  routerTopkBackward: routerTopkBackward(gpu),
  dispatchPlan: dispatchPlan(gpu),
  permuteTokens: permuteTokens(gpu),
  permuteTokensBackward: permuteTokensBackward(gpu),
  combineTokens: combineTokens(gpu),
  combineTokensBackward: combineTokensBackward(gpu),
  groupedMatmul: groupedMatmul(gpu),
  groupedMatmulWeightGrad: groupedMatmulWeightGrad(gpu),
  quantizedMatmul: quantizedMatmul(gpu),
  quantizedGroupedMatmul: quantizedGroupedMatmul(gpu),
  adamwStep: adamwStep(gpu),
  emaStep: emaStep(gpu),
  globalNorm: globalNorm(gpu),
})
