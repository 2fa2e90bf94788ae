/**
 * @file The routers before DeepSeekMoE, as baselines: GShard's top-2 (Lepikhin et al. 2020) and Switch's top-1 (Fedus et al. 2021), each with its
 * auxiliary loss and with a capacity per expert beyond which tokens are dropped in training; GShard also dispatches second experts at random.
 *
 * Legend: N tokens, E experts, K chosen.
 */
import {
  checkOptions,
  checkShared,
  concat,
  type DispatchPlan,
  dispatchPlan,
  forkInit,
  fromHost,
  type InitOptions,
  initNames,
  Module,
  MoeError,
  needAxes,
  noGrad,
  normalParameter,
  type OptionNames,
  ones,
  type Parameter,
  Random,
  remember,
  routerTopk,
  scope,
  shown,
  type Tensor,
  zeros,
} from '@moe/core'
import { expertBalanceLoss } from './balance.ts'
import { Experts } from './experts.ts'
import { LoadCounter, maskedCounts } from './load.ts'

/** Sizes and rule of a layer with a capacity, in the terms of Hugging Face's config.json where that has them. */
export interface CapacityMoEConfig {
  /** Features of a token. */
  readonly hidden_size: number
  /** Inner features of each expert. */
  readonly moe_intermediate_size: number
  /** E. */
  readonly n_routed_experts: number
  /** `switch`: the best expert, gate = its probability. `gshard`: the two best, gates normalized. */
  readonly router: 'switch' | 'gshard'
  /** Tokens that an expert takes in training are this times the even share. Switch: 1 to 1.25; GShard: 2 per choice. Default 1.25. */
  readonly capacity_factor?: number
  /**
   * Which second choices GShard uses in training: each with probability min(1, 2 g), g its normalized gate (GShard, algorithm 1), or always.
   * Evaluation uses all. Default random.
   */
  readonly second_expert?: 'random' | 'always'
}

const configNames: OptionNames<CapacityMoEConfig> = {
  hidden_size: true,
  moe_intermediate_size: true,
  n_routed_experts: true,
  router: true,
  capacity_factor: true,
  second_expert: true,
}

/** What a pass counts, and to whom it tells its loss. */
export interface CapacityForwardOptions {
  /** Count loads and drop what exceeds the capacity. Default false: nothing is dropped in evaluation. */
  readonly training?: boolean
  /** `f32 [batch, time]`, 1 for tokens and 0 for padding, which takes no capacity and is not counted. */
  readonly mask?: Tensor
  /** Is given the auxiliary loss without its factor (Switch: 0.01): E sum_i f_i P_i, f_i the share of first choices; 1 when balanced. */
  readonly onBalanceLoss?: (loss: Tensor) => void
}

const forwardNames: OptionNames<CapacityForwardOptions> = { training: true, mask: true, onBalanceLoss: true }

/**
 * Which choices `[N, K]` fit: 1 or 0. First choices go before second ones, earlier tokens before later. `mask`, `f32 [N]` or `[N, K]`, is 0 for
 * those that ask for no room and get none.
 */
export function withinCapacity(indices: Tensor, experts: number, capacity: number, mask?: Tensor): Tensor {
  const [tokens, topK] = indices.shape
  return noGrad(() =>
    scope(() => {
      // What is masked queues at an expert of its own.
      const asking = mask?.reshape([tokens, mask.shape[1] ?? 1])
      const real = asking?.cast('i32')
      const queued = real ? indices.mul(real).add(real.neg().add(1).mul(experts)) : indices
      const byChoice = queued.permute([1, 0]).reshape([topK * tokens, 1])
      const { positions, offsets } = dispatchPlan(byChoice, experts + 1)
      const rank = positions.sub(offsets.takeRows(byChoice.reshape([topK * tokens])))
      const fits = rank.lt(capacity).cast('f32').reshape([topK, tokens]).permute([1, 0])
      return asking ? fits.mul(asking) : fits
    }),
  )
}

/**
 * A Switch or GShard layer. `[B, T, hidden]` to the same shape; a token whose choices were all dropped gets zeros. Dropped choices are
 * still computed and weighted with 0: this is a baseline for quality, not for speed. Gates are normalized before anything is dropped, and
 * are not afterwards.
 */
export class CapacityMoE extends Module {
  /** Gate `[E, hidden]`. */
  weight: Parameter
  /** E nets of which each token goes through one (Switch) or two (GShard). */
  experts: Experts
  /** Draws which second choices GShard uses: one number per token and training pass. A run that goes on needs it where it was: `train` of `@moe/trainer` keeps it in checkpoints, and lets each of several ranks draw its own. */
  readonly random: Random
  readonly #config: CapacityMoEConfig
  readonly #load = new LoadCounter()
  readonly #keptCount = new LoadCounter()

  /** @throws MoeError E_CONFIG when sizes are impossible. */
  constructor(config: CapacityMoEConfig, init: InitOptions = {}) {
    super()
    checkShared('CapacityMoE', config, configNames)
    checkOptions('CapacityMoE', init, initNames)
    const { n_routed_experts: experts, hidden_size: hidden, capacity_factor: factor = 1.25, router } = config
    const needed = router === 'gshard' ? 2 : 1
    const problems: string[] = []
    for (const key of ['hidden_size', 'moe_intermediate_size', 'n_routed_experts'] as const) {
      if (!Number.isInteger(config[key]) || config[key] < 1)
        problems.push(`${key} = ${shown(config[key])} is not a positive integer`)
    }
    if (experts < needed) problems.push(`${router} needs at least ${needed} experts, n_routed_experts = ${experts}`)
    if (!(typeof factor === 'number' && factor > 0)) problems.push(`capacity_factor = ${shown(factor)} is not positive`)
    if (router !== 'switch' && router !== 'gshard') {
      problems.push(`router = ${JSON.stringify(router)} is not known (switch, gshard)`)
    }
    if (problems.length > 0) throw new MoeError({ code: 'E_CONFIG', op: 'CapacityMoE', problem: problems.join('; ') })
    this.#config = config
    this.weight = normalParameter([experts, hidden], 'weight', init)
    this.experts = new Experts(experts, hidden, config.moe_intermediate_size, forkInit(init, 'experts'))
    this.random = forkInit(init, 'second expert').random ?? new Random(0)
  }

  /** x `[batch, time, hidden]` to the same shape. @throws MoeError E_SHAPE, E_CONFIG */
  forward(x_BTD: Tensor, options: CapacityForwardOptions = {}): Tensor {
    needAxes('CapacityMoE', x_BTD, ['batch', 'time', 'hidden'])
    checkShared('CapacityMoE.forward', options, forwardNames)
    const { n_routed_experts: experts, router } = this.#config
    const [batch, time, hidden] = x_BTD.shape
    const tokens = batch * time
    const x_ND = x_BTD.reshape([tokens, hidden])
    const { weights, indices, scores } = routerTopk(
      x_ND.matmul(this.weight, { transposeB: true, precision: 'f32' }),
      zeros([experts], { backend: x_ND.backend }),
      {
        scoring: 'softmax',
        groups: 1,
        topGroups: 1,
        groupScore: 'max',
        topK: router === 'gshard' ? 2 : 1,
        normalize: router === 'gshard',
        scale: 1,
      },
    )
    const plan = dispatchPlan(indices, experts)
    const mask = options.mask?.reshape([tokens])
    options.onBalanceLoss?.(expertBalanceLoss({ scores, indices: indices.narrow(1, 0, 1), sequences: 1, mask }))
    const gates = options.training ? weights.mul(this.#kept(weights, indices, plan, mask)) : weights
    const out_ND = this.experts.route(x_ND, gates, plan)
    return out_ND.reshape([batch, time, hidden])
  }

  /** What is used in training, counted. The capacity is that of the whole batch, padding included: shapes decide it, not contents. */
  #kept(weights: Tensor, indices: Tensor, plan: DispatchPlan, mask: Tensor | undefined): Tensor {
    const { n_routed_experts: experts, capacity_factor: factor = 1.25 } = this.#config
    const [tokens, topK] = indices.shape
    const capacity = Math.ceil((factor * tokens * topK) / experts)
    const kept = noGrad(() => scope(() => withinCapacity(indices, experts, capacity, this.#asking(weights, mask))))
    this.#load.add(mask ? maskedCounts(indices, mask, experts) : plan.counts)
    this.#keptCount.add(scope(() => noGrad(() => kept.sum().cast('i32').reshape([1]))))
    return kept
  }

  /** Choices that ask for room: not padding, and of GShard's second ones those that were drawn. */
  #asking(weights: Tensor, mask: Tensor | undefined): Tensor | undefined {
    const { router, second_expert = 'random' } = this.#config
    if (router === 'switch' || second_expert === 'always') return mask
    const [tokens] = weights.shape
    const { backend } = weights
    const drawn = fromHost(
      remember(() => this.random.uniform(tokens)),
      [tokens, 1],
      'f32',
      backend,
    )
    const second = drawn.lt(weights.narrow(1, 1, 2).mul(2)).cast('f32')
    const asking = concat([ones([tokens, 1], { backend }), second], 1)
    return mask ? asking.mul(mask.reshape([tokens, 1])) : asking
  }

  /** Choices `i32 [E]` before dropping since the last `reset`, still on the device; null before any training pass. */
  get load(): Tensor | null {
    return this.#load.total
  }

  /** Choices that found room `i32 [1]`, counted as `load` is. */
  get kept(): Tensor | null {
    return this.#keptCount.total
  }

  /** Starts counting anew. */
  reset(): void {
    this.#load.reset()
    this.#keptCount.reset()
  }
}
