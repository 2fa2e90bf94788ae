/**
 * @file The training loss of one micro-batch. Its parts can run one after another, for pipeline and expert parallelism: decoder layers (the first with the embedding), the final norm with the head, and MTP modules. Each
 * returns `[B, T, D]` for the next and adds its terms here.
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
  inputs(rows: TokenRows, options: PassOptions): { readonly arrays: HostInputs; readonly count: number }
  readonly objective: Objective
  /** Whether balance losses come from a balancer, which already includes their factors. */
  readonly balancer: boolean
}

/** Whether a pass is for training, and where its loss begins: as the options of `DeepSeek.loss`. */
export interface PassOptions {
  /** False for an evaluation. Default true. */
  readonly training?: boolean | undefined
  /** Positions before this one carry no loss. Default 0. */
  readonly from?: number | undefined
}

/** What a term of the loss is: of the next token, or a mean over MTP depths, or a sum over layers. */
type TermName = 'nll' | 'mtp' | 'balance' | 'indexer'

/** A scalar that one part adds to the loss. */
export interface LossTerm {
  readonly name: TermName
  /** The loss before its weight. */
  readonly loss: Tensor
}

interface LossPartsOptions extends Pick<LayerOptions, 'onLoad'> {
  /** False for an evaluation, which has only the loss of the next token and does not count loads. Default true. */
  readonly training?: boolean
  /** Factor of the loss and the metrics. Default 1. */
  readonly share?: number
}

export class LossParts {
  /** Terms of the parts that have run. */
  readonly terms: LossTerm[] = []
  /** The negative log-likelihood of each position, `[B T]`, detached; set when the head has run. */
  nlls?: Tensor
  /** Their sum. */
  nll?: Tensor
  /** The keys that the latest indexer has selected, for the layers after it that share it. */
  selected?: Tensor
  readonly #model: Network
  readonly #inputs: LossTensors
  readonly #objective: Objective
  readonly #balancer: boolean
  readonly #training: boolean
  readonly #share: number
  readonly #onLoad: LayerOptions['onLoad']
  readonly #optionsAt: LayerOptions[] = []

  constructor(
    model: Network,
    inputs: LossTensors,
    source: Omit<LossSource, 'inputs'>,
    { training = true, share = 1, onLoad }: LossPartsOptions = {},
  ) {
    this.#model = model
    this.#inputs = inputs
    this.#objective = source.objective
    this.#balancer = source.balancer
    this.#training = training
    this.#share = share
    this.#onLoad = onLoad
  }

  /** Token weights do not apply to MTP modules, which then give no gradient to the main model. */
  get #detached(): boolean {
    return this.#objective.mtpDetached || this.#inputs.weights !== undefined
  }

  get #time(): number {
    return this.#inputs.tokens.shape[1] - this.#model.lookahead
  }

  /** Runs all parts. Returns the hidden states of the main model after its final norm. */
  runAll(): Tensor {
    const { decoder, mtp } = this.#model
    const hidden = this.#model.hidden(idsAhead(this.#inputs, this.#time, 0), this.optionsAt(0))
    this.#predict(hidden)
    if (this.#training) mtp.reduce((x, _, k) => this.run(decoder.length + 1 + k, x), hidden)
    return hidden
  }

  /** Runs a part on the output of the previous one. */
  run(part: number, x: Tensor): Tensor {
    const { decoder, mtp } = this.#model
    const depth = part - decoder.length
    if (depth < 0) return decoder[part].forward(x, this.decoderOptions())
    if (depth === 0) return this.next(x)
    return this.further(depth, blockOf(mtp[depth - 1]).forward(this.combine(depth, x), this.optionsAt(depth)))
  }

  embed(): Tensor {
    return this.#model.model.embed_tokens.forward(idsAhead(this.#inputs, this.#time, 0))
  }

  /** Options of the next decoder layer, if layers run one by one. */
  decoderOptions(): LayerOptions {
    const onSelected = (keys: Tensor) => {
      this.selected = keys
    }
    return { ...this.optionsAt(0), selected: this.selected, onSelected }
  }

  /** Options of all decoder layers (depth 0), or of the block of an MTP module. */
  optionsAt(depth: number): LayerOptions {
    this.#optionsAt[depth] ??= this.#makeOptions(maskAt(this.#inputs, depth))
    return this.#optionsAt[depth]
  }

  #makeOptions(mask: Tensor | undefined): LayerOptions {
    const { starts, undropped } = this.#inputs
    if (!this.#training) return { starts, mask }
    const onIndexerLoss = (losses: Tensor) => this.#add('indexer', meanOverTokens(losses, mask))
    const onBalance = (loss: Tensor) => this.#add('balance', loss)
    return {
      training: this.#onLoad === undefined,
      onLoad: this.#onLoad,
      starts,
      undropped,
      mask,
      dense: this.#objective.indexerWarmup,
      ...(trainsIndexers(this.#model.config, this.#objective) && { onIndexerLoss }),
      ...(this.#balancer ? { onBalancerLoss: onBalance } : { onBalanceLoss: onBalance }),
    }
  }

  /** Runs the part after the last layer: norm, head and next-token loss. */
  next(x: Tensor): Tensor {
    const hidden = this.#model.model.norm.forward(x)
    this.#predict(hidden)
    return hidden
  }

  #predict(hidden: Tensor): void {
    const { lm_head, config } = this.#model
    const flat = hidden.reshape([hidden.size / config.hidden_size, config.hidden_size])
    const nlls = linearCrossEntropy(flat, denseWeight(lm_head.weight), targetsAt(this.#inputs, 0))
    const nll = nlls.sum()
    const { weights } = this.#inputs
    this.#add('nll', (weights ? nlls.mul(weights).sum() : nll).mul(inverseCountAt(this.#inputs, 0)))
    this.nlls = nlls.detach()
    this.nll = nll.detach()
  }

  /** Computes the input of an MTP module's block. `before` is the output of `next` or of the previous module. */
  combine(depth: number, before: Tensor): Tensor {
    const detached = this.#detached
    const from = detached && depth === 1 ? before.detach() : before
    return this.#moduleAt(depth).combine(from, idsAhead(this.#inputs, this.#time, depth), { detached })
  }

  /** Runs what follows the block of an MTP module: norm, head and loss. */
  further(depth: number, x: Tensor): Tensor {
    const module = this.#moduleAt(depth)
    const hidden = module.normalize(x)
    const head = denseWeight(this.#model.lm_head.weight)
    this.#add('mtp', mtpDepthLoss(module, depth, hidden, this.#inputs, head, { detached: this.#detached }))
    return hidden
  }

  /**
   * Adds up the terms: `loss`, undefined if there are none, and detached `metrics`: `nll` (mean over the positions that carry loss), `mtp` (mean over depths), and `balance` and `indexer` (means over layers, as in
   * `DeepSeekLoss`). A pipeline stage has its part of these means.
   */
  sum(): { readonly loss: Tensor | undefined; readonly metrics: Record<string, Tensor> } {
    const { mtp, moeLayers, indexedLayers } = this.#model
    const metrics: Record<string, Tensor> = {}
    const shared = (x: Tensor) => (this.#share === 1 ? x : x.mul(this.#share))
    const sumOf = (name: TermName) => total(this.terms.filter(term => term.name === name).map(({ loss }) => loss))
    const weighted = (name: Exclude<TermName, 'nll'>, count: number) => {
      const sum = sumOf(name)
      if (sum === undefined) return []
      const mean = sum.mul(1 / count)
      metrics[name] = shared(mean.detach())
      if (name === 'balance' && this.#balancer) return [sum]
      return [(name === 'mtp' ? mean : sum).mul(factorAt(this.#inputs, name))]
    }
    if (this.nll) metrics.nll = shared(this.nll.mul(inverseCountAt(this.#inputs, 0)))
    const nll = sumOf('nll')
    const losses = [
      ...(nll ? [nll] : []),
      ...weighted('mtp', mtp.length),
      ...weighted('balance', moeLayers.length),
      ...weighted('indexer', indexedLayers.length),
    ]
    const loss = total(losses)
    return { loss: loss && shared(loss), metrics }
  }

  #moduleAt(depth: number): MtpModule<LayerOptions> {
    return this.#model.mtp[depth - 1]
  }

  #add(name: TermName, loss: Tensor): void {
    this.terms.push({ name, loss })
  }
}

const total = (losses: readonly Tensor[]): Tensor | undefined =>
  losses.length === 0 ? undefined : losses.reduce((sum, loss) => sum.add(loss))
