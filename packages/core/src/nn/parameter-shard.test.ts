import { describe, expect, test } from 'vitest'
import { full, tensor, zeros } from '../create.ts'
import { Parameter } from '../parameter.ts'
import { readF64, referenceBackend } from '../reference/index.ts'
import { keep } from '../scope.ts'
import type { Tensor } from '../tensor.ts'
import { ParameterShard, partition, type ShardCommunicator } from './parameter-shard.ts'

const backend = referenceBackend()
const named = (name: string, ...shape: number[]) => ({ name, parameter: new Parameter(zeros(shape, { backend })) })
const shardsOf = (parameters: ReturnType<typeof named>[], ranks: number) =>
  partition(parameters, ranks).map(shard => shard.map(({ named: { name }, from, to }) => `${name} ${from}-${to}`))

describe('partitioning', () => {
  test('splits embeddings and heads between rows, stacks between matrices, and nothing else', () => {
    const parameters = [
      named('model.embed_tokens.weight', 100, 4),
      named('norm.weight', 4),
      named('up_proj', 6, 8, 4),
      named('o_proj.weight', 12, 4),
      named('lm_head.weight', 100, 4),
    ]
    expect(shardsOf(parameters, 1)).toEqual([
      [
        'model.embed_tokens.weight 0-100',
        'norm.weight 0-4',
        'up_proj 0-6',
        'o_proj.weight 0-12',
        'lm_head.weight 0-100',
      ],
    ])
    expect(shardsOf(parameters, 4)).toEqual([
      ['model.embed_tokens.weight 0-65'],
      ['model.embed_tokens.weight 65-100', 'norm.weight 0-4', 'up_proj 0-4'],
      ['up_proj 4-6', 'o_proj.weight 0-12', 'lm_head.weight 0-35'],
      ['lm_head.weight 35-100'],
    ])
    expect(shardsOf([named('a', 3, 4), named('b'), named('c', 0, 7), named('d', 2)], 3)).toEqual([
      [],
      ['a 0-3'],
      ['b 0-1', 'd 0-2'],
    ])
    expect(shardsOf([], 2)).toEqual([[], []])
  })

  test.each([2, 3, 7, 16, 64])('assigns every row to one of %i ranks, in shards of nearly equal size', ranks => {
    const layer = (i: number) => [
      named(`${i}.norm`, 64),
      named(`${i}.q_proj`, 48, 64),
      named(`${i}.up_proj`, 16, 24, 64),
      named(`${i}.down_proj`, 16, 64, 24),
    ]
    const parameters = [named('embed_tokens', 5000, 64), ...[0, 1, 2, 3].flatMap(layer), named('lm_head', 5000, 64)]
    const shards = partition(parameters, ranks)
    const sizes = shards.map(shard =>
      shard.reduce(
        (sum, { named: { parameter }, from, to }) => sum + ((to - from) * parameter.size) / parameter.shape[0],
        0,
      ),
    )
    const total = parameters.reduce((sum, { parameter }) => sum + parameter.size, 0)
    expect(sizes.reduce((sum, size) => sum + size)).toBe(total)
    expect(Math.max(...sizes)).toBeLessThanOrEqual(total / ranks + 48 * 64)
    for (const each of parameters) {
      const ends = shards.flat().filter(rows => rows.named === each)
      expect(ends.reduce((end, { from, to }) => (from === end ? to : Number.NaN), 0)).toBe(each.parameter.shape[0])
    }
  })
})

test('a step on one of two ranks sums its gradients, updates its rows, and gathers all weights', async () => {
  const before = backend.stats().handles
  const parameters = [
    // Rows 8 to 11 of a larger table.
    {
      name: 'embed_tokens',
      parameter: new Parameter(full([4, 2], 1, { backend })),
      slices: ['a', 'b', 'c', 'd'],
      firstRow: 8,
    },
    named('weight', 1),
    named('unused', 1, 1),
    { name: 'frozen', parameter: new Parameter(zeros([9], { backend }), { trainable: false }) },
  ]
  const [{ parameter: table }, { parameter: weight }, { parameter: unused }] = parameters
  const calls: unknown[] = []
  const numbers = (tensors: readonly Tensor[]) => tensors.map(each => [...readF64(each)])
  const rankStub: ShardCommunicator = {
    rank: 1,
    size: 2,
    async reduceScatterRows(shards, into) {
      calls.push(shards.map(shard => shard.map(({ tensor, from, to }) => [...tensor.shape, from, to])))
      return (
        into ?? shards[1].map(({ tensor: { shape }, from, to }) => full([to - from, ...shape.slice(1)], 7, { backend }))
      )
    },
    async allGatherRows(shards, own) {
      calls.push(
        shards.map(shard => shard.map(({ tensor }) => tensor === table)),
        numbers(own),
      )
      table.assign(full([4, 2], 5, { backend }))
    },
  }
  const shard = new ParameterShard(parameters, rankStub)
  expect(
    shard.parameters.map(({ name, firstRow, slices, parameter }) => [name, firstRow, slices, parameter === weight]),
  ).toEqual([
    ['embed_tokens', 11, ['d'], false],
    ['weight', undefined, undefined, true],
    ['unused', undefined, undefined, false],
  ])
  for (const each of [table, weight]) each.grad = keep(full(each.shape, 2, { backend }))
  await shard.sumGradients()
  const [rows, whole] = shard.parameters.map(({ parameter }) => parameter)
  expect(numbers([rows.grad as Tensor, whole.grad as Tensor])).toEqual([[7, 7], [7]])
  expect([table.grad, unused.grad, rows.handle]).toEqual([null, null, null])
  const versions = [table, weight, unused].map(({ version }) => version)
  await shard.update(() => {
    expect(numbers([rows])).toEqual([[1, 1]])
    rows.assign(tensor([3, 4], [1, 2], { backend }))
    weight.assign(tensor([6], [1], { backend }))
  })
  expect(calls).toEqual([
    [
      [[4, 2, 0, 3]],
      [
        [4, 2, 3, 4],
        [1, 0, 1],
      ],
    ],
    [[true], [true, false]],
    [[3, 4], [6]],
  ])
  expect([table, weight, unused].map(({ version }, i) => version > versions[i])).toEqual([true, true, false])
  expect([rows.handle, rows.grad]).toEqual([null, null])
  for (const { parameter } of parameters) parameter.dispose()
  expect(backend.stats().handles).toBe(before)
})
