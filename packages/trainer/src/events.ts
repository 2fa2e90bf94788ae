/**
 * @file What a run tells while it goes. Everything that draws, logs or reacts listens to these; nothing else leaves
 * the loop.
 */
import type { RunRecord } from './checkpoints/trainer-state.ts'
import type { Evaluation } from './evaluate.ts'
import type { TrainResult } from './result.ts'

/** Before the first step. */
export interface StartEvent {
  readonly type: 'start'
  readonly backend: string
  readonly device: string
  readonly precision: string
  /** Trainable parameters. */
  readonly parameters: number
  /** Steps of the whole run, and those already done by an earlier part of it. */
  readonly steps: number
  readonly fromStep: number
  /** Positions per step on this rank. */
  readonly tokensPerStep: number
  readonly trainingTokens: number
  readonly validationTokens: number
  /** How often the steps go through the training data. */
  readonly epochs: number
  /** Folder of the run, if it has one. */
  readonly out: string | undefined
  /** This process among those that train together or share the data. */
  readonly rank: number
  /** What decides which numbers the run gives: steps, batch, learning rate, optimizer, data, the model's own. */
  readonly settings: RunRecord
}

/** After each step. Also a line of `metrics.jsonl`. */
export interface StepEvent {
  readonly type: 'step'
  /** 1 for the first. */
  readonly step: number
  /** What was minimised. */
  readonly loss: number
  /** Nats per predicted token. */
  readonly nll: number
  readonly lr: number
  /** Before clipping. */
  readonly gradNorm: number
  /** Positions trained on so far. */
  readonly tokens: number
  /** Of this step. */
  readonly tokensPerSecond: number
  /** What the model logs: `maxVio`, losses of MTP and balance. */
  readonly metrics: Readonly<Record<string, number>>
}

/** Held-out data is being measured. */
export interface MeasuringEvent {
  readonly type: 'measuring'
  readonly step: number
  /** Share that is done, up to 1. */
  readonly done: number
}

/** Held-out data was measured. */
export interface EvaluationEvent extends Evaluation {
  readonly type: 'evaluation'
  readonly step: number
  /** Whether it was on all of the data, at the end of the run. */
  readonly final: boolean
}

/** A checkpoint is complete on disk. */
export interface CheckpointEvent {
  readonly type: 'checkpoint'
  readonly step: number
  readonly path: string
  readonly seconds: number
}

/** Something that the user should know and that is no error. */
export interface NoticeEvent {
  readonly type: 'notice'
  readonly message: string
}

/** The run stops before its last step: asked to, or out of time. */
export interface StopEvent {
  readonly type: 'stop'
  readonly reason: 'interrupted' | 'time'
  readonly step: number
  readonly steps: number
  /** The checkpoint to go on from, if the run has a folder. */
  readonly checkpoint: string | undefined
}

/** The last event of a run that did not fail. */
export interface EndEvent {
  readonly type: 'end'
  readonly result: TrainResult
}

/** The last event of a run that failed. `train` throws the error. */
export interface FailEvent {
  readonly type: 'fail'
  readonly error: unknown
}

export type TrainEvent =
  | StartEvent
  | StepEvent
  | MeasuringEvent
  | EvaluationEvent
  | CheckpointEvent
  | NoticeEvent
  | StopEvent
  | EndEvent
  | FailEvent

/** @param notify tells all listeners something that the user should know, as a `notice` */
export type TrainListener = (event: TrainEvent, notify?: (message: string) => void) => void
