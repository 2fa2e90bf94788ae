/**
 * @file Passes whose routed experts may be on other ranks: what they need from `@moe/parallel`.
 *
 * Legend: N tokens, D hidden size.
 */
import type { Precision, Tensor } from '@moe/core'
import type { Choice } from '@moe/router'

/** Runs the pieces of a pass; implemented by `PiecewisePass` of `@moe/parallel`. */
export interface PieceRunner {
  /** Runs ops on results of other pieces. Returns leaves for later pieces. */
  piece(inputs: readonly Tensor[], fn: (...inputs: Tensor[]) => readonly Tensor[]): Tensor[]
  /** Runs code that needs no gradient. Its results live as long as the pass. */
  run<T>(fn: () => T): T
  /** Declares that no later piece reads these leaves, so that a pass without gradients can free them. */
  release(...leaves: readonly Tensor[]): void
}

/** Computes the routed experts of `model.moeLayers[layer]` for tokens, `[N, D]`: from leaves to a leaf. */
export type RouteTokens = (layer: number, tokens: Pick<Choice, 'x' | 'weights' | 'indices'>) => Promise<Tensor>

/** Runs forward passes whose routed experts are on other ranks. Implemented by `ExpertParallel` of `@moe/parallel`. */
export interface RemoteExperts {
  /** Runs a pass without gradients. Frees its tensors afterwards, except those that `fn` has passed to `keep`. */
  infer<T>(precision: Precision, fn: (pass: PieceRunner, route: RouteTokens) => Promise<T>): Promise<T>
}
