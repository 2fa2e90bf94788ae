/** @file Shards: rows assigned to ranks. They are exchanged in buckets with an equal amount of every rank's shard, so that all ranks send and receive all the time. */
import { type DType, MoeError, type Rows, type Shape, sameShape, sizeOf, type Tensor } from '@moe/core'
import type { Memory, Workspace } from './carrier.ts'
import { checkReduction } from './reduce.ts'

/** The rows assigned to each rank. */
export type Shards = ReadonlyArray<readonly Rows[]>

/** A range of elements of one entry of a shard, counted from the entry's first element. */
export interface Part {
  /** The entry's index in the shard. */
  readonly index: number
  readonly from: number
  readonly to: number
}

/** The range of elements of rows, counted from the tensor's first element. */
export function elementsOf({ tensor, from, to }: Rows): Omit<Part, 'index'> {
  const width = sizeOf(tensor.shape.slice(1))
  return { from: from * width, to: to * width }
}

export const lengthOf = (parts: ReadonlyArray<Omit<Part, 'index'>>): number =>
  parts.reduce((sum, { from, to }) => sum + to - from, 0)

/** The shape of rows as a tensor. */
export const shapeOf = ({ tensor: { shape }, from, to }: Rows): Shape =>
  shape.length === 0 ? shape : [to - from, ...shape.slice(1)]

/** Yields buckets with up to `most` elements of each rank's shard, until all are taken. */
export function* partsInBuckets(shards: Shards, most: number): Generator<Part[][]> {
  const left = shards.map(shard =>
    shard.map((rows, index): Part => ({ index, from: 0, to: lengthOf([elementsOf(rows)]) })),
  )
  while (left.some(parts => parts.length > 0)) yield left.map(parts => takeFrom(parts, most))
}

function takeFrom(parts: Part[], most: number): Part[] {
  const taken: Part[] = []
  for (let room = most; room > 0 && parts.length > 0; room -= lengthOf(taken.slice(-1))) {
    const [{ index, from, to }] = parts
    const end = Math.min(to, from + room)
    taken.push({ index, from, to: end })
    if (end === to) parts.shift()
    else parts[0] = { index, from: end, to }
  }
  return taken
}

/** Caches the elements of tensors that several buckets contain parts of, so that each tensor is read once. */
export class Sources<E> {
  readonly #memory: Memory<E>
  readonly #left = new Map<Tensor, number>()
  readonly #elements = new Map<Tensor, Promise<E>>()

  /** @param all the rows that will be taken, each once */
  constructor(memory: Memory<E>, all: readonly Rows[]) {
    this.#memory = memory
    for (const rows of all)
      this.#left.set(rows.tensor, (this.#left.get(rows.tensor) ?? 0) + lengthOf([elementsOf(rows)]))
  }

  /** Elements `from` to `to` (exclusive) of rows. */
  async take(space: Workspace<E>, rows: Rows, from: number, to: number): Promise<E> {
    const { tensor } = rows
    const { from: first } = elementsOf(rows)
    const elements = this.#elements.get(tensor) ?? this.#memory.of(tensor)
    const left = (this.#left.get(tensor) as number) - (to - from)
    this.#left.set(tensor, left)
    if (left > 0) this.#elements.set(tensor, elements)
    else this.#elements.delete(tensor)
    return space.part(await elements, first + from, first + to)
  }
}

/** A destination of received elements. */
export interface Target<E> {
  readonly length: number
  /** Called when all elements have arrived. */
  readonly finish: (space: Workspace<E>, elements: E) => unknown
}

/** Assembles targets that arrive in parts. */
export class Assembly<E> {
  readonly #memory: Memory<E>
  readonly #dtype: DType
  readonly #begun = new Map<Target<E>, { readonly space: Workspace<E>; readonly elements: E; left: number }>()

  constructor(memory: Memory<E>, dtype: DType) {
    this.#memory = memory
    this.#dtype = dtype
  }

  /** Stores `length` elements of a target, from element `at` on. */
  put(space: Workspace<E>, target: Target<E>, at: number, elements: E, length: number): void {
    if (length === target.length) return void target.finish(space, elements)
    const begun = this.#begun.get(target) ?? this.#begin(target)
    space.copy(space.part(begun.elements, at, at + length), elements)
    begun.left -= length
    if (begun.left > 0) return
    this.#begun.delete(target)
    try {
      target.finish(begun.space, begun.elements)
    } finally {
      begun.space.close(false)
    }
  }

  /** Frees incomplete targets. */
  close(): void {
    for (const { space } of this.#begun.values()) space.close(true)
  }

  #begin(target: Target<E>) {
    const space = this.#memory.open()
    const begun = { space, elements: space.make(this.#dtype, target.length), left: target.length }
    this.#begun.set(target, begun)
    return begun
  }
}

/** @returns the common dtype; null if all shards are empty. @throws MoeError E_SHAPE, E_DTYPE if the shards are invalid */
export function checkShards(op: string, shards: Shards, size: number): DType | null {
  if (shards.length !== size)
    throw shapeError(
      op,
      `got ${shards.length} shards for ${size} ranks`,
      'pass one shard for each rank; it may be empty',
    )
  const all = shards.flat()
  if (all.length === 0) return null
  const [{ tensor: first }] = all
  checkReduction(op, first.dtype, 'sum')
  for (const { tensor, from, to } of all) {
    const rows = tensor.shape[0] ?? 1
    if (!(Number.isSafeInteger(from) && Number.isSafeInteger(to) && 0 <= from && from < to && to <= rows))
      throw shapeError(
        op,
        `row range ${from} to ${to} is invalid for [${tensor.shape}]`,
        `pass a non-empty range within 0 to ${rows}`,
      )
    if (tensor.dtype === first.dtype) continue
    const problem = `the shards mix ${first.dtype} and ${tensor.dtype} tensors`
    throw new MoeError({ code: 'E_DTYPE', op, problem, fix: 'make one call for each dtype' })
  }
  return first.dtype
}

/** @throws MoeError E_SHAPE unless there is a tensor of matching shape for each entry of the shard */
export function checkOwn(op: string, shard: readonly Rows[], own: readonly Tensor[]): void {
  if (own.length === shard.length && own.every(({ shape }, i) => sameShape(shape, shapeOf(shard[i])))) return
  const show = (shapes: readonly Shape[]) => shapes.map(shape => `[${shape}]`).join(', ') || 'nothing'
  const problem = `expected ${show(shard.map(shapeOf))} for this rank's shard, got ${show(own.map(({ shape }) => shape))}`
  throw shapeError(op, problem, "pass one tensor for each entry of this rank's shard")
}

/** The tensors that the shards consist of. @throws MoeError E_SHAPE if a row is in no shard, or in several */
export function wholeTensors(op: string, shards: Shards): Tensor[] {
  const runs = new Map<Tensor, Rows[]>()
  for (const rows of shards.flat()) runs.set(rows.tensor, [...(runs.get(rows.tensor) ?? []), rows])
  for (const [{ shape }, of] of runs) {
    const end = of.sort((a, b) => a.from - b.from).reduce((end, { from, to }) => (from === end ? to : Number.NaN), 0)
    if (end !== (shape[0] ?? 1))
      throw shapeError(op, `the shards do not cover each row of [${shape}] once`, 'assign each row to exactly one rank')
  }
  return [...runs.keys()]
}

const shapeError = (op: string, problem: string, fix: string) => new MoeError({ code: 'E_SHAPE', op, problem, fix })
