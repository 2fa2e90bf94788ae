/** @file The table of all ops with a CUDA kernel. */
import type { FusedName, PrimitiveName } from '@moe/core'
import type { FusedFactory, PrimitiveFactory } from '../native.ts'
import { adamwStep } from './adamw/adamw.ts'
import { attention, attentionBackward } from './attention/attention.ts'
import { binary } from './binary/binary.ts'
import { cast } from './cast/cast.ts'
import { combineTokens, combineTokensBackward } from './combine-tokens/combine-tokens.ts'
import { compare } from './compare/compare.ts'
import { crossEntropy, crossEntropyBackward } from './cross-entropy/cross-entropy.ts'
import { cumsum } from './cumsum/cumsum.ts'
import { dispatchPlan } from './dispatch-plan/dispatch-plan.ts'
import { emaStep } from './ema/ema.ts'
import { fill } from './fill/fill.ts'
import { globalNorm } from './global-norm/global-norm.ts'
import { groupedMatmul, groupedMatmulWeightGrad } from './grouped-matmul/grouped-matmul.ts'
import { indexScores, indexScoresBackward } from './index-scores/index-scores.ts'
import { latentAttention } from './latent-attention/latent-attention.ts'
import { linearCrossEntropy, linearCrossEntropyBackward } from './linear-cross-entropy/linear-cross-entropy.ts'
import { matmul } from './matmul/matmul.ts'
import { mlaKeyValue, mlaKeyValueBackward } from './mla-key-value/mla-key-value.ts'
import { concat, expand, pad, permute, reshape, slice } from './movement/movement.ts'
import { permuteTokens, permuteTokensBackward } from './permute-tokens/permute-tokens.ts'
import { quantize } from './quantize/quantize.ts'
import { quantizedGroupedMatmul, quantizedMatmul } from './quantized-matmul/quantized-matmul.ts'
import { reduce } from './reduce/reduce.ts'
import { rmsNorm, rmsNormBackward } from './rms-norm/rms-norm.ts'
import { rope } from './rope/rope.ts'
import { routedExperts, routedExpertsBackward } from './routed-experts/routed-experts.ts'
import { routerTopk, routerTopkBackward } from './router-topk/router-topk.ts'
import { scatterAddRows, setRows, takeRows } from './rows/rows.ts'
import { softmax, softmaxBackward } from './softmax/softmax.ts'
import { swiglu, swigluBackward } from './swiglu/swiglu.ts'
import { topk } from './topk/topk.ts'
import { unary } from './unary/unary.ts'
import { where } from './where/where.ts'

export const primitiveFactories: { readonly [P in PrimitiveName]: PrimitiveFactory<P> } = {
  binary,
  cast,
  compare,
  concat,
  cumsum,
  expand,
  fill,
  matmul,
  pad,
  permute,
  reduce,
  reshape,
  scatterAddRows,
  setRows,
  slice,
  takeRows,
  topk,
  unary,
  where,
}

export const fusedFactories: { readonly [F in FusedName]?: FusedFactory<F> } = {
  adamwStep,
  emaStep,
  attention,
  attentionBackward,
  combineTokens,
  combineTokensBackward,
  crossEntropy,
  crossEntropyBackward,
  dispatchPlan,
  globalNorm,
  groupedMatmul,
  groupedMatmulWeightGrad,
  indexScores,
  indexScoresBackward,
  latentAttention,
  linearCrossEntropy,
  linearCrossEntropyBackward,
  mlaKeyValue,
  mlaKeyValueBackward,
  permuteTokens,
  permuteTokensBackward,
  quantize,
  quantizedGroupedMatmul,
  quantizedMatmul,
  rmsNorm,
  rmsNormBackward,
  rope,
  routedExperts,
  routedExpertsBackward,
  routerTopk,
  routerTopkBackward,
  softmax,
  softmaxBackward,
  swiglu,
  swigluBackward,
}
