/** @file Public API of @moe/trainer. */
export { latestCheckpoint } from './checkpoints/checkpoint-folder.ts'
export { type ModelFolderOptions, modelFolder } from './checkpoints/model-folder.ts'
export {
  type Conversation,
  type ConversationFilesOptions,
  type ConversationOptions,
  type Conversations,
  type ConversationTemplate,
  conversationFiles,
  conversations,
  type Message,
  tokenizeConversations,
} from './data/conversations.ts'
export { type Corpus, type TextFilesOptions, type TextsOptions, textFiles, texts } from './data/corpus.ts'
export { type EvaluationBatch, type EvaluationOptions, evaluationWindows } from './data/evaluation-windows.ts'
export { findFiles } from './data/files.ts'
export { type MixturePart, mixture } from './data/mixture.ts'
export type { Mixture, Source, TokenData } from './data/token-data.ts'
export { type DocumentTokens, type Example, TokenDataset } from './data/token-dataset.ts'
export { TokenFiles, type TokenFilesOptions, tokenFiles } from './data/token-files.ts'
export type { TokenStream } from './data/token-stream.ts'
export { type MicroBatches, type OrderOptions, type SourceProgress, TrainingOrder } from './data/training-order.ts'
export { type EvaluateOptions, type Evaluation, evaluate, type SourceEvaluation } from './evaluate.ts'
export type {
  CheckpointEvent,
  EndEvent,
  EvaluatingEvent,
  EvaluationEvent,
  FailEvent,
  LayerLoads,
  LoadsEvent,
  LogEvent,
  NoticeEvent,
  StartEvent,
  StepEvent,
  StopEvent,
  TrainEvent,
  TrainListener,
  TrainReporter,
} from './events.ts'
export type { ProgressStream } from './host.ts'
export type {
  DeviceInputs,
  HostInputs,
  LayerLoad,
  LossOptions,
  LossOutput,
  StagedStep,
  TextTokenizer,
  TokenBatch,
  TrainableModel,
} from './model.ts'
export type { ModelOnRanks } from './model-on-ranks.ts'
export { AdamW, type AdamWOptions, decaysMatrices, type MomentDType } from './optim/adamw.ts'
export { clipScale, gradientNorm } from './optim/clip.ts'
export { Ema, type EmaOptions } from './optim/ema.ts'
export { hiddenMatrices, Muon, type MuonOptions, orthogonalize } from './optim/muon.ts'
export type { Optimizer, OptimizerEntry, OptimizerInputs, StagedOptimizer } from './optim/optimizer.ts'
export {
  type CosineOptions,
  piecewise,
  type Schedule,
  type ScheduleSegment,
  type StableDecayOptions,
  warmupConstant,
  warmupCosine,
  warmupStableDecay,
} from './optim/schedule.ts'
export type { TrainOptions } from './options.ts'
export type { Ranks } from './ranks.ts'
export { type LoadsLine, readLoads } from './report/loads-log.ts'
export { type MetricsLine, readMetrics } from './report/metrics-log.ts'
export { type ProgressOptions, progress } from './report/progress.ts'
export { writeSummary } from './report/summary.ts'
export { tensorBoard } from './report/tensor-board.ts'
export type { SourceUse, TrainResult } from './result.ts'
export { type EvaluateRewardsOptions, evaluateRewards } from './rewards/evaluate-rewards.ts'
export type { ScoringModel, ScoringModelOnRanks } from './rewards/packed-texts.ts'
export { type Preference, type PreferenceOptions, type Preferences, preferences } from './rewards/preferences.ts'
export {
  type Prompt,
  type Reward,
  type RewardOptions,
  type RolloutOptions,
  type Rollouts,
  rollouts,
  type Sample,
} from './rewards/rollouts.ts'
export type { SampledText, SamplingModel, TextRequest, TextSampler, TextSamplerOptions } from './rewards/sampler.ts'
export type { StepNumbers } from './step-numbers.ts'
export { train } from './train.ts'
export { type TrainingStepOptions, trainingStep } from './training-step.ts'
export { TrainingSteps, type TrainingStepsOptions } from './training-steps.ts'
