/** @file The result of a run. */
import type { Evaluation } from './evaluate.ts'

/** What a run takes from one source of a mixture. */
export interface SourceUse {
  /** Number of tokens in the source. */
  readonly size: number
  /** Its share of the rows, from 0 to 1. */
  readonly share: number
  /** Positions trained on, over all ranks. */
  readonly tokens: number
  /** Number of passes over the source. */
  readonly epochs: number
}

/** The result of a run. `summary.json` contains it. */
export interface TrainResult {
  /** Steps done, including those before a resume. */
  readonly steps: number
  /** Whether Ctrl-C or the signal ended the run; a checkpoint was saved. */
  readonly interrupted: boolean
  /** Why the run ended: after its last step, by a signal, or at its time limit. */
  readonly stopped: 'finished' | 'interrupted' | 'time'
  /** `Backend.name`. */
  readonly backend: string
  /** `Backend.device`. */
  readonly device: string
  /** Precision of matrix products. */
  readonly precision: string
  /** Number of trainable parameters. */
  readonly parameters: number
  /** Positions trained on. */
  readonly tokens: number
  /** Positions per second of training, excluding evaluation and saving. */
  readonly tokensPerSecond: number
  /** Seconds of training, excluding evaluation and saving, including the time before a resume. */
  readonly trainSeconds: number
  /** What was taken from each source of a mixture. */
  readonly sources?: Readonly<Record<string, SourceUse>>
  /**
   * Training loss in nats per predicted token: the mean over the last tenth of the steps done. NaN if there were none.
   */
  readonly trainingLoss: number
  /**
   * Evaluation after the last step, on all held-out data or on as much as `evalTokens` allows. The numbers are NaN without held-out data, or if the run did
   * not finish.
   */
  readonly validation: Evaluation
  /** The same evaluation of the EMA weights, if the run keeps them and finished. */
  readonly ema?: Evaluation
  /** Numbers that the model's `afterStep` returned, such as `maxVio`: means over the last tenth of the steps done. */
  readonly balance: Readonly<Record<string, number>>
  /** Peak resident memory of any process of the run, including those before a resume. */
  readonly peakMemoryBytes: number
  /** Peak total size of live tensors on the backend, in the same processes. */
  readonly peakDeviceBytes: number
  /** Folder of the last checkpoint, if one was saved. */
  readonly checkpoint: string | undefined
}
