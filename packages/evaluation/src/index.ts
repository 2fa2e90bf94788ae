/** @file Public interface of @moe/evaluation. */

export type { EvaluationTokenizer } from './encode.ts'
export {
  type EvaluateTaskOptions,
  evaluateTask,
  type ItemResult,
  type Summary,
  type TaskResult,
} from './evaluate-task.ts'
export type { ItemSource } from './items.ts'
export type { ItemMetrics, Metric } from './metrics.ts'
export type { EvaluatedModel } from './model-queries.ts'
export type { ItemScore } from './scorers.ts'
export type {
  ChoiceTask,
  ContinuationTask,
  ExampleDraw,
  Field,
  GenerationTask,
  Item,
  ListField,
  Match,
  Task,
  TaskTexts,
  TextTask,
} from './task.ts'
export { readTask } from './task-file.ts'
export { tasks } from './tasks.ts'
