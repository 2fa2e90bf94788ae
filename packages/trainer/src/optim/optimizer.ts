/** @file What the trainer asks of an optimizer. */
import type { StateEntry, StateSource, Tensor } from '@moe/core'

export interface Optimizer {
  /** Short name, stored in checkpoints so that the state of another one is not taken for its own. */
  readonly name: string
  /** The numbers that it was made with, stored in checkpoints. */
  readonly settings: Readonly<Record<string, unknown>>
  /** Changes every parameter that has a gradient. `gradScale []` multiplies the gradients. */
  step(lr: number, gradScale: Tensor): void
  /** State beside the parameters, under names of its own. */
  entries(): StateEntry[]
  /**
   * Takes over stored state after `steps` steps. Nothing is changed unless every entry fits.
   * @throws MoeError E_STATE_DICT
   */
  load(source: StateSource, steps: number): Promise<void>
  /** Frees the state. */
  dispose(): void
}
