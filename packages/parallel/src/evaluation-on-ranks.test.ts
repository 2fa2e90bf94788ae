/** @file Held-out data in training on several ranks: each evaluates its share. */
import { Random } from '@moe/core'
import { DeepSeek } from '@moe/deepseek'
import { type EvaluationEvent, TokenDataset, type TokenStream, type TrainOptions } from '@moe/trainer'
import { expect, test } from 'vitest'
import { local } from './index.ts'
import { backend } from './test-runs.ts'
import { parallelisms, trainSmall } from './test-training.ts'

function documents(count: number, length: number, seed: number): TokenDataset {
  const random = new Random(seed)
  return TokenDataset.fromTokens(
    Array.from({ length: count }, () => Int32Array.from({ length }, () => 2 + random.integer(38))),
  )
}

const heldOut = (validation: TokenStream | Record<string, TokenStream>): Partial<TrainOptions> => ({
  data: { training: documents(3, 60, 3), validation },
  steps: 4,
  evalEvery: 2,
})
const one = documents(2, 55, 4)
const several = { one, other: documents(1, 30, 5), short: documents(1, 5, 6) }

/** Trains on `size` ranks, and returns the evaluations and the number of evaluated batches of each. */
async function evaluated(size: number, options: Partial<TrainOptions>) {
  const events: Array<Array<Omit<EvaluationEvent, 'seconds'>>> = []
  const batches: number[] = []
  const of = async (rank: number, more: Partial<TrainOptions>) => {
    events[rank] = []
    batches[rank] = 0
    class Counting extends DeepSeek {
      override loss(...[batch, how]: Parameters<DeepSeek['loss']>) {
        if (how?.training === false) batches[rank]++
        return super.loss(batch, how)
      }
    }
    const onEvent: TrainOptions['onEvent'] = event => {
      if (event.type === 'evaluation') events[rank].push(JSON.parse(JSON.stringify({ ...event, seconds: 0 }), timeless))
    }
    await trainSmall(backend, { ...options, ...more, onEvent }, { mtp: 0, kind: Counting })
  }
  if (size === 1) await of(0, { accumulate: 2 })
  else await local(size, ranks => of(ranks.rank, { ranks, accumulate: 2 / size }))
  return { events, batches }
}

const timeless = (name: string, value: unknown) => (name === 'seconds' ? 0 : value)

test.each([
  ['one stream', heldOut(one)],
  ['several streams', heldOut(several)],
  ['a limit', { ...heldOut(several), evalTokens: 48 }],
  ['the EMA too', { ...heldOut(one), ema: 0.5 }],
])('%s: all ranks have the result of one, bit for bit, and each evaluates half of the batches', async (_, options) => {
  const alone = await evaluated(1, options)
  const { events, batches } = await evaluated(2, options)
  expect(alone.events[0]).toHaveLength(2)
  for (const own of events) expect(own).toEqual(alone.events[0])
  expect(batches[0] + batches[1]).toBe(alone.batches[0])
  const evaluations = 2 * (options.ema === undefined ? 1 : 2)
  expect(batches[0] - batches[1]).toBeGreaterThanOrEqual(0)
  expect(batches[0] - batches[1]).toBeLessThanOrEqual(evaluations)
})

test('more ranks than batches', async () => {
  const given = heldOut(documents(1, 12, 7))
  const results = await local(4, async ranks => {
    const losses: number[] = []
    const onEvent: TrainOptions['onEvent'] = event => {
      if (event.type === 'evaluation') losses.push(event.loss)
    }
    await trainSmall(backend, { ...given, ranks, onEvent }, { mtp: 0 })
    return losses
  })
  expect(results[0]).toHaveLength(2)
  for (const losses of results) expect(losses).toEqual(results[0])
})

test('ranks with different held-out data, or rows to evaluate it in, are an error', async () => {
  const differing = (own: (rank: number) => Partial<TrainOptions>) =>
    local(2, ranks => trainSmall(backend, { ...heldOut(one), ...own(ranks.rank), ranks }))
  await expect(differing(rank => (rank === 0 ? {} : heldOut(several.other)))).rejects.toThrow(
    /heldOutTokens is 110 on rank 0 but 30 on rank 1; pass the same model, data and options to train on every rank/,
  )
  await expect(differing(rank => ({ batchSize: 1 + rank }))).rejects.toThrow(/batchSize is 1 on rank 0 but 2 on rank 1/)
})

test.each(Object.entries(parallelisms))(
  'an evaluation that one rank interrupts stops all: %s',
  async (_, { onRanks, accumulate }) => {
    const controller = new AbortController()
    const stopped = await local(2, async ranks => {
      const onEvent: TrainOptions['onEvent'] = event => {
        if (event.type === 'evaluating' && ranks.rank === 1) controller.abort()
      }
      const signal = ranks.rank === 1 ? { signal: controller.signal } : {}
      const options = { ...heldOut(one), accumulate, onEvent, ...signal, ema: 0.5 }
      const { result } = await trainSmall(backend, options, { onRanks: made => onRanks(made, ranks) })
      return [result.steps, result.stopped]
    })
    expect(stopped).toEqual(Array(2).fill([2, 'interrupted']))
  },
)
