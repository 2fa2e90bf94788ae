/**
 * @file Routers from before DeepSeekMoE, as baselines: GShard's top-2 (Lepikhin et al. 2020) and Switch's top-1 (Fedus
 * et al. 2021). Each has an auxiliary loss, and a capacity per expert beyond which tokens are dropped in training.
 * GShard also uses second experts at random.
 *
 * Legend: N tokens, E experts, K chosen.
 */
import {
  cacheForRecompute,
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
  routerTopk,
  scope,
  shown,
  type Tensor,
  zeros,
} from '@moe/core'
import { expertBalanceLoss } from './balance.ts'
import { Experts } from './experts.ts'
import { LoadCounter, maskedCounts } from './load.ts'

/** Configuration of a layer with a capacity, in the terms of Hugging Face's config.json where they exist. */
export interface CapacityMoEConfig {
  /** Features of a token. */
  readonly hidden_size: number
  /** Intermediate features of each expert. */
  readonly moe_intermediate_size: number
  /** E, the number of experts. */
  readonly n_routed_experts: number
  /** `switch`: the best expert, with its probability as the gate. `gshard`: the two best, with normalized gates. */
  readonly router: 'switch' | 'gshard'
  /**
   * Capacity of an expert in training, relative to an even share of the choices. Switch: 1 to 1.25; GShard: 2 per
   * choice. Default 1.25.
   */
  readonly capacity_factor?: number | undefined
  /**
   * Which second choices GShard uses in training: each with probability min(1, 2 g), where g is its normalized gate
   * (GShard, algorithm 1), or all of them. Evaluation always uses all. Default random.
   */
  readonly second_expert?: 'random' | 'always' | undefined
}

const configNames: OptionNames<CapacityMoEConfig> = {
  hidden_size: true,
  moe_intermediate_size: true,
  n_routed_experts: true,
  router: true,
  capacity_factor: true,
  second_expert: true,
}

/** Options of a forward pass: what to count, and a callback for the loss. */
export interface CapacityForwardOptions {
  /** Counts loads, and drops what exceeds the capacity. Default false: evaluation drops nothing. */
  readonly training?: boolean | undefined
  /** `f32 [batch, time]`: 1 for tokens and 0 for padding, which takes no capacity and is not counted. */
  readonly mask?: Tensor | undefined
  /**
   * If given, is called with the auxiliary loss without its factor (Switch: 0.01): E sum_i f_i P_i, where f_i is the
   * share of first choices; 1 if balanced.
   */
  readonly onBalanceLoss?: ((loss: Tensor) => void) | undefined
}

const forwardNames: OptionNames<CapacityForwardOptions> = { training: true, mask: true, onBalanceLoss: true }

/**
 * Returns which choices `[N, K]` fit into the capacity of their expert, as 1 or 0. First choices have priority over
 * second ones, and earlier tokens over later ones. `mask`, `f32 [N]` or `[N, K]`, is 0 for choices that take no
 * capacity and are not kept.
 */
export function withinCapacity(indices: Tensor, experts: number, capacity: number, mask?: Tensor): Tensor {
  const [tokens, topK] = indices.shape
  return noGrad(() =>
    scope(() => {
      // Masked choices go to an additional expert.
      const taking = mask?.reshape([tokens, mask.shape[1] ?? 1])
      const real = taking?.cast('i32')
      const queued = real ? indices.mul(real).add(real.neg().add(1).mul(experts)) : indices
      const byChoice = queued.permute([1, 0]).reshape([topK * tokens, 1])
      const { positions, offsets } = dispatchPlan(byChoice, experts + 1)
      const rank = positions.sub(offsets.takeRows(byChoice.reshape([topK * tokens])))
      const fits = rank.lt(capacity).cast('f32').reshape([topK, tokens]).permute([1, 0])
      return taking ? fits.mul(taking) : fits
    }),
  )
}

/**
 * A Switch or GShard layer. Maps `[B, T, hidden]` to the same shape; a token whose choices are all dropped gives zeros.
 *
 * Dropped choices are still computed, with weight 0, because this is a baseline for quality, not for speed. Gates are
 * normalized before choices are dropped, and not again afterwards.
 */
export class CapacityMoE extends Module {
  /** Weight of the gate, `[E, hidden]`. */
  weight: Parameter
  /** The E experts, of which each token uses one (Switch) or two (GShard). */
  experts: Experts
  /**
   * Draws which second choices GShard uses: one number per token and training pass. To resume a run exactly, restore
   * its position; `train` of `@moe/trainer` stores it in checkpoints, and gives each rank its own stream.
   */
  readonly random: Random
  readonly #config: CapacityMoEConfig
  readonly #load = new LoadCounter()
  readonly #keptCount = new LoadCounter()

  /** @throws MoeError E_CONFIG for invalid sizes */
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
    if (experts < needed) problems.push(`n_routed_experts = ${experts} is less than the ${needed} that ${router} needs`)
    if (!(typeof factor === 'number' && factor > 0))
      problems.push(`capacity_factor = ${shown(factor)} is not a positive number`)
    if (router !== 'switch' && router !== 'gshard') {
      problems.push(`router = ${JSON.stringify(router)} is not one of switch, gshard`)
    }
    const { second_expert: second = 'random' } = config
    if (second !== 'random' && second !== 'always') {
      problems.push(`second_expert = ${JSON.stringify(second)} is not one of random, always`)
    }
    if (problems.length > 0) throw new MoeError({ code: 'E_CONFIG', op: 'CapacityMoE', problem: problems.join('; ') })
    this.#config = config
    this.weight = normalParameter([experts, hidden], 'weight', init)
    this.experts = new Experts(experts, hidden, config.moe_intermediate_size, forkInit(init, 'experts'))
    this.random = forkInit(init, 'second expert').random ?? new Random(0)
  }

  /** Maps x `[batch, time, hidden]` to the same shape. @throws MoeError E_SHAPE, E_CONFIG */
  forward(x_BTD: Tensor, options: CapacityForwardOptions = {}): Tensor {
    needAxes('CapacityMoE', x_BTD, ['batch', 'time', this.#config.hidden_size])
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

  /**
   * Returns which choices are used in training, and counts them. The capacity depends on the shape of the batch,
   * including padding, not on its contents.
   */
  #kept(weights: Tensor, indices: Tensor, plan: DispatchPlan, mask: Tensor | undefined): Tensor {
    const { n_routed_experts: experts, capacity_factor: factor = 1.25 } = this.#config
    const [tokens, topK] = indices.shape
    const capacity = Math.ceil((factor * tokens * topK) / experts)
    const kept = noGrad(() =>
      scope(() => withinCapacity(indices, experts, capacity, this.#takingCapacity(weights, mask))),
    )
    this.#load.add(mask ? maskedCounts(indices, mask, experts) : plan.counts)
    this.#keptCount.add(scope(() => noGrad(() => kept.sum().cast('i32').reshape([1]))))
    return kept
  }

  /** Returns which choices take capacity: not padding, and only those second choices of GShard that were drawn. */
  #takingCapacity(weights: Tensor, mask: Tensor | undefined): Tensor | undefined {
    const { router, second_expert = 'random' } = this.#config
    if (router === 'switch' || second_expert === 'always') return mask
    const [tokens] = weights.shape
    const { backend } = weights
    const drawn = fromHost(
      cacheForRecompute(() => this.random.uniform(tokens)),
      [tokens, 1],
      'f32',
      backend,
    )
    const second = drawn.lt(weights.narrow(1, 1, 2).mul(2)).cast('f32')
    const taking = concat([ones([tokens, 1], { backend }), second], 1)
    return mask ? taking.mul(mask.reshape([tokens, 1])) : taking
  }

  /**
   * Choices per expert `i32 [E]` before dropping, since the last `reset`, as a tensor on the device; null before the
   * first training pass.
   */
  get load(): Tensor | null {
    return this.#load.total
  }

  /** Number of choices that were kept, `i32 [1]`, counted like `load`. */
  get kept(): Tensor | null {
    return this.#keptCount.total
  }

  /** Resets the counts. */
  reset(): void {
    this.#load.reset()
    this.#keptCount.reset()
  }
}
