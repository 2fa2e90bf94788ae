/** @file Notices when the weights of a model change, which invalidates caches and recorded passes. */
import { type Module, namedParameters, type Parameter } from '@moe/core'

/** Compares the parameters of a model, including those of adapters, with those at the previous call. */
export class WeightWatch {
  readonly #model: Module
  #known: ReadonlyArray<{ readonly parameter: Parameter; readonly version: number }> | null = null

  constructor(model: Module) {
    this.#model = model
  }

  /** Whether a weight has changed since the last call; true at the first one. */
  changed(): boolean {
    if (this.#known?.every(({ parameter, version }) => parameter.version === version)) return false
    // Listed again, because adapters may have been added, or weights replaced by quantized ones: both change versions.
    this.#known = namedParameters(this.#model).map(({ parameter }) => ({ parameter, version: parameter.version }))
    return true
  }
}
