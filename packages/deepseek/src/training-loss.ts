/** @file Results and host inputs of the training loss. The inputs are separate from its ops, which are the same for every batch of the same shape. */
import { type Backend, type Shape, type Tensor, tensor } from '@moe/core'
import { type DepthTensors, depthTargets, inverseCountsOf, type TokenRows } from '@moe/mtp'
import type { DeepSeekConfig } from './config.ts'
import type { Objective } from './options.ts'

/** Arrays to upload, by name. */
export type HostInputs = Readonly<Record<string, { readonly data: Float32Array | Int32Array; readonly shape: Shape }>>

/** The same inputs, uploaded to the device. */
export interface LossTensors extends DepthTensors {
  /** Weights of the MTP loss (λ), the balance loss (α) and the indexer loss, `f32 [3]`; in training only. */
  readonly factors?: Tensor
  /** 1 for tokens and 0 for padding, as seen by each depth, `f32 [depths + 1, B, T]`; only for batches with padding. */
  readonly mask?: Tensor
  /** Where the text of each position starts in its row, `i32 [B, T]`; only if several texts share a row. */
  readonly starts?: Tensor
  /** Weights of the main model's loss at each position, `f32 [B T]`; only for batches with token weights. */
  readonly weights?: Tensor
  /** 1 for sequences that lose no token to dropping, `f32 [B]`. */
  readonly undropped?: Tensor
}

/** The training loss of a batch, and metrics. */
export interface DeepSeekLoss {
  /** Scalar to minimize. */
  readonly loss: Tensor
  /** Sum of the next-token negative log-likelihoods in nats, detached. */
  readonly nll: Tensor
  /** Number of positions in that sum. */
  readonly count: number
  /** The negative log-likelihood of each position, `[B T]`, detached; 0 for positions that carry no loss. */
  readonly nlls: Tensor
  /**
   * Detached scalars: `mtp` (mean over depths), `balance` (mean over layers, without α; with a balancer including its factors), `indexer` (mean over layers and positions) and, with `mtpAcceptance`, `acceptance1` and so on: the share of drafts accepted
   * at this depth and all shallower ones.
   */
  readonly metrics: Readonly<Record<string, Tensor>>
}

/** `loss` and `afterStep`, each split into host inputs and ops: see `DeepSeek.staged`. Inputs of the same names, shapes and `kind` use the same ops. */
export interface StagedDeepSeek {
  inputs(rows: TokenRows): { readonly arrays: HostInputs; readonly count: number }
  stepInputs(): { readonly arrays: HostInputs; readonly kind: string }
  /** `carried` are the loads of all layers; sum them over the micro-batches of a step and pass them to `after`. */
  loss(inputs: Readonly<Record<string, Tensor>>): Omit<DeepSeekLoss, 'count'> & { readonly carried: readonly Tensor[] }
  afterInputs(): HostInputs
  after(inputs: Readonly<Record<string, Tensor>>, carried: readonly Tensor[]): void
  /** Ends the step. Resolves to the same as `afterStep`. */
  report(carried: ReadonlyArray<Float32Array | Int32Array>): Promise<Record<string, number>>
}

export function lossInputs(
  rows: TokenRows,
  time: number,
  depths: number,
  options: { from: number; undropped?: Float32Array },
): { arrays: HostInputs; count: number } {
  const { from, undropped } = options
  const { rows: batch, length, documents, starts, weights } = rows
  const host = depthTargets(rows, time, depths, { from })
  const arrays: Record<string, HostInputs[string]> = {
    tokens: { data: host.tokens, shape: [batch, length] },
    targets: { data: host.targets, shape: [depths + 1, batch * time] },
    inverseCounts: { data: inverseCountsOf(host), shape: [depths + 1] },
  }
  if (starts) {
    const data = new Int32Array(batch * time)
    for (let row = 0; row < batch; row++) data.set(starts.subarray(row * length, row * length + time), row * time)
    arrays.starts = { data, shape: [batch, time] }
  }
  if (weights) {
    const data = new Float32Array(batch * time)
    // A position has the weight of the token that it predicts.
    for (let row = 0; row < batch; row++)
      data.set(weights.subarray(row * length + 1, row * length + 1 + time), row * time)
    arrays.weights = { data, shape: [batch * time] }
  }
  if (undropped) arrays.undropped = { data: undropped, shape: [batch] }
  if (documents.some(document => document < 0)) {
    const data = new Float32Array((depths + 1) * batch * time)
    for (let i = 0; i < data.length; i++) {
      const depth = Math.floor(i / (batch * time))
      const row = Math.floor(i / time) % batch
      data[i] = documents[row * length + (i % time) + depth] < 0 ? 0 : 1
    }
    arrays.mask = { data, shape: [depths + 1, batch, time] }
  }
  return { arrays, count: host.counts[0] }
}

export function uploadInputs(arrays: HostInputs, backend: Backend): LossTensors {
  const upload = ({ data, shape }: HostInputs[string]) => tensor(data, shape, { backend })
  return Object.fromEntries(
    Object.entries(arrays).map(([name, array]) => [name, upload(array)]),
  ) as unknown as LossTensors
}

/** Returns the mask `[B, T]` of a depth. */
export function maskAt({ mask }: LossTensors, depth: number): Tensor | undefined {
  return mask?.narrow(0, depth, depth + 1).reshape(mask.shape.slice(1))
}

/** The losses with a weight, in the order of `factors`. */
const weighted = ['mtp', 'balance', 'indexer'] as const

/** Returns the weight of a loss as a scalar. */
export function factorAt({ factors }: LossTensors, of: (typeof weighted)[number]): Tensor {
  const at = weighted.indexOf(of)
  return (factors as Tensor).narrow(0, at, at + 1).reshape([])
}

/** Whether training computes the losses of the indexers. */
export const trainsIndexers = (config: DeepSeekConfig, { indexerWeight }: Objective): boolean =>
  config.index_topk !== null && indexerWeight !== 0

/** Returns the mean of an indexer's losses `[B, T]` over the tokens of the mask, which excludes padding. */
export function meanOverTokens(losses: Tensor, mask: Tensor | undefined): Tensor {
  return mask === undefined ? losses.mean() : losses.mul(mask).sum().div(mask.sum().maximum(1))
}

/** Returns an FNV-1a digest, computed over numbers instead of bytes. */
export function digestOf(arrays: ReadonlyArray<ArrayLike<number>>): number {
  let digest = 0x811c9dc5 | 0
  for (const numbers of arrays)
    for (let i = 0; i < numbers.length; i++) digest = Math.imul(digest ^ numbers[i], 0x01000193)
  return digest
}
