/** @file For tests only: makes every call of a communicator, and computes the expected results without one. */
import {
  type Backend,
  type DType,
  fromBf16,
  fromHost,
  Parameter,
  Random,
  sizeOf,
  type Tensor,
  tensor,
  toBf16,
  zeros,
} from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import type { Communicator } from './communicator.ts'

const reference = referenceBackend()

/** The numbers of a rank. Their sums depend on order and rounding. */
const numbersOf = (rank: number, length: number) =>
  new Random(11)
    .fork(`rank ${rank}`)
    .uniform(length)
    .map((x, i) => (x - 0.5) * 10 ** (i % 7))

/** The number of rows that rank `from` sends to rank `to`; 0 for some pairs. */
const rowsFor = (from: number, to: number) => (from * 5 + to * 2) % 4

const bitsOn = (backend: Backend, numbers: Float32Array, dtype: 'bf16' | 'f32' | 'i32') => {
  if (dtype === 'f32') return fromHost(numbers, [numbers.length], 'f32', backend)
  if (dtype === 'i32') return fromHost(Int32Array.from(numbers), [numbers.length], 'i32', backend)
  return fromHost(Uint16Array.from(numbers, toBf16), [numbers.length], 'bf16', backend)
}
/** The value after conversion by an Int32Array, which has no -0. */
const whole = (x: number) => Math.trunc(x) + 0
const plain = async (tensors: readonly Tensor[]) =>
  Promise.all(tensors.map(async t => ({ shape: t.shape, dtype: t.dtype, data: [...(await t.data())] })))

/** The result of every call on this rank, as plain data, and of every call within the group of odd or even ranks, made at the same time. */
export async function exercise(ranks: Communicator, backend: Backend = reference): Promise<Record<string, unknown>> {
  const members = Array.from({ length: ranks.size }, (_, r) => r).filter(r => r % 2 === ranks.rank % 2)
  const [whole, inGroup] = await Promise.all([
    exerciseAll(ranks, backend),
    exerciseAll(ranks.group(members.reverse()), backend),
  ])
  return { ...whole, inGroup }
}

async function exerciseAll(ranks: Communicator, backend: Backend): Promise<Record<string, unknown>> {
  const f32 = (numbers: Float32Array, shape = [numbers.length]) => tensor(numbers, shape, { backend })
  const bits = (numbers: Float32Array, dtype: 'bf16' | 'f32' | 'i32') => bitsOn(backend, numbers, dtype)
  const { rank, size } = ranks
  const own = (length: number) => numbersOf(rank, length)
  const results: Record<string, unknown> = {}
  for (const reduction of ['sum', 'max', 'mean'] as const) {
    const dtypes = reduction === 'mean' ? (['f32', 'bf16'] as const) : (['f32', 'bf16', 'i32'] as const)
    // Lengths below, at and above the number of ranks, and a scalar.
    const tensors = dtypes.flatMap(dtype => [1, size, 23].map(length => bits(own(length), dtype)))
    results[reduction] = await plain(await ranks.allReduce([...tensors, f32(own(1), [])], reduction))
  }
  const inPlace = [bits(own(23), 'f32'), bits(own(1), 'i32')]
  if (backend.write) await ranks.allReduceInPlace(inPlace)
  results.inPlace = await plain(backend.write ? inPlace : await ranks.allReduce(inPlace))
  results.shards = await exerciseShards(ranks, backend)
  results.reduceScatter = await plain([await ranks.reduceScatter(f32(own(3 * size * 2), [3 * size, 2]))])
  results.allGather = await plain([await ranks.allGather(f32(own(6), [2, 3])), await ranks.allGather(f32(own(1), []))])
  const counts = Array.from({ length: size }, (_, to) => rowsFor(rank, to))
  const total = counts.reduce((sum, count) => sum + count)
  const exchanged = await ranks.allToAll(f32(own(total * 3), [total, 3]), counts)
  const known = await ranks.allToAll(f32(own(total * 3), [total, 3]), counts, exchanged.counts)
  results.allToAll = [exchanged.counts, await plain([exchanged.rows]), known.counts, await plain([known.rows])]
  const roots = Array.from({ length: size }, (_, root) => ranks.broadcast([f32(own(5)), bits(own(4), 'i32')], root))
  results.broadcast = await Promise.all(roots.map(async tensors => plain(await tensors)))
  // Around a ring, with two messages in flight at once, received in the order of sending.
  const [next, previous] = [(rank + 1) % size, (rank - 1 + size) % size]
  if (size > 1) {
    const like = { shape: [4], dtype: 'f32' as DType, backend }
    const received = [ranks.receive(like, previous), ranks.receive({ ...like, shape: [2, 2] }, previous)]
    await Promise.all([ranks.send(f32(own(4)), next), ranks.send(f32(own(8).subarray(4)), next)])
    results.ring = await plain(await Promise.all(received))
  }
  await ranks.barrier()
  return results
}

/** Shapes of shared tensors: a vector and a scalar that belong to rank 0, a matrix of which each rank but the last owns two rows, and one that belongs to the last rank. */
const shapesOf = (size: number) => [[5], [], [2 * size + 3, 3], [2, 2]]
const runsOf = (rank: number, size: number) => {
  const last = rank === size - 1
  const whole =
    rank === 0
      ? [
          { of: 0, from: 0, to: 5 },
          { of: 1, from: 0, to: 1 },
        ]
      : []
  const matrix = { of: 2, from: 2 * rank, to: last ? 2 * size + 3 : 2 * rank + 2 }
  return [...whole, matrix, ...(last ? [{ of: 3, from: 0, to: 2 }] : [])]
}
const rowsIn = (numbers: readonly number[], shape: readonly number[], from: number, to: number) => {
  const width = sizeOf(shape.slice(1))
  return numbers.slice(from * width, to * width)
}
const shapeOfRows = (shape: readonly number[], rows: number) => (shape.length === 0 ? [] : [rows, ...shape.slice(1)])

/** Sums of this rank's rows, as new tensors and in place, and the tensors gathered from all ranks' rows. */
async function exerciseShards(ranks: Communicator, backend: Backend) {
  const { rank, size } = ranks
  const tensors = shapesOf(size).map(shape => tensor(numbersOf(rank, sizeOf(shape)), shape, { backend }))
  const dealt = (of: readonly Tensor[]) =>
    Array.from({ length: size }, (_, r) => runsOf(r, size).map(({ of: i, from, to }) => ({ tensor: of[i], from, to })))
  const sums = await plain(await ranks.reduceScatterRows(dealt(tensors)))
  const places = runsOf(rank, size).map(({ of, from, to }) => {
    const shape = shapesOf(size)[of]
    return to - from === (shape[0] ?? 1) ? tensors[of] : zeros(shapeOfRows(shape, to - from), { backend })
  })
  const inPlace = backend.write ? await plain(await ranks.reduceScatterRows(dealt(tensors), places)) : sums
  const parameters = shapesOf(size).map(shape => new Parameter(zeros(shape, { backend })))
  const own = runsOf(rank, size).map(({ of, from, to }) => {
    const shape = shapesOf(size)[of]
    const numbers = Float32Array.from(rowsIn([...numbersOf(rank, sizeOf(shape))], shape, from, to))
    const mine = tensor(numbers, shapeOfRows(shape, to - from), { backend })
    if (to - from < (shape[0] ?? 1)) return mine
    parameters[of].assign(mine)
    return parameters[of]
  })
  await ranks.allGatherRows(dealt(parameters), own)
  return [sums, inPlace, await plain(parameters)]
}

/** What `exercise` must return, computed from all ranks' numbers at once. */
export function expected(rank: number, size: number): Record<string, unknown> {
  const members = Math.ceil((size - (rank % 2)) / 2)
  return { ...expectedOfAll(rank, size), inGroup: expectedOfAll(members - 1 - Math.floor(rank / 2), members) }
}

function expectedOfAll(rank: number, size: number): Record<string, unknown> {
  const all = Array.from({ length: size }, (_, r) => r)
  const of = (length: number) => all.map(r => numbersOf(r, length))
  const encode = { f32: Math.fround, i32: whole, bf16: (x: number) => fromBf16(toBf16(x)) }
  const code = { f32: Math.fround, i32: (x: number) => x, bf16: toBf16 }
  const reduced = (dtype: keyof typeof code, length: number, reduction: 'sum' | 'max' | 'mean', shape = [length]) => {
    const data = Array.from({ length }, (_, i) => {
      const column = of(length).map(numbers => encode[dtype](numbers[i]))
      const sum = column.reduce((a, b) => a + b)
      return code[dtype](reduction === 'max' ? Math.max(...column) : reduction === 'mean' ? sum / size : sum)
    })
    return { shape, dtype, data }
  }
  const results: Record<string, unknown> = {}
  for (const reduction of ['sum', 'max', 'mean'] as const) {
    const dtypes = reduction === 'mean' ? (['f32', 'bf16'] as const) : (['f32', 'bf16', 'i32'] as const)
    const vectors = dtypes.flatMap(dtype => [1, size, 23].map(length => reduced(dtype, length, reduction)))
    results[reduction] = [...vectors, reduced('f32', 1, reduction, [])]
  }
  results.inPlace = [reduced('f32', 23, 'sum'), reduced('i32', 1, 'sum')]
  const reducedRows = reduced('f32', 3 * size * 2, 'sum').data
  results.reduceScatter = [{ shape: [3, 2], dtype: 'f32', data: reducedRows.slice(6 * rank, 6 * rank + 6) }]
  const shapes = shapesOf(size)
  const sums = runsOf(rank, size).map(({ of: i, from, to }) => {
    const shape = shapes[i]
    const { data } = reduced('f32', sizeOf(shape), 'sum')
    return { shape: shapeOfRows(shape, to - from), dtype: 'f32', data: rowsIn(data, shape, from, to) }
  })
  const gathered = shapes.map((shape, i) => {
    const runs = all.flatMap(r => runsOf(r, size).map(run => ({ r, ...run })))
    const ofTensor = runs.filter(run => run.of === i)
    const data = ofTensor.flatMap(({ r, from, to }) => rowsIn([...numbersOf(r, sizeOf(shape))], shape, from, to))
    return { shape, dtype: 'f32', data }
  })
  results.shards = [sums, sums, gathered]
  const joined = (length: number) => of(length).flatMap(numbers => [...numbers])
  results.allGather = [
    { shape: [2 * size, 3], dtype: 'f32', data: joined(6) },
    { shape: [size], dtype: 'f32', data: joined(1) },
  ]
  const counts = all.map(from => rowsFor(from, rank))
  const rows = all.flatMap(from => {
    const given = all.map(to => rowsFor(from, to))
    const before = given.slice(0, rank).reduce((sum, count) => sum + count, 0)
    const total = given.reduce((sum, count) => sum + count)
    return [...numbersOf(from, total * 3).subarray(3 * before, 3 * (before + given[rank]))]
  })
  const exchanged = [{ shape: [rows.length / 3, 3], dtype: 'f32', data: rows }]
  results.allToAll = [counts, exchanged, counts, exchanged]
  results.broadcast = all.map(root => [
    { shape: [5], dtype: 'f32', data: [...numbersOf(root, 5)] },
    { shape: [4], dtype: 'i32', data: [...numbersOf(root, 4)].map(whole) },
  ])
  const previous = numbersOf((rank - 1 + size) % size, 8)
  if (size > 1) {
    results.ring = [
      { shape: [4], dtype: 'f32', data: [...previous.subarray(0, 4)] },
      { shape: [2, 2], dtype: 'f32', data: [...previous.subarray(4)] },
    ]
  }
  return results
}
