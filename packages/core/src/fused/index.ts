/** @file The table of all fused ops. It does not compile if one is missing. */
import type { FusedName } from '../ops.ts'
import { adamwStepDefinition, globalNormDefinition } from './adamw.ts'
import { attentionBackwardDefinition, attentionDefinition, latentAttentionDefinition } from './attention.ts'
import {
  crossEntropyBackwardDefinition,
  crossEntropyDefinition,
  linearCrossEntropyBackwardDefinition,
  linearCrossEntropyDefinition,
} from './cross-entropy.ts'
import type { FusedDefinition } from './definition.ts'
import {
  combineTokensBackwardDefinition,
  combineTokensDefinition,
  dispatchPlanDefinition,
  permuteTokensBackwardDefinition,
  permuteTokensDefinition,
} from './dispatch.ts'
import { emaStepDefinition } from './ema.ts'
import { groupedMatmulDefinition, groupedMatmulWeightGradDefinition } from './grouped-matmul.ts'
import { indexScoresBackwardDefinition, indexScoresDefinition } from './index-scores.ts'
import { mlaKeyValueBackwardDefinition, mlaKeyValueDefinition } from './mla-key-value.ts'
import { quantizeDefinition } from './quantize.ts'
import { quantizedGroupedMatmulDefinition, quantizedMatmulDefinition } from './quantized-matmul.ts'
import { rmsNormBackwardDefinition, rmsNormDefinition } from './rms-norm.ts'
import { ropeDefinition } from './rope.ts'
import { routedExpertsBackwardDefinition, routedExpertsDefinition } from './routed-experts.ts'
import { routerTopkBackwardDefinition, routerTopkDefinition } from './router-topk.ts'
import { softmaxBackwardDefinition, softmaxDefinition } from './softmax.ts'
import { swigluBackwardDefinition, swigluDefinition } from './swiglu.ts'

export const fusedDefinitions: { readonly [F in FusedName]: FusedDefinition<F> } = {
  softmax: softmaxDefinition,
  softmaxBackward: softmaxBackwardDefinition,
  rmsNorm: rmsNormDefinition,
  rmsNormBackward: rmsNormBackwardDefinition,
  swiglu: swigluDefinition,
  swigluBackward: swigluBackwardDefinition,
  rope: ropeDefinition,
  mlaKeyValue: mlaKeyValueDefinition,
  mlaKeyValueBackward: mlaKeyValueBackwardDefinition,
  attention: attentionDefinition,
  attentionBackward: attentionBackwardDefinition,
  latentAttention: latentAttentionDefinition,
  indexScores: indexScoresDefinition,
  indexScoresBackward: indexScoresBackwardDefinition,
  crossEntropy: crossEntropyDefinition,
  crossEntropyBackward: crossEntropyBackwardDefinition,
  linearCrossEntropy: linearCrossEntropyDefinition,
  linearCrossEntropyBackward: linearCrossEntropyBackwardDefinition,
  routerTopk: routerTopkDefinition,
  routerTopkBackward: routerTopkBackwardDefinition,
  dispatchPlan: dispatchPlanDefinition,
  permuteTokens: permuteTokensDefinition,
  permuteTokensBackward: permuteTokensBackwardDefinition,
  combineTokens: combineTokensDefinition,
  combineTokensBackward: combineTokensBackwardDefinition,
  groupedMatmul: groupedMatmulDefinition,
  groupedMatmulWeightGrad: groupedMatmulWeightGradDefinition,
  routedExperts: routedExpertsDefinition,
  routedExpertsBackward: routedExpertsBackwardDefinition,
  adamwStep: adamwStepDefinition,
  emaStep: emaStepDefinition,
  globalNorm: globalNormDefinition,
  quantize: quantizeDefinition,
  quantizedMatmul: quantizedMatmulDefinition,
  quantizedGroupedMatmul: quantizedGroupedMatmulDefinition,
}
