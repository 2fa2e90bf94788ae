/** @file Public interface of @moe/deepseek. */
export {
  type DeepSeekConfig,
  type DeepSeekConfigInput,
  type DenseConfigInput,
  hfConfig,
  type LatentConfigInput,
  parseConfig,
} from './config.ts'
export type { ContinuousBatch, ContinuousBatchOptions } from './continuous-batch.ts'
export { countParameters, type ParameterCount } from './count-parameters.ts'
export type { TextTokenizer } from './decoded-text.ts'
export { DecoderLayer, type LayerOptions } from './decoder-layer.ts'
export type {
  GenerateOptions,
  Generation,
  GenerationStats,
  SessionOptions,
  TextOptions,
  TextTurnOptions,
  TurnOptions,
} from './generation.ts'
export { type ExportedGguf, type ExportGgufOptions, exportGguf } from './gguf/export-gguf.ts'
export { loadWeights } from './load-weights.ts'
export type { LogProb, TokenLogProb } from './log-probs.ts'
export { DeepSeek, type FromPretrainedOptions } from './model.ts'
export type { DeepSeekOptions, Objective, Recompute } from './options.ts'
export type { PiecewiseLoss } from './piecewise-loss.ts'
export { presets } from './presets.ts'
export type { PieceRunner, RemoteExperts, RouteTokens } from './remote-experts.ts'
export type { AllowedTokens, SamplingOptions, TokenConstraint } from './sampling.ts'
export type { ScoreOptions } from './score.ts'
export type { Session } from './session.ts'
export type { DeepSeekStage, DeepSeekStages, StageResult } from './stages.ts'
export type { DeepSeekLoss } from './training-loss.ts'
