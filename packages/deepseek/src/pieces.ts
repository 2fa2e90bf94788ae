/**
 * @file The training loss in pieces, between which a rank may wait for others: the routed experts lie elsewhere.
 *
 * Legend: B batch, T time, N tokens, K choices of a token, D hidden size.
 */
import type { Tensor } from '@moe/core'
import type { TokenRows } from '@moe/mtp'
import { type Choice, MoELayer } from '@moe/router'
import type { DecoderLayer } from './decoder-layer.ts'
import { blockOf, LossParts, type LossSource } from './loss-parts.ts'
import type { DeepSeek } from './model.ts'
import { uploadInputs } from './training-loss.ts'

/** What runs pieces; a `PiecewisePass` of `@moe/parallel` does. */
export interface PieceRunner {
  /** Ops on results of other pieces; what it gives are leaves for later ones. */
  piece(inputs: readonly Tensor[], fn: (...inputs: Tensor[]) => readonly Tensor[]): Tensor[]
  /** What needs no gradient, and lives as long as the pass. */
  run<T>(fn: () => T): T
}

/** What the routed experts of `model.moeLayers[layer]` make of tokens, `[N, D]`: leaves to a leaf. */
export type RouteElsewhere = (layer: number, tokens: Pick<Choice, 'x' | 'weights' | 'indices'>) => Promise<Tensor>

/** The training loss of a micro-batch in pieces: `DeepSeek.inPieces`. */
export class DeepSeekPieces {
  /** Positions that carry loss. */
  readonly count: number
  readonly #model: DeepSeek
  readonly #source: LossSource
  readonly #arrays: ReturnType<LossSource['inputs']>['arrays']

  constructor(model: DeepSeek, rows: TokenRows, source: LossSource) {
    const { arrays, count } = source.inputs(rows)
    this.count = count
    this.#model = model
    this.#source = source
    this.#arrays = arrays
  }

  /** The forward pass. Resolves to the loss, a leaf, and to `nll`, `mtp` and `balance`, detached. All scalars, means over the micro-batch. */
  async forward(
    pass: PieceRunner,
    route: RouteElsewhere,
  ): Promise<{ loss: Tensor; metrics: Readonly<Record<string, Tensor>> }> {
    const { backend, decoder, mtp, moeLayers } = this.#model
    const parts = new LossParts(
      this.#model,
      pass.run(() => uploadInputs(this.#arrays, backend)),
      this.#source,
    )
    const losses: Tensor[] = []
    const piece = (inputs: readonly Tensor[], fn: (...inputs: Tensor[]) => readonly Tensor[]) => {
      let own = 0
      const made = pass.piece(inputs, (...leaves) => {
        const outputs = fn(...leaves)
        own = outputs.length
        return [...outputs, ...parts.losses.splice(0)]
      })
      losses.push(...made.slice(own))
      return made.slice(0, own)
    }
    const block = async (layer: DecoderLayer, input: Tensor, depth: number): Promise<Tensor> => {
      const options = pass.run(() => parts.optionsAt(depth))
      const { mlp } = layer
      if (!(mlp instanceof MoELayer)) return piece([input], x => [layer.forward(x, options)])[0]
      let indices!: Tensor
      const [attended, x, weights, ...shared] = piece([input], before => {
        const after = layer.attend(before, options)
        const choice = mlp.choose(layer.post_attention_layernorm.forward(after), options)
        indices = choice.indices
        return [after, choice.x, choice.weights, ...(mlp.shared_experts ? [mlp.shared_experts.forward(choice.x)] : [])]
      })
      const routed = await route(moeLayers.indexOf(mlp), { x, weights, indices })
      return piece([attended, routed, ...shared], (residual, ...outs) => [
        residual.add(outs.reduce((sum, out) => sum.add(out)).reshape(residual.shape)),
      ])[0]
    }
    let [x] = piece([], () => [parts.embed()])
    for (const layer of decoder) x = await block(layer, x, 0)
    ;[x] = piece([x], hidden => [parts.next(hidden)])
    for (const [k, module] of mtp.entries()) {
      const depth = k + 1
      const [combined] = piece([x], before => [parts.combine(depth, before)])
      const deep = await block(blockOf(module), combined, depth)
      ;[x] = piece([deep], hidden => [parts.further(depth, hidden)])
    }
    const [loss] = pass.piece(losses, (...all) => [all.reduce((sum, part) => sum.add(part))])
    return { loss, metrics: parts.metrics }
  }
}
