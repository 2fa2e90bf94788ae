/** @file Public interface of @moe/parallel. */
export type { Communicator, Reduction, RowExchange, TensorEach, TensorLike } from './communicator/communicator.ts'
export { local } from './communicator/local.ts'
export { ExpertParallel, type ExpertParallelModel, type RemoteExperts } from './experts/expert-parallel.ts'
export type { ExpertParallelLayer, PieceRunner, RouteTokens } from './experts/expert-shards.ts'
export { PiecewisePass } from './experts/piecewise-pass.ts'
export { type ExpertsShard, type RoutedTokens, routeOverRanks } from './experts/route-over-ranks.ts'
export type { EvaluatedBatch, EvaluatedLoss, ParallelStepOptions, ParallelStepResult } from './gradients.ts'
export { type LedCommand, leadProcesses } from './lead-processes.ts'
export { mpi } from './mpi/mpi.ts'
export { nccl } from './nccl/nccl.ts'
export { Pipeline, type PipelineModel, type PipelineStages } from './pipeline/pipeline.ts'
export { sumReplicas } from './pipeline/replicas.ts'
export { type PipelineStage, type RunOptions, runSchedule, type StageOutput } from './pipeline/run-schedule.ts'
export { drawSchedule } from './schedule/draw.ts'
export { dualPipe, dualPipeV } from './schedule/dual-pipe.ts'
export { interleaved, oneForwardOneBackward } from './schedule/one-f-one-b.ts'
export {
  type Action,
  checkSchedule,
  type PipelineSchedule,
  partsOf,
  type StagePass,
  showAction,
  stagesOf,
} from './schedule/schedule.ts'
export {
  type Durations,
  type RankSimulation,
  type Simulation,
  simulate,
  type TimedAction,
} from './schedule/simulate.ts'
export { zeroBubbleH1, zeroBubbleH2, zeroBubbleV } from './schedule/zero-bubble.ts'
