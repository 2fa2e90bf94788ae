/** @file Several processes that train one model together: what the trainer asks of them, and what a step does with it. */
import { concat, MoeError, type Parameter, scope, type Tensor, tensor } from '@moe/core'
import type { TokenBatch } from './model.ts'
import { type Pass, weightOf } from './step-numbers.ts'

/**
 * One of the ranks of a training. All make the same calls in the same order. A `Communicator` of `@moe/parallel` is one.
 */
export interface Ranks {
  /** Number of this rank, from 0. */
  readonly rank: number
  readonly size: number
  /** Sums over all ranks, the same bits on each. Resolves to new tensors, which belong to the caller. */
  allReduce(tensors: readonly Tensor[]): Promise<Tensor[]>
  /** `[n]` of every rank, one behind the other: `[size n]`, which belongs to the caller. */
  allGather(tensor: Tensor): Promise<Tensor>
}

/** A micro-batch of any rank, and what its gradient was multiplied by. */
export interface WeightedPass extends Pass {
  readonly weight: number
}

/**
 * The micro-batches of all ranks, in the order of ranks. All ranks have as many of them, with the same metrics.
 * @param own `values` of each as a vector on the device
 */
export async function gatherPasses(
  ranks: Ranks,
  own: ReadonlyArray<Omit<Pass, 'values'> & { readonly values: Tensor; readonly batch: TokenBatch }>,
): Promise<WeightedPass[]> {
  const [{ metrics, values }] = own
  const rows = scope(() =>
    concat(own.flatMap(({ count, batch, values }) => [tensor([count, batch.rows, batch.length], [3], values), values])),
  )
  const numbers = await valuesOf(ranks.allGather(rows).finally(() => rows.dispose()))
  const width = 3 + values.size
  const passes = numbers.length / width
  return Array.from({ length: passes }, (_, i) => {
    const [count, rows, length, ...rest] = numbers.subarray(i * width, (i + 1) * width)
    return { count, metrics, values: rest, weight: weightOf(count, { rows, length }, passes > 1) }
  })
}

/** Gradients travel together up to so many elements: more would be in memory twice. */
const groupElements = 1 << 22

/** Replaces the gradients of this rank by their sums over all. */
export async function sumGradients(ranks: Ranks, trained: readonly Parameter[]): Promise<void> {
  const left = trained.filter(({ grad }) => grad !== null)
  while (left.length > 0) {
    const group: Parameter[] = []
    for (let elements = 0; left.length > 0 && elements < groupElements; elements += (group.at(-1) as Parameter).size)
      group.push(left.shift() as Parameter)
    const sums = await ranks.allReduce(group.map(({ grad }) => grad as Tensor))
    for (const [i, parameter] of group.entries()) {
      parameter.zeroGrad()
      parameter.grad = sums[i]
    }
  }
}

/** Numbers of every rank, `[size][numbers.length]`, rounded to f32. */
export async function gatherNumbers(ranks: Ranks, numbers: readonly number[], like: Tensor): Promise<number[][]> {
  const own = tensor(numbers, [numbers.length], { backend: like.backend })
  const all = await valuesOf(ranks.allGather(own).finally(() => own.dispose()))
  return Array.from({ length: ranks.size }, (_, r) => [...all.subarray(r * numbers.length, (r + 1) * numbers.length)])
}

/** @throws MoeError E_CONFIG unless all ranks begin at the same step with the same weights */
export async function checkSameStart(ranks: Ranks, step: number, norm: number, like: Tensor): Promise<void> {
  const starts = await gatherNumbers(ranks, [step, norm], like)
  const other = starts.findIndex(([at, weights]) => at !== starts[0][0] || !Object.is(weights, starts[0][1]))
  if (other < 0) return
  const show = ([at, weights]: readonly number[]) => `step ${at} with weights of norm ${weights}`
  throw new MoeError({
    code: 'E_CONFIG',
    op: 'train',
    problem: `rank 0 begins at ${show(starts[0])}, rank ${other} at ${show(starts[other])}`,
    fix: 'make the same model on every rank (the same seed), and let all see the same folder when they resume',
    details: { starts },
  })
}

async function valuesOf(gathered: Promise<Tensor>): Promise<Float32Array> {
  const all = await gathered
  try {
    return (await all.values()) as Float32Array
  } finally {
    all.dispose()
  }
}
