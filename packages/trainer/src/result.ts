/** @file What a run comes to. */
import type { Evaluation } from './evaluate.ts'

/** What a run takes from one of several sources. */
export interface SourceUse {
  /** Tokens that the source has. */
  readonly size: number
  /** Its share of the rows, of 1. */
  readonly share: number
  /** Positions trained on, of all ranks. */
  readonly tokens: number
  /** How often these go through the source. */
  readonly epochs: number
}

/** What a run came to. `summary.json` holds it. */
export interface TrainResult {
  /** Steps done, earlier parts of the run included. */
  readonly steps: number
  /** True when Ctrl-C or the signal ended it; a checkpoint was saved. */
  readonly interrupted: boolean
  /** Why it ended: after its last step, by a signal, or out of time. */
  readonly stopped: 'finished' | 'interrupted' | 'time'
  /** `Backend.name`. */
  readonly backend: string
  /** `Backend.device`. */
  readonly device: string
  /** Arithmetic of matrix products. */
  readonly precision: string
  /** Trainable parameters. */
  readonly parameters: number
  /** Positions trained on. */
  readonly tokens: number
  /** Positions per second of training, without evaluation and saving. */
  readonly tokensPerSecond: number
  /** Seconds of training, without evaluation and saving, earlier parts of the run included. */
  readonly trainSeconds: number
  /** What was taken from each source, where there are several. */
  readonly sources?: Readonly<Record<string, SourceUse>>
  /** Nats per predicted training token, mean over the last tenth of the steps done. NaN if there was none. */
  readonly trainingLoss: number
  /** On all held-out data, after the last step; the numbers are NaN where there is none or the run was interrupted. */
  readonly validation: Evaluation
  /** The same of the averaged weights, in a run that keeps them and is finished. */
  readonly ema?: Evaluation
  /** Numbers of the model's `afterStep` (`maxVio`), mean over the last tenth of the steps done. */
  readonly balance: Readonly<Record<string, number>>
  /** Largest resident memory of a process so far, of those that took part in the run one after another. */
  readonly peakMemoryBytes: number
  /** Largest total of live tensors on the backend so far, of the same processes. */
  readonly peakDeviceBytes: number
  /** Folder of the last checkpoint. */
  readonly checkpoint: string | undefined
}
