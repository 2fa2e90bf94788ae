/** @file For tests only: a layer whose experts are sharded over ranks. */
import { type Module, Random, randn, type SwigluMlp, type Tensor, tensor, trainable } from '@moe/core'
import { readF64 } from '@moe/core/reference'
import { type Experts, MoELayer, type RouterConfig } from '@moe/router'
import type { Communicator } from '../communicator/communicator.ts'
import { PiecewisePass } from './piecewise-pass.ts'
import { routeOverRanks } from './route-over-ranks.ts'

export const features = 6
export const experts = 8
export const config: RouterConfig = {
  hidden_size: features,
  moe_intermediate_size: 5,
  n_routed_experts: experts,
  n_shared_experts: 1,
  num_experts_per_tok: 3,
  n_group: 4,
  topk_group: 2,
  topk_method: 'noaux_tc',
  scoring_func: 'sigmoid',
  norm_topk_prob: true,
  routed_scaling_factor: 2.5,
}
/** A layer with the same weights on every rank. `bias` is the selection bias of the experts. */
export function newLayer(bias?: readonly number[]): MoELayer {
  const layer = new MoELayer(config, { random: new Random(1), std: 0.5 })
  if (bias) layer.gate.e_score_correction_bias?.assign(tensor(bias))
  return layer
}

/** This rank's experts of a complete layer. */
export function shardOf(layer: MoELayer, { rank, size }: Communicator): Experts {
  const own = experts / size
  return layer.experts.copyOf(rank * own, (rank + 1) * own)
}

const rowsOf = (rank: number) => (rank === 1 ? 1 : 4 + 3 * rank)
export const tokensOf = (rank: number) => randn([rowsOf(rank), features], new Random(10 + rank))
export const seedOf = (rank: number) => randn([rowsOf(rank), features], new Random(20 + rank))
export const numbers = (t: Tensor | null | undefined) => (t ? Array.from(readF64(t)) : null)

/** Forward and backward pass of the layer on this rank's tokens, with its shard of the experts. */
export async function shardedPass(ranks: Communicator, layer = newLayer(), shard = shardOf(layer, ranks)) {
  const { gate, shared_experts } = layer
  const [tokens, seed] = [tokensOf(ranks.rank), seedOf(ranks.rank)]
  const pass = new PiecewisePass()
  const x = pass.input(tokens)
  let indices!: Tensor
  const [weights, shared] = pass.piece([x], own => {
    const routing = gate.forward(own)
    indices = routing.indices
    return [routing.weights, (shared_experts as SwigluMlp).forward(own)]
  })
  const routed = await routeOverRanks(pass, ranks, shard, { x, weights, indices }, experts)
  const [y] = pass.piece([routed, shared], (a, b) => [a.add(b)])
  const out = numbers(y)
  await pass.backward(y, seed)
  const gradients = (module: Module) => trainable(module).map(({ grad }) => numbers(grad))
  const found = {
    out,
    dx: numbers(pass.gradient(x)),
    router: gradients(gate),
    shared: gradients(shared_experts as Module),
    routed: gradients(shard),
    chosen: Array.from(await indices.values()),
  }
  pass.dispose()
  for (const tensor of [tokens, seed]) tensor.dispose()
  for (const module of [gate, shared_experts as Module, shard])
    for (const parameter of trainable(module)) parameter.zeroGrad()
  return found
}
