/** @file The events of a run. Everything that draws, logs or reacts listens to these; nothing else leaves the loop. */
import type { RunRecord } from './checkpoints/trainer-state.ts'
import type { Evaluation } from './evaluate.ts'
import type { SourceUse, TrainResult } from './result.ts'

/** Emitted before the first step. */
export interface StartEvent {
  /** Discriminates the event types. */
  readonly type: 'start'
  /** `Backend.name`. */
  readonly backend: string
  /** `Backend.device`. */
  readonly device: string
  /** Precision of matrix products. */
  readonly precision: string
  /** Number of trainable parameters. */
  readonly parameters: number
  /** Number of steps of the whole run. */
  readonly steps: number
  /** Steps done before this process resumed the run; 0 for a new run. */
  readonly fromStep: number
  /** Positions of these steps. */
  readonly fromTokens: number
  /**
   * Positions of the next step, over all ranks that train together; 0 if it depends on texts that the model samples.
   */
  readonly tokensPerStep: number
  /** Positions of all steps of the run; 0 if that is not known in advance. */
  readonly tokens: number
  /** Texts that a step learns from, over all ranks, if the data is rollouts or preferences. */
  readonly textsPerStep?: number
  /** Tokens of the training data, including those that begin and end documents; for rollouts, tokens of the prompts. */
  readonly trainingTokens: number
  /** Tokens of the held-out data; 0 without any. */
  readonly validationTokens: number
  /** Number of passes over the training data. */
  readonly epochs: number
  /** What all steps of the run take from each source of a mixture. */
  readonly sources?: Readonly<Record<string, SourceUse>>
  /** Folder of the run, if it has one. */
  readonly out: string | undefined
  /** Index of this process among those that train together or share the data. */
  readonly rank: number
  /**
   * Settings that determine the numbers of the run: steps, batch size, learning rate, optimizer, data, and the model's
   * own.
   */
  readonly settings: RunRecord
}

/** Emitted after each step. Also written to `metrics.jsonl`. */
export interface StepEvent {
  /** Discriminates the event types. */
  readonly type: 'step'
  /** Number of the step, from 1. */
  readonly step: number
  /** The minimized loss, including auxiliary terms. */
  readonly loss: number
  /** Negative log-likelihood in nats per predicted token. */
  readonly nll: number
  /** Learning rate of the step. */
  readonly lr: number
  /** Norm over all gradients, before clipping. */
  readonly gradNorm: number
  /** Positions trained on so far. */
  readonly tokens: number
  /** Positions per second of this step. */
  readonly tokensPerSecond: number
  /** Values that the model logs, such as `maxVio` and the MTP and balance losses. */
  readonly metrics: Readonly<Record<string, number>>
}

/**
 * Emitted every `loadsEvery` steps and before each checkpoint, for a model with experts. Also written to `loads.jsonl`.
 */
export interface LoadsEvent {
  /** Discriminates the event types. */
  readonly type: 'loads'
  /** The last of the steps over which the loads are summed. */
  readonly step: number
  /** The number of these steps. */
  readonly steps: number
  /** The layers with experts, in model order. */
  readonly layers: readonly LayerLoads[]
}

/** The load of a layer's experts over several steps. */
export interface LayerLoads {
  /** Name of the layer. */
  readonly name: string
  /** Number of expert groups (of consecutive experts); omitted if there is one. */
  readonly groups?: number
  /** Tokens routed to each expert, before any are dropped. */
  readonly load: readonly number[]
  /**
   * MaxVio (busiest expert over mean, minus 1) of each single step, averaged over the steps: the imbalance that devices
   * experience. MaxVio of `load` is the imbalance over all steps, which matters for what experts learn. The two differ
   * if the busiest expert changes from step to step, for example because the bias update is too fast.
   */
  readonly stepMaxVio: number
  /** How many of these were dropped; omitted if the layer drops none. */
  readonly dropped?: number
  /**
   * Selection bias of each expert after the last step, to six digits. Omitted if there is none, and if a step failed.
   */
  readonly bias?: readonly number[]
}

/** Progress of an evaluation on held-out data. */
export interface EvaluatingEvent {
  /** Discriminates the event types. */
  readonly type: 'evaluating'
  /** Steps done. */
  readonly step: number
  /** Fraction of the evaluation that is done, up to 1. */
  readonly done: number
}

/** Result of an evaluation on held-out data. */
export interface EvaluationEvent extends Evaluation {
  /** Discriminates the event types. */
  readonly type: 'evaluation'
  /** Steps done. */
  readonly step: number
  /** Whether this is the final evaluation, which uses more of the data. */
  readonly final: boolean
  /** The same evaluation of the EMA weights, if the run keeps them. */
  readonly ema?: Evaluation
}

/** A checkpoint was saved completely. */
export interface CheckpointEvent {
  /** Discriminates the event types. */
  readonly type: 'checkpoint'
  /** Steps done. */
  readonly step: number
  /** Folder of the checkpoint. */
  readonly path: string
  /** Wall time of saving it. */
  readonly seconds: number
}

/** Something that the user should know but that is not an error. */
export interface NoticeEvent {
  /** Discriminates the event types. */
  readonly type: 'notice'
  /** One human-readable sentence. */
  readonly message: string
}

/** A listener logged numbers. */
export interface LogEvent {
  /** Discriminates the event types. */
  readonly type: 'log'
  /** Steps done. */
  readonly step: number
  /** Numbers by name, for example `{ 'lambada/acc': 0.31 }`. */
  readonly values: Readonly<Record<string, number>>
}

/** The run stops before its last step. */
export interface StopEvent {
  /** Discriminates the event types. */
  readonly type: 'stop'
  /** `interrupted`: by a process signal or the `signal` option. `time`: `timeLimitSeconds` has elapsed. */
  readonly reason: 'interrupted' | 'time'
  /** Steps done. */
  readonly step: number
  /** Steps of the whole run. */
  readonly steps: number
  /** The checkpoint to resume from, if the run has a folder. */
  readonly checkpoint: string | undefined
}

/** The last event of a run that did not fail. */
export interface EndEvent {
  /** Discriminates the event types. */
  readonly type: 'end'
  /** What `train` returns. */
  readonly result: TrainResult
}

/** The last event of a run that failed. `train` throws the error. */
export interface FailEvent {
  /** Discriminates the event types. */
  readonly type: 'fail'
  /** What `train` throws. */
  readonly error: unknown
}

/** All events of a run, by `type`. The last one is `end` or `fail`. */
export type TrainEvent =
  | StartEvent
  | StepEvent
  | LoadsEvent
  | EvaluatingEvent
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
   * Logs numbers by name, as a `log` event of the current step. They are stored in `events.jsonl`, and `moe-trainer
   * watch` and TensorBoard draw them as curves.
   *
   * @throws MoeError E_ATTR for a value that is not a number
   */
  log(values: Readonly<Record<string, number>>): void
}

/**
 * Listens to the events of a run. If it returns a promise, the next step waits for it, so a listener may use the model,
 * for example to generate text. If it throws or rejects, the run fails.
 */
export type TrainListener = (event: TrainEvent, reporter: TrainReporter) => unknown
