/** @file Where the micro-batches of a run come from: a data set, rollouts or preference pairs. */
import type { SourceProgress } from './data/training-order.ts'
import type { Evaluation } from './evaluate.ts'
import type { TokenBatch } from './model.ts'

/** How an evaluation is limited, reported and interrupted. */
export interface SourceEvaluationOptions {
  /** Maximum number of tokens to evaluate on, for a data set. */
  readonly limit: number
  readonly signal: AbortSignal
  readonly onProgress: (done: number) => void
}

/** Supplies the micro-batches of every training step, and evaluates on the held-out part of the same data. */
export interface BatchSource {
  /** Identifies the data and its settings. A run resumes only with the same. */
  readonly identity: string
  /** Whether documents that share a row are isolated from each other. */
  readonly isolate: boolean
  /** Tokens of the training data. */
  readonly trainingTokens: number
  /** Tokens of the held-out data; 0 without any. */
  readonly validationTokens: number
  /** Texts that a step learns from, on all ranks, for rollouts and preferences; 0 for a data set. */
  readonly textsPerStep: number
  /** Positions of a step (counted from 0) on this rank. If that depends on sampled texts, those of the latest step. */
  tokensInStep(step: number): number
  /** Positions of the first `steps` steps on this rank; 0 if that is not known in advance. */
  tokensInSteps(steps: number): number
  /** Number of consecutive steps that share their texts. A run stops, saves and evaluates only at multiples of it. */
  readonly stride: number
  /** Numbers to log with the step whose batches were requested last. */
  readonly metrics: Readonly<Record<string, number>>
  /** Warnings to show when the run starts. */
  readonly notices: readonly string[]
  epochs(steps: number): number
  /** Rows of a data set, prompts or pairs that the first `steps` steps take, over all ranks. */
  rowsIn(steps: number): number
  /** For prompts and pairs: the beginning of `identity` that identifies them without their settings. */
  readonly items?: string
  /**
   * Continues a run after `step` steps. `rows` is what `rowsIn` returned for them; 0 if they used other data, or rows of
   * another length.
   */
  continueFrom(step: number, rows: number): void
  /** What the first `steps` steps take from each source of a mixture. */
  sources?(steps: number): readonly SourceProgress[]
  /**
   * The micro-batches of a step (counted from 0) for the model as it is now; null if producing them was interrupted on
   * any rank.
   */
  batches(step: number): readonly TokenBatch[] | Promise<readonly TokenBatch[] | null>
  /** The same before the previous step is done; null if the batches depend on the weights. */
  prefetch(step: number): readonly TokenBatch[] | null
  /** Evaluates on the held-out data; null if it was interrupted. */
  evaluate(options: SourceEvaluationOptions): Promise<Evaluation | null>
  dispose(): void
}
