/** @file Names of the inputs of ops, for error messages: those of the parameters of the functions that users call. */
import type { OpName } from './backend.ts'

const inputNames: { readonly [Op in OpName]?: readonly string[] } = {
  where: ['condition', 'a', 'b'],
  takeRows: ['x', 'index'],
  scatterAddRows: ['index', 'source'],
  setRows: ['x', 'index', 'source'],
  softmax: ['x'],
  rmsNorm: ['x', 'weight'],
  swiglu: ['gate', 'up'],
  rope: ['x', 'cos', 'sin', 'plain'],
  mlaKeyValue: ['kv', 'ropeKey'],
  attention: ['q', 'k', 'v', 'lengths', 'starts'],
  latentAttention: ['q', 'cache', 'lengths', 'pages'],
  crossEntropy: ['logits', 'targets'],
  linearCrossEntropy: ['x', 'weight', 'targets'],
  routerTopk: ['logits', 'bias'],
  dispatchPlan: ['indices'],
  permuteTokens: ['x', 'order', 'positions'],
  combineTokens: ['y', 'weights', 'order', 'positions'],
  groupedMatmul: ['x', 'weight', 'offsets'],
  routedExperts: ['x', 'gate', 'up', 'down', 'weights', 'order', 'positions', 'offsets'],
  quantizedMatmul: ['x', 'q', 'scale'],
  quantizedGroupedMatmul: ['x', 'q', 'offsets', 'scale'],
  adamwStep: ['param', 'grad', 'm', 'v', 'gradScale'],
  emaStep: ['average', 'value'],
  quantize: ['x'],
}

/** Returns the name of an input; ops of any number of tensors number them. Internal. */
export const inputName = (op: string, index: number): string => inputNames[op as OpName]?.[index] ?? `input ${index}`
