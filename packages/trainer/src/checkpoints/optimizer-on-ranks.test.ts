import { concat, fromHost, type NamedParameter, Parameter, type Tensor } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { expect, test } from 'vitest'
import type { Optimizer } from '../optim/optimizer.ts'
import type { SendingRanks } from '../ranks.ts'
import { OptimizerOnRanks } from './optimizer-on-ranks.ts'

const backend = referenceBackend()

/** Ranks in this process that can gather, and send to rank 0. */
function createRanks(size: number): SendingRanks[] {
  const calls: Array<{ readonly tensors: Map<number, Tensor>; waiting: Array<() => void> }> = []
  const sent = new Map<number, Float32Array[]>()
  return Array.from({ length: size }, (_, rank) => {
    let call = 0
    return {
      rank,
      size,
      allReduce: () => Promise.reject(new Error('not expected')),
      async allGather(tensor) {
        calls[call] ??= { tensors: new Map(), waiting: [] }
        const { tensors, waiting } = calls[call++]
        tensors.set(rank, tensor.narrow(0, 0, tensor.size))
        if (tensors.size < size) await new Promise<void>(done => waiting.push(done))
        else for (const done of waiting) done()
        return concat(Array.from({ length: size }, (_, r) => tensors.get(r) as Tensor))
      },
      async send(tensor, to) {
        expect(to).toBe(0)
        sent.set(rank, [...(sent.get(rank) ?? []), (await tensor.values()) as Float32Array])
      },
      async receive({ shape }, from) {
        return fromHost(sent.get(from)?.shift() as Float32Array, shape, 'f32', backend)
      },
    }
  })
}

/** An optimizer whose only state are the values of its parameters. */
const copying = (of: readonly NamedParameter[]): Optimizer => ({
  name: 'copies',
  settings: () => ({}),
  step: () => {},
  load: () => Promise.reject(new Error('not expected')),
  dispose: () => {},
  entries: () =>
    of.map(({ name, parameter }) => {
      return { name, parameter, dtype: parameter.dtype, shape: parameter.shape, data: () => parameter.data() }
    }),
})

/** Rows of a `[7, 2]` table whose elements are their indices. */
function rows(from: number, to: number, name = 'table') {
  const numbers = Float32Array.from({ length: 2 * (to - from) }, (_, i) => 2 * from + i)
  return { name, parameter: new Parameter(fromHost(numbers, [to - from, 2], 'f32', backend)), firstRow: from }
}

test('entries contain each row once if rows of a parameter are on several ranks', async () => {
  const parts = [[rows(3, 7)], [rows(0, 3), rows(0, 7, 'other')], [rows(3, 7), rows(0, 7, 'other')], [rows(0, 3)], []]
  const ranks = createRanks(parts.length)
  const all = await Promise.all(
    parts.map((parameters, i) => OptimizerOnRanks.of({ ranks: ranks[i], parameters }, copying(parameters), backend)),
  )
  await Promise.all(all.slice(1).map(each => each.send()))
  const entries: unknown[] = []
  for (const { name, shape, data } of all[0].entries()) entries.push([name, shape, [...(await data())]])
  const numbers = Array.from({ length: 14 }, (_, i) => i)
  expect(entries).toEqual([
    ['table', [7, 2], numbers],
    ['other', [7, 2], numbers],
  ])
})
