/**
 * @file The training loss of one micro-batch, part by part, for pipeline and expert parallelism. Parts are decoder layers (the first with the embedding), the final norm with the head, and MTP modules. Each
 * returns `[B, T, D]` for the next and adds its losses here.
 *
 * Legend: B batch, T time, D hidden size.
 */
import { denseWeight, linearCrossEntropy, type Tensor } from '@moe/core'
import { idsAhead, inverseCountAt, type MtpModule, mtpDepthLoss, type TokenRows, targetsAt } from '@moe/mtp'
import type { LayerOptions } from './decoder-layer.ts'
import { blockOf, type Network } from './network.ts'
import type { Objective } from './options.ts'
import { factorAt, type HostInputs, type LossTensors, maskAt, meanOverTokens, trainsIndexers } from './training-loss.ts'

/** What the model contributes besides its parts. */
export interface LossSource {
  /** Returns the host arrays of a micro-batch and its number of positions that carry loss. */
  inputs(rows: TokenRows): { readonly arrays: HostInputs; readonly count: number }
  readonly objective: Objective
  /** Whether balance losses come from a balancer, which already includes their factors. */
  readonly balancer: boolean
}

export class LossParts {
  /** Scalars whose sum is the loss. */
  readonly losses: Tensor[] = []
  /** Detached scalars of the parts that have run: `nll` (mean over the positions that carry loss), `mtp` (mean over depths), and `balance` and `indexer` (means over layers, as in `DeepSeekLoss`). */
  readonly metrics: Record<string, Tensor> = {}
  readonly #model: Network
  readonly #inputs: LossTensors
  readonly #objective: Objective
  readonly #balancer: boolean
  readonly #share: number
  readonly #layers: number

  /** @param share factor of all losses and metrics */
  constructor(model: Network, inputs: LossTensors, source: Omit<LossSource, 'inputs'>, share = 1) {
    this.#model = model
    this.#inputs = inputs
    this.#objective = source.objective
    this.#balancer = source.balancer
    this.#share = share
    this.#layers = model.moeLayers.length
  }

  /** Token weights do not apply to MTP modules, which then give no gradient to the main model. */
  get #detached(): boolean {
    return this.#objective.mtpDetached || this.#inputs.weights !== undefined
  }

  get #time(): number {
    return this.#inputs.tokens.shape[1] - this.#model.lookahead
  }

  /** Runs a part on the output of the previous one. */
  run(part: number, x: Tensor): Tensor {
    const { decoder, mtp } = this.#model
    const depth = part - decoder.length
    if (depth < 0) return decoder[part].forward(x, this.optionsAt(0))
    if (depth === 0) return this.next(x)
    return this.further(depth, blockOf(mtp[depth - 1]).forward(this.combine(depth, x), this.optionsAt(depth)))
  }

  embed(): Tensor {
    return this.#model.model.embed_tokens.forward(idsAhead(this.#inputs, this.#time, 0))
  }

  /** Options of decoder layers (depth 0) and of the blocks of MTP modules. */
  optionsAt(depth: number): LayerOptions {
    const mask = maskAt(this.#inputs, depth)
    const { config, blocks } = this.#model
    const onIndexerLoss = (losses: Tensor) => {
      const loss = meanOverTokens(losses, mask)
      this.#add('indexer', loss.mul(factorAt(this.#inputs, 'indexer')), loss, 1 / blocks.length)
    }
    const balance = (loss: Tensor) => {
      this.#add('balance', this.#balancer ? loss : loss.mul(factorAt(this.#inputs, 'balance')), loss, 1 / this.#layers)
    }
    return {
      training: true,
      starts: this.#inputs.starts,
      undropped: this.#inputs.undropped,
      mask,
      dense: this.#objective.indexerWarmup,
      ...(trainsIndexers(config, this.#objective) && { onIndexerLoss }),
      ...(this.#balancer ? { onBalancerLoss: balance } : { onBalanceLoss: balance }),
    }
  }

  /** Runs the part after the last layer: norm, head and next-token loss. */
  next(x: Tensor): Tensor {
    const { model, lm_head, config } = this.#model
    const hidden = model.norm.forward(x)
    const flat = hidden.reshape([hidden.size / config.hidden_size, config.hidden_size])
    const nlls = linearCrossEntropy(flat, denseWeight(lm_head.weight), targetsAt(this.#inputs, 0))
    const { weights } = this.#inputs
    const mean = (each: Tensor) => each.sum().mul(inverseCountAt(this.#inputs, 0))
    const nll = mean(nlls)
    this.#add('nll', weights ? mean(nlls.mul(weights)) : nll, nll, 1)
    return hidden
  }

  /** Computes the input of an MTP module's block. `before` is the output of `next` or of the previous module. */
  combine(depth: number, before: Tensor): Tensor {
    const detached = this.#detached
    const from = detached && depth === 1 ? before.detach() : before
    return this.#moduleAt(depth).combine(from, idsAhead(this.#inputs, this.#time, depth), { detached })
  }

  /** Runs what follows the block of an MTP module: norm, head and loss. */
  further(depth: number, x: Tensor): Tensor {
    const { lm_head, mtp } = this.#model
    const module = this.#moduleAt(depth)
    const hidden = module.normalize(x)
    const loss = mtpDepthLoss(module, depth, hidden, this.#inputs, denseWeight(lm_head.weight), {
      detached: this.#detached,
    })
    const part = 1 / mtp.length
    this.#add('mtp', loss.mul(factorAt(this.#inputs, 'mtp')).mul(part), loss, part)
    return hidden
  }

  #moduleAt(depth: number): MtpModule<LayerOptions> {
    return this.#model.mtp[depth - 1]
  }

  #add(name: string, loss: Tensor, measured: Tensor, part: number): void {
    this.losses.push(loss.mul(this.#share))
    const own = measured.detach().mul(part * this.#share)
    this.metrics[name] = this.metrics[name]?.add(own) ?? own
  }
}
