/**
 * @file What a run tells while it goes. Everything that draws, logs or reacts listens to these; nothing else leaves
 * the loop.
 */
import type { RunRecord } from './checkpoints/trainer-state.ts'
import type { Evaluation } from './evaluate.ts'
import type { SourceUse, TrainResult } from './result.ts'

/** Before the first step. */
export interface StartEvent {
  /** Tells the events apart. */
  readonly type: 'start'
  /** `Backend.name`. */
  readonly backend: string
  /** `Backend.device`. */
  readonly device: string
  /** Arithmetic of matrix products. */
  readonly precision: string
  /** Trainable parameters. */
  readonly parameters: number
  /** Steps of the whole run, and those already done by an earlier part of it. */
  readonly steps: number
  /** Steps done by an earlier part of the run; 0 for one that begins. */
  readonly fromStep: number
  /** Positions of the first step from here, of all ranks that train together; 0 where it depends on the texts that the model makes. */
  readonly tokensPerStep: number
  /** Positions of all steps of the run likewise; 0 where that is not known beforehand. */
  readonly tokens: number
  /** Texts that a step learns from, of all ranks, where the data is rollouts or preferences. */
  readonly textsPerStep?: number
  /** Tokens of the training data (of the prompts, where it is rollouts), those that begin and end documents included. */
  readonly trainingTokens: number
  /** Tokens of the held-out data; 0 without any. */
  readonly validationTokens: number
  /** How often the steps go through the training data. */
  readonly epochs: number
  /** What all steps of the run take from each source, where there are several. */
  readonly sources?: Readonly<Record<string, SourceUse>>
  /** Folder of the run, if it has one. */
  readonly out: string | undefined
  /** This process among those that train together or share the data. */
  readonly rank: number
  /** What decides which numbers the run gives: steps, batch, learning rate, optimizer, data, the model's own. */
  readonly settings: RunRecord
}

/** After each step. Also a line of `metrics.jsonl`. */
export interface StepEvent {
  /** Tells the events apart. */
  readonly type: 'step'
  /** 1 for the first. */
  readonly step: number
  /** What was minimised. */
  readonly loss: number
  /** Nats per predicted token. */
  readonly nll: number
  /** Learning rate of the step. */
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

/** Every `loadsEvery` steps and before each checkpoint, of a model with experts. Also a line of `loads.jsonl`. */
export interface LoadsEvent {
  /** Tells the events apart. */
  readonly type: 'loads'
  /** The last of the steps that the loads are summed over. */
  readonly step: number
  /** How many these are. */
  readonly steps: number
  /** Layers with experts, in the order of the model. */
  readonly layers: readonly LayerLoads[]
}

/** What the experts of a layer were given. */
export interface LayerLoads {
  /** Name of the layer. */
  readonly name: string
  /** Groups of neighbouring experts; left out where there is one. */
  readonly groups?: number
  /** Choices of each expert, before any is dropped. */
  readonly load: readonly number[]
  /** MaxVio of single steps (busiest over mean, minus 1), mean over the steps: what a device feels. That of `load` is what experts learn from; a bias that is too fast has them apart. */
  readonly stepMaxVio: number
  /** How many of these choices were dropped; left out where a layer drops none. */
  readonly dropped?: number
  /** Selection bias of each expert after the last step, to six digits. Left out where there is none, and when a step failed. */
  readonly bias?: readonly number[]
}

/** Held-out data is being measured. */
export interface MeasuringEvent {
  /** Tells the events apart. */
  readonly type: 'measuring'
  /** Steps done. */
  readonly step: number
  /** Share that is done, up to 1. */
  readonly done: number
}

/** Held-out data was measured. */
export interface EvaluationEvent extends Evaluation {
  /** Tells the events apart. */
  readonly type: 'evaluation'
  /** Steps done. */
  readonly step: number
  /** Whether it was on all of the data, at the end of the run. */
  readonly final: boolean
  /** The same measurement of the averaged weights, in a run that keeps them. */
  readonly ema?: Evaluation
}

/** A checkpoint is complete on disk. */
export interface CheckpointEvent {
  /** Tells the events apart. */
  readonly type: 'checkpoint'
  /** Steps done. */
  readonly step: number
  /** Folder of the checkpoint. */
  readonly path: string
  /** Wall time of saving it. */
  readonly seconds: number
}

/** Something that the user should know and that is no error. */
export interface NoticeEvent {
  /** Tells the events apart. */
  readonly type: 'notice'
  /** One sentence, for people. */
  readonly message: string
}

/** A listener logged numbers of its own. */
export interface LogEvent {
  /** Tells the events apart. */
  readonly type: 'log'
  /** Steps done. */
  readonly step: number
  /** Numbers by name, for example `{ 'lambada/acc': 0.31 }`. */
  readonly values: Readonly<Record<string, number>>
}

/** The run stops before its last step: asked to, or out of time. */
export interface StopEvent {
  /** Tells the events apart. */
  readonly type: 'stop'
  /** `interrupted`: by a signal of the system or of the options. `time`: `timeLimitSeconds` are over. */
  readonly reason: 'interrupted' | 'time'
  /** Steps done. */
  readonly step: number
  /** Steps of the whole run. */
  readonly steps: number
  /** The checkpoint to go on from, if the run has a folder. */
  readonly checkpoint: string | undefined
}

/** The last event of a run that did not fail. */
export interface EndEvent {
  /** Tells the events apart. */
  readonly type: 'end'
  /** What `train` returns. */
  readonly result: TrainResult
}

/** The last event of a run that failed. `train` throws the error. */
export interface FailEvent {
  /** Tells the events apart. */
  readonly type: 'fail'
  /** What `train` throws. */
  readonly error: unknown
}

/** Everything that a run tells, by `type`. The last is `end` or `fail`. */
export type TrainEvent =
  | StartEvent
  | StepEvent
  | LoadsEvent
  | MeasuringEvent
  | EvaluationEvent
  | CheckpointEvent
  | NoticeEvent
  | LogEvent
  | StopEvent
  | EndEvent
  | FailEvent

/** What a listener can add to the run: every listener receives it as an event, and the files of the run store it. */
export interface TrainReporter {
  /** Reports something that the user should know, as a `notice` event. */
  notify(message: string): void
  /**
   * Logs numbers by name, as a `log` event of the current step. They are stored in `events.jsonl` and shown as curves by `moe-trainer watch` and TensorBoard.
   * @throws MoeError E_ATTR for a value that is not a number
   */
  log(values: Readonly<Record<string, number>>): void
}

/**
 * Listens to a run. If it returns a promise, the run waits for it before the next step, so that the listener may use the model, for example to generate text.
 * A listener that throws or whose promise rejects ends the run.
 */
export type TrainListener = (event: TrainEvent, reporter: TrainReporter) => unknown
