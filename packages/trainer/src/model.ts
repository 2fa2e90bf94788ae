/** @file What the trainer asks of a model. Any `Module` that has these few members can be trained. */
import type { FolderPlace } from '@moe/checkpoint'
import type { Module, Shape, Tensor } from '@moe/core'

/** Rows of consecutive tokens, on the host. */
export interface TokenBatch {
  /** `[rows, length]`, row-major. */
  readonly tokens: Int32Array
  /**
   * `[rows, length]`: number of the document, or of the part of one, that each token belongs to. A position counts in the loss only if the
   * token that it predicts has the same number. Padding has negative numbers, and carries no loss.
   */
  readonly documents: Int32Array
  /**
   * `[rows, length]`, in rows that several texts share without seeing each other: the place in its row at which the text of each token begins. Only models that
   * say `isolates` get it.
   */
  readonly starts?: Int32Array
  /**
   * `[rows, length]`: what the negative log-likelihood of each token is multiplied by in `loss` (not in `nll`), where texts are learned from to different extents, or are to be unlearned. Only models that tell `nlls`
   * get it.
   */
  readonly weights?: Float32Array
  /** Number of rows. */
  readonly rows: number
  /** Tokens of a row: the trained positions and the model's `lookahead`. */
  readonly length: number
}

/** What a loss is wanted for. */
export interface LossOptions {
  /** Whether the pass is for training (auxiliary losses, load counters) or for measuring. Default true. */
  readonly training?: boolean
  /** Positions before this one are context only and carry no loss (strided evaluation). Default 0. */
  readonly from?: number
}

/** The loss of a batch, and what to log beside it. */
export interface LossOutput {
  /** Scalar that is minimised: mean over counted positions, with auxiliary terms. */
  readonly loss: Tensor
  /** Scalar, detached: sum of the next-token negative log-likelihoods over counted positions, in nats. */
  readonly nll: Tensor
  /** Counted positions; known from the batch alone. */
  readonly count: number
  /** Each of these likelihoods, detached, `[rows * positions]` by row and position; 0 where a position does not count. Only from a model that heeds `TokenBatch.weights`. */
  readonly nlls?: Tensor
  /** Scalars to log, detached: the losses of MTP modules, of load balancing. */
  readonly metrics: Readonly<Record<string, Tensor>>
}

/** Arrays of a step that a model takes from the host, by name: floats as f32, whole numbers as i32. */
export type HostInputs = Readonly<Record<string, { readonly data: Float32Array | Int32Array; readonly shape: Shape }>>

/** The same, uploaded. */
export type DeviceInputs = Readonly<Record<string, Tensor>>

/**
 * `loss` in training and `afterStep` in two parts each: what the host contributes, and the ops on that. On backends
 * that record (`Backend.capture`) the ops run in JavaScript once; later steps replay them on other inputs. So they may
 * depend on inputs, on parameters and on the shapes of both, and on nothing else that changes: random numbers are inputs, too.
 */
export interface StagedStep {
  /** For `loss`, from the batch alone: it is made ready while the device computes the step before. */
  inputs(batch: TokenBatch): { readonly arrays: HostInputs; readonly count: number }
  /**
   * For `loss`, from the step, the same for all of its micro-batches: schedules. Arrays of the same names and shapes go through the same ops, if their `kind` is
   * the same: it says whatever else the ops depend on, such as settings that may change during a run.
   */
  stepInputs?(): { readonly arrays: HostInputs; readonly kind?: string }
  /** As `TrainableModel.loss`. `inputs` are those of batch and step together. `carried` is added up over the micro-batches of a step and handed to `after`. */
  loss(inputs: DeviceInputs): Omit<LossOutput, 'count'> & { readonly carried: readonly Tensor[] }
  /** For `after`. */
  afterInputs(): HostInputs
  /** What `afterStep` does on the device: it assigns to buffers of the model. */
  after(inputs: DeviceInputs, carried: readonly Tensor[]): void
  /** What `afterStep` does on the host, and the numbers that it resolves to. */
  report(carried: ReadonlyArray<Float32Array | Int32Array>): Promise<Record<string, number>>
}

/** What the experts of a layer were given in a step, all micro-batches and ranks. */
export interface LayerLoad {
  /** Name of the layer. */
  readonly name: string
  /** Choices of each expert `[E]`, before any is dropped. */
  readonly load: ArrayLike<number>
  /** How many of these choices were dropped, where the layer drops. */
  readonly dropped?: number | undefined
  /** Groups of neighbouring experts. Default 1. */
  readonly groups?: number | undefined
  /** Selection bias `[E]` after the step, on the device: it is read when loads are told. */
  readonly bias?: Tensor | undefined
}

/** A model that `train` and `evaluate` can run. */
export interface TrainableModel extends Module {
  /** Tokens that a row needs beyond the positions that are trained on: 1, and one more for every MTP module. */
  readonly lookahead: number
  /** Number of token ids that it has embeddings for. Given, the data is checked against it. */
  readonly vocabSize?: number
  /** Whether it keeps texts apart that share a row, by `TokenBatch.starts`. Default false. */
  readonly isolates?: boolean
  /**
   * Optimizer steps done, in a model that has schedules or draws of its own: `afterStep` counts. It is kept in
   * checkpoints and set by a run that goes on from one.
   */
  step?: number
  /**
   * What decides its numbers beside weights and step. A run goes on only with the same. Functions are schedules, of the step to a number: the same are those that
   * give the same numbers over the run.
   */
  readonly settings?: Readonly<Record<string, unknown>>
  /** Synchronous: reads nothing back from the device. */
  loss(batch: TokenBatch, options?: LossOptions): LossOutput
  /**
   * Called once per optimizer step, after it and after all micro-batches (the bias update of load balancing belongs
   * here). Returns numbers to log, `maxVio` among them for a model with experts.
   * @param sum makes counts of this rank (loads of experts) those of all; given where several ranks train the model
   */
  afterStep?(sum?: (counts: readonly Tensor[]) => Promise<Tensor[]>): Promise<Record<string, number>>
  /** Of the step that `afterStep` (or `staged.report`) has ended: for `loads.jsonl`. Empty or missing in a model without experts. */
  readonly layerLoads?: readonly LayerLoad[]
  /** The same in parts that can be recorded. Without it, every step runs op by op. */
  readonly staged?: StagedStep | undefined
  /** Ids at which it ends a text that it generates. Where those are not what the texts of the data end with, a run gives notice. */
  readonly endTokens?: readonly number[]
  /** Folder that its weights came from: where adapters are trained, checkpoints name it as their base. */
  readonly source?: string
  /**
   * Writes `config.json` and `model.safetensors` into a folder that exists, every parameter and buffer in the dtype
   * that it has in memory, under its `stateDict` key. Without it, the trainer writes the state dict itself. The folder is a handle where `out` is one.
   */
  save?(folder: FolderPlace): Promise<void>
}

/** The part of a tokenizer that the trainer uses; `BpeTokenizer` of `@moe/tokenizer-bpe` is one. */
export interface TextTokenizer {
  /** Ids of a text. It is called with `addSpecialTokens` and `parseSpecialTokens` false: what documents say are no special tokens. */
  encode(text: string, options?: { addSpecialTokens?: boolean; parseSpecialTokens?: boolean }): ArrayLike<number>
  /** Ids of many texts, on so many `threads`: `tokenize` of `@moe/trainer/tokenize` calls it in place of `encode`, likewise with `addSpecialTokens` and `parseSpecialTokens` false. */
  encodeBatch?(
    texts: readonly string[],
    options?: { addSpecialTokens?: boolean; parseSpecialTokens?: boolean; threads?: number },
  ): Promise<readonly ArrayLike<number>[]>
  /** Ids are 0 .. vocabSize-1. */
  readonly vocabSize?: number
  /** Asked for the usual names of the tokens that begin and end a document, unless their ids are given. */
  tokenToId?(token: string): number | undefined
  /** The inverse: checkpoints name these tokens in `tokenizer_config.json`. */
  idToToken?(id: number): string | undefined
  /** Text of ids. It is called with `skipSpecialTokens`, of what a model has made. */
  decode?(ids: Iterable<number>, options?: { skipSpecialTokens?: boolean }): string
  /** Content of `tokenizer.json`, stored beside the model in every checkpoint. */
  toJSON?(): unknown
}
