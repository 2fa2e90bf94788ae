/**
 * @file The loss in pieces, between which a rank can wait for others. The routed experts are computed elsewhere.
 */
import type { Tensor } from '@moe/core'
import type { TokenRows } from '@moe/mtp'
import type { DecoderLayer, LayerOptions } from './decoder-layer.ts'
import { layerInPieces } from './layer-in-pieces.ts'
import { LossParts, type LossSource, type PassOptions } from './loss-parts.ts'
import { blockOf, type Network } from './network.ts'
import type { PieceRunner, RouteTokens } from './remote-experts.ts'
import { uploadInputs } from './training-loss.ts'

/** Runs the parts of a loss in pieces. */
export class PartsInPieces {
  readonly #model: Network
  readonly #parts: LossParts
  readonly #pass: PieceRunner
  readonly #route: RouteTokens

  constructor(model: Network, parts: LossParts, pass: PieceRunner, route: RouteTokens) {
    this.#model = model
    this.#parts = parts
    this.#pass = pass
    this.#route = route
  }

  embed(): Tensor {
    return this.#piece([], () => [this.#parts.embed()])[0]
  }

  /** Runs a part on a leaf, as `LossParts.run`. Resolves to a leaf. */
  async run(part: number, x: Tensor): Promise<Tensor> {
    const { decoder, mtp } = this.#model
    const parts = this.#parts
    const depth = part - decoder.length
    if (depth < 0) return this.#block(decoder[part], x, () => parts.decoderOptions())
    if (depth === 0) return this.#piece([x], hidden => [parts.next(hidden)])[0]
    const [combined] = this.#piece([x], before => [parts.combine(depth, before)])
    const deep = await this.#block(blockOf(mtp[depth - 1]), combined, () => parts.optionsAt(depth))
    return this.#piece([deep], hidden => [parts.further(depth, hidden)])[0]
  }

  #block(layer: DecoderLayer, input: Tensor, optionsOf: () => LayerOptions): Promise<Tensor> {
    return layerInPieces(this.#model, layer, input, {
      options: this.#pass.run(optionsOf),
      piece: (inputs, fn) => this.#piece(inputs, fn),
      pass: this.#pass,
      route: this.#route,
    })
  }

  /** Adds up the loss, a leaf, and the metrics, as `LossParts.sum`. */
  sum(): ReturnType<LossParts['sum']> {
    const terms = this.#parts.terms.map(({ loss }) => loss)
    if (terms.length === 0) return this.#pass.run(() => this.#parts.sum())
    let metrics = {}
    const [loss] = this.#pass.piece(terms, () => {
      const sum = this.#parts.sum()
      metrics = sum.metrics
      return [sum.loss as Tensor]
    })
    return { loss, metrics }
  }

  /** Runs a piece. The terms that its parts add to the loss, `nll`, `nlls` and `selected` become leaves. */
  #piece(inputs: readonly Tensor[], fn: (...inputs: Tensor[]) => readonly Tensor[]): Tensor[] {
    const parts = this.#parts
    const { terms, nll, nlls, selected } = parts
    const before = terms.length
    let own = 0
    const changed = () =>
      (['nll', 'nlls', 'selected'] as const).filter(name => parts[name] !== { nll, nlls, selected }[name])
    const made = this.#pass.piece(inputs, (...leaves) => {
      const results = fn(...leaves)
      own = results.length
      const added = terms.slice(before).map(({ loss }) => loss)
      return [...results, ...added, ...changed().map(name => parts[name] as Tensor)]
    })
    const added = terms.splice(before)
    terms.push(...added.map(({ name }, i) => ({ name, loss: made[own + i] })))
    for (const [i, name] of changed().entries()) parts[name] = made[own + added.length + i]
    if (selected && parts.selected !== selected) this.#pass.release(selected)
    return made.slice(0, own)
  }
}

/** The loss of a micro-batch in pieces, returned by `DeepSeek.inPieces`. */
export class PiecewiseLoss {
  /** Number of positions that carry loss. */
  readonly count: number
  readonly #model: Network
  readonly #source: LossSource
  readonly #arrays: ReturnType<LossSource['inputs']>['arrays']
  readonly #training: boolean

  constructor(model: Network, rows: TokenRows, source: LossSource, { training = true, from }: PassOptions = {}) {
    const { arrays, count } = source.inputs(rows, { training, from })
    this.#training = training
    this.count = count
    this.#model = model
    this.#source = source
    this.#arrays = arrays
  }

  /**
   * Runs the forward pass. Resolves to the loss, a leaf, and detached metrics `nll`, `mtp`, `balance` and `indexer`. All are scalars, means over the micro-batch. `nlls` are the
   * negative log-likelihoods of the positions, `[B T]`, and `nll` is their sum, detached.
   */
  async forward(
    pass: PieceRunner,
    route: RouteTokens,
  ): Promise<{ loss: Tensor; nll: Tensor; nlls: Tensor; metrics: Readonly<Record<string, Tensor>> }> {
    const { backend, decoder, mtp } = this.#model
    const training = this.#training
    const inputs = pass.run(() => uploadInputs(this.#arrays, backend))
    const parts = new LossParts(this.#model, inputs, this.#source, { training })
    const inPieces = new PartsInPieces(this.#model, parts, pass, route)
    let x = inPieces.embed()
    for (let part = 0; part <= decoder.length + (training ? mtp.length : 0); part++) x = await inPieces.run(part, x)
    const { loss, metrics } = inPieces.sum()
    return { loss: loss as Tensor, nll: parts.nll as Tensor, nlls: parts.nlls as Tensor, metrics }
  }
}
