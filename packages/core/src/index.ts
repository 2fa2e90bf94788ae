/** @file Public interface of @moe/core. */
export { type BackwardOptions, backward, gradients } from './autograd/backward.ts'
export { cacheForRecompute, checkpoint, isRecomputing, withKept, withRecomputed } from './autograd/checkpoint.ts'
export {
  type CustomGradient,
  type CustomGradientContext,
  customGradient,
  type TensorFor,
} from './autograd/custom-gradient.ts'
export { backwardInput, type SplitBackward } from './autograd/split.ts'
export type {
  AttrUpdates,
  Backend,
  BackendStats,
  CaptureOptions,
  FusedKernel,
  FusedKernels,
  Graph,
  Handle,
  Kernel,
  PrimitiveKernels,
  TensorSpec,
  Value,
} from './backend.ts'
export { needAxes } from './checks.ts'
export { arange, type CreateOptions, fromHost, full, ones, rand, randn, tensor, zeros } from './create.ts'
export { type BackendModule, defaultBackend, firstAvailable, setDefaultBackend } from './default-backend.ts'
export {
  bitsOf,
  type DType,
  decodeHost,
  dtypeBytes,
  dtypes,
  encodeHost,
  f8e4m3Max,
  fp8Tile,
  fromBf16,
  fromF8e4m3,
  fromF16,
  type HostArray,
  hostArray,
  isFloat,
  toBf16,
  toF8e4m3,
  toF16,
  viewBytes,
} from './dtype.ts'
export { type ErrorCode, type ErrorInfo, isMoeError, MoeError, shown } from './errors.ts'
export { adamwStep, globalNorm, globalNormParts } from './fused/adamw.ts'
export { type AttentionOptions, attention, type LatentAttentionOptions, latentAttention } from './fused/attention.ts'
export { crossEntropy, defaultIgnoreIndex, linearCrossEntropy } from './fused/cross-entropy.ts'
export { type Fallback, fallbacks } from './fused/definition.ts'
export { combineTokens, type DispatchPlan, dispatchPlan, permuteTokens } from './fused/dispatch.ts'
export { emaStep } from './fused/ema.ts'
export { groupedMatmul } from './fused/grouped-matmul.ts'
export { type IndexScoresOptions, indexScores } from './fused/index-scores.ts'
export { mlaKeyValue } from './fused/mla-key-value.ts'
export { quantize } from './fused/quantize.ts'
export {
  dequantizeWeight,
  type QuantizedWeight,
  quantizedGroupedMatmul,
  quantizedMatmul,
  quantizeWeight,
} from './fused/quantized-matmul.ts'
export { rmsNorm } from './fused/rms-norm.ts'
export { type RopeOptions, rope } from './fused/rope.ts'
export { type ExpertWeights, routedExperts } from './fused/routed-experts.ts'
export { type Routing, routerTopk } from './fused/router-topk.ts'
export { softmax } from './fused/softmax.ts'
export { swiglu } from './fused/swiglu.ts'
export {
  type AdapterOptions,
  addAdapters,
  isFrozen,
  mergeAdapters,
  type NamedAdapter,
  namedAdapters,
  removeAdapters,
} from './nn/adapters.ts'
export { createModule, deferWeights, materialize } from './nn/defer-weights.ts'
export {
  Embedding,
  forkInit,
  type InitOptions,
  initNames,
  Linear,
  normalParameter,
  OutputHead,
  RmsNorm,
  SwigluMlp,
  seedDefaultRandom,
  weightParameter,
} from './nn/layers.ts'
export {
  disposeModule,
  Module,
  type NamedParameter,
  type NamedStream,
  namedParameters,
  namedStreams,
  parameterCount,
  trainable,
  zeroGrad,
} from './nn/module.ts'
export {
  isTokenTable,
  type LocalParameter,
  ParameterShard,
  type Rows,
  type ShardCommunicator,
} from './nn/parameter-shard.ts'
export {
  copyRows,
  denseWeight,
  groupedLinear,
  isPlain,
  linear,
  linearRows,
  QuantizedParameter,
  quantizeWeights,
  rowsPerBlock,
  type WeightBytes,
  weightBytes,
  weightShape,
  weightVersion,
} from './nn/quantized.ts'
export { reduceGradients } from './nn/reduce-gradients.ts'
export {
  entriesSource,
  type LoadOptions,
  loadStateDict,
  type QuantizedElements,
  type QuantizedLayout,
  type StateEntry,
  type StateSource,
  stateDict,
} from './nn/state-dict.ts'
export type {
  AdamwAttrs,
  AttentionAttrs,
  BinaryCode,
  CompareCode,
  EmaAttrs,
  FusedAttrs,
  FusedName,
  IndexScoresAttrs,
  OpAttrs,
  OpName,
  Precision,
  PrimitiveAttrs,
  PrimitiveName,
  QuantizedAttrs,
  ReduceCode,
  RoutedExpertsAttrs,
  RouterAttrs,
  UnaryCode,
  WeightFormat,
  WidePrecision,
} from './ops.ts'
export { checkOptions, checkShared, nearestName, type OptionNames } from './options.ts'
export { type Adapter, Parameter, type RowReader } from './parameter.ts'
export { checkPrecision, currentPrecision, precisions, widePrecision, withPrecision } from './precision.ts'
export { concat, scatterAddRows, setRows, where } from './primitives.ts'
export { philox4x32, Random } from './random.ts'
export { disposeOnError, keep, Lifetime, scope } from './scope.ts'
export type { Shape } from './shape.ts'
export { broadcastShapes, sameShape, showShape, sizeOf, stridesOf } from './shape.ts'
export { disposeAfterUse, isRecording, noGrad } from './tape.ts'
export { Tensor } from './tensor.ts'
export { yieldToEventLoop } from './turns.ts'
