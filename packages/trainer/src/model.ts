/** @file The interfaces of a trainable model and of a tokenizer. */
import type { FolderLocation } from '@moe/checkpoint'
import type { Module, Shape, Tensor } from '@moe/core'

/** A micro-batch: rows of consecutive tokens, on the host. */
export interface TokenBatch {
  /** Token ids `[rows, length]`, row-major. */
  readonly tokens: Int32Array
  /**
   * `[rows, length]`: the number of the document (or of a learned part of one) that each token belongs to. A position
   * counts in the loss only if the token that it predicts has the same number. Padding has negative numbers and does
   * not count.
   */
  readonly documents: Int32Array
  /**
   * `[rows, length]`, if several documents share a row without seeing each other: the position in the row at which each
   * token's document begins. Passed only to models that declare `isolates`.
   */
  readonly starts?: Int32Array
  /**
   * `[rows, length]`: multiplier of each token's negative log-likelihood in `loss` (not in `nll`). Rollouts and
   * preferences use it to learn some texts more than others, and to unlearn some. Requires a model that returns `nlls`.
   */
  readonly weights?: Float32Array
  /** Number of rows. */
  readonly rows: number
  /** Tokens per row: the trained positions plus the model's `lookahead`. */
  readonly length: number
}

/** Options of `TrainableModel.loss`. */
export interface LossOptions {
  /** Whether the pass is for training (auxiliary losses, load counters) or for evaluation. Default true. */
  readonly training?: boolean | undefined
  /** Positions before this one are only context and do not count in the loss (strided evaluation). Default 0. */
  readonly from?: number | undefined
}

/** The loss of a batch, and values to log. */
export interface LossOutput {
  /** The scalar to minimize: the mean over counted positions, plus auxiliary terms. */
  readonly loss: Tensor
  /** Sum of the next-token negative log-likelihoods over counted positions, in nats. A detached scalar. */
  readonly nll: Tensor
  /** Number of counted positions. It depends only on the batch. */
  readonly count: number
  /**
   * The negative log-likelihood of each position, `[rows * positions]`, detached; 0 for positions that do not count.
   * Only from models that apply `TokenBatch.weights`.
   */
  readonly nlls?: Tensor
  /** Detached scalars to log, such as MTP and load-balancing losses. */
  readonly metrics: Readonly<Record<string, Tensor>>
}

/** Named arrays that a step takes from the host. Floats are uploaded as f32, integers as i32. */
export type HostInputs = Readonly<Record<string, { readonly data: Float32Array | Int32Array; readonly shape: Shape }>>

/** `HostInputs` after the upload. */
export type DeviceInputs = Readonly<Record<string, Tensor>>

/**
 * `loss` (in training) and `afterStep`, each split into what the host contributes and the ops that run on it. On
 * backends that record (`Backend.capture`), the ops run in JavaScript once, and later steps replay them with other
 * inputs. The ops may therefore depend only on the inputs, on parameters, and on the shapes of both. Random numbers
 * must be inputs.
 */
export interface StagedStep {
  /** Inputs of `loss` that depend only on the batch. They are prepared while the device computes the previous step. */
  inputs(batch: TokenBatch): { readonly arrays: HostInputs; readonly count: number }
  /**
   * Inputs of `loss` that depend on the step and are the same for all its micro-batches, such as schedules. Arrays with
   * the same names and shapes are replayed through the same ops if `kind` is equal too: it identifies everything else
   * that the ops depend on, such as settings that may change during a run.
   */
  stepInputs?(): { readonly arrays: HostInputs; readonly kind?: string }
  /**
   * Like `TrainableModel.loss`. `inputs` contains the inputs of batch and step. `carried` is summed over the
   * micro-batches of a step and passed to `after`.
   */
  loss(inputs: DeviceInputs): Omit<LossOutput, 'count'> & { readonly carried: readonly Tensor[] }
  /** Inputs of `after`. */
  afterInputs(): HostInputs
  /** The part of `afterStep` that runs on the device: it assigns to buffers of the model. */
  after(inputs: DeviceInputs, carried: readonly Tensor[]): void
  /** The part of `afterStep` that runs on the host. Resolves to numbers to log. */
  report(carried: ReadonlyArray<Float32Array | Int32Array>): Promise<Record<string, number>>
}

/** The load of a layer's experts in one step, over all micro-batches and ranks. */
export interface LayerLoad {
  /** Name of the layer. */
  readonly name: string
  /** Tokens routed to each expert `[E]`, before any are dropped. */
  readonly load: ArrayLike<number>
  /** How many of these were dropped, if the layer drops tokens. */
  readonly dropped?: number | undefined
  /** Number of expert groups (of consecutive experts). Default 1. */
  readonly groups?: number | undefined
  /** Selection bias `[E]` after the step, on the device. It is read when loads are reported. */
  readonly bias?: Tensor | undefined
}

/** A model that `train` and `evaluate` can run. */
export interface TrainableModel extends Module {
  /** Tokens that a row needs beyond the trained positions: 1, plus one for every MTP module. */
  readonly lookahead: number
  /** Number of token ids that the model has embeddings for. If given, the data is checked against it. */
  readonly vocabSize?: number
  /** Number of positions that the model is made for. A notice is shown if rows are longer. */
  readonly contextLength?: number
  /** Whether attention keeps documents that share a row apart, by `TokenBatch.starts`. Default false. */
  readonly isolates?: boolean
  /**
   * Number of optimizer steps done, for models with their own schedules or random numbers; `afterStep` increments it.
   * Checkpoints store it, and a resumed run sets it.
   */
  step?: number
  /**
   * Settings that affect the model's outputs, besides weights and step. A run resumes only with the same settings.
   * Functions must be schedules (from a step to a number); two are equal if they return the same numbers over the run.
   */
  readonly settings?: Readonly<Record<string, unknown>>
  /** Computes the loss of a batch. Must be synchronous, and must not read anything back from the device. */
  loss(batch: TokenBatch, options?: LossOptions): LossOutput
  /**
   * Called and awaited once after each optimizer step, whatever the number of micro-batches, for example to update the
   * balance bias. Returns numbers to log; models with experts include `maxVio`.
   *
   * @param sum sums counts, such as expert loads, over all ranks; given if several ranks train the model
   */
  afterStep?(sum?: (counts: readonly Tensor[]) => Promise<Tensor[]>): Promise<Record<string, number>>
  /**
   * Expert loads of the latest step, after `afterStep` (or `staged.report`), for `loads.jsonl`. Empty or missing in a
   * model without experts.
   */
  readonly layerLoads?: readonly LayerLoad[]
  /** `loss` and `afterStep` in parts that can be recorded. Without it, every step runs op by op. */
  readonly staged?: StagedStep | undefined
  /**
   * Ids of the tokens that end a generated text. If the training texts end with another token, the run emits a notice.
   */
  readonly endTokens?: readonly number[]
  /** Folder that the weights were loaded from. Checkpoints of adapters name it as their base model. */
  readonly source?: string
  /**
   * Writes `config.json` and `model.safetensors` into an existing folder, with every parameter and buffer under its
   * `stateDict` key, in its in-memory dtype. Without this method, the trainer writes the state dict. The folder is a
   * directory handle if `out` is one.
   */
  save?(folder: FolderLocation): Promise<void>
}

/** The tokenizer methods that the trainer uses. `BpeTokenizer` of `@moe/tokenizer-bpe` implements them. */
export interface TextTokenizer {
  /**
   * Returns the ids of a text. For documents, it is called with `addSpecialTokens` and `parseSpecialTokens` false, so
   * that text that spells a special token stays text.
   */
  encode(text: string, options?: { addSpecialTokens?: boolean; parseSpecialTokens?: boolean }): ArrayLike<number>
  /**
   * Returns the ids of many texts, encoded on the given number of `threads`. `tokenize` of `@moe/trainer/tokenize` uses
   * it instead of `encode`, likewise with `addSpecialTokens` and `parseSpecialTokens` false.
   */
  encodeBatch?(
    texts: readonly string[],
    options?: { addSpecialTokens?: boolean; parseSpecialTokens?: boolean; threads?: number },
  ): Promise<readonly ArrayLike<number>[]>
  /** Number of ids: they are 0 to vocabSize - 1. */
  readonly vocabSize?: number
  /** Returns the id of a token. Used to find the tokens that begin and end a document, unless their ids are given. */
  tokenToId?(token: string): number | undefined
  /** Returns the token of an id. Checkpoints name begin and end tokens in `tokenizer_config.json`. */
  idToToken?(id: number): string | undefined
  /** Returns the text of ids. Called with `skipSpecialTokens` for text that the model generated. */
  decode?(ids: Iterable<number>, options?: { skipSpecialTokens?: boolean }): string
  /** Returns the content of `tokenizer.json`, which every checkpoint stores next to the model. */
  toJSON?(): unknown
}
