/** @file Rows that belong to ranks: they travel in buckets that have as much of every rank's share, so that all send and receive all the time. */
import { type DType, MoeError, type Rows, type Shape, sameShape, sizeOf, type Tensor } from '@moe/core'
import type { Memory, Workspace } from './carrier.ts'
import { checkReduction } from './reduce.ts'

/** Rows for each rank. */
export type Shares = ReadonlyArray<readonly Rows[]>

/** Some of the elements of rows, counted from the first of these. */
export interface Part {
  /** Number of the rows in a share. */
  readonly index: number
  readonly from: number
  readonly to: number
}

/** The elements of rows, counted from the first of the tensor. */
export function elementsOf({ tensor, from, to }: Rows): Omit<Part, 'index'> {
  const width = sizeOf(tensor.shape.slice(1))
  return { from: from * width, to: to * width }
}

export const lengthOf = (parts: ReadonlyArray<Omit<Part, 'index'>>): number =>
  parts.reduce((sum, { from, to }) => sum + to - from, 0)

/** As a tensor of their own. */
export const shapeOf = ({ tensor: { shape }, from, to }: Rows): Shape =>
  shape.length === 0 ? shape : [to - from, ...shape.slice(1)]

/** Of each rank up to `most` elements at a time, until nothing is left of any. */
export function* partsInBuckets(shares: Shares, most: number): Generator<Part[][]> {
  const left = shares.map(share =>
    share.map((rows, index): Part => ({ index, from: 0, to: lengthOf([elementsOf(rows)]) })),
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

/** Elements of tensors that several buckets have parts of: they are asked for once. */
export class Sources<E> {
  readonly #memory: Memory<E>
  readonly #left = new Map<Tensor, number>()
  readonly #elements = new Map<Tensor, Promise<E>>()

  /** @param all that will be taken, each once */
  constructor(memory: Memory<E>, all: readonly Rows[]) {
    this.#memory = memory
    for (const rows of all)
      this.#left.set(rows.tensor, (this.#left.get(rows.tensor) ?? 0) + lengthOf([elementsOf(rows)]))
  }

  /** Elements of rows, counted from the first of these. */
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

/** What elements come to. */
export interface Target<E> {
  readonly length: number
  /** All of them have come. */
  readonly finish: (space: Workspace<E>, elements: E) => unknown
}

/** Puts together what comes in parts. */
export class Assembly<E> {
  readonly #memory: Memory<E>
  readonly #dtype: DType
  readonly #begun = new Map<Target<E>, { readonly space: Workspace<E>; readonly elements: E; left: number }>()

  constructor(memory: Memory<E>, dtype: DType) {
    this.#memory = memory
    this.#dtype = dtype
  }

  /** Elements from number `at` on of a target. */
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
      begun.space.close()
    }
  }

  /** Gives back what did not come to its end. */
  close(): void {
    for (const { space } of this.#begun.values()) space.close()
  }

  #begin(target: Target<E>) {
    const space = this.#memory.open()
    const begun = { space, elements: space.make(this.#dtype, target.length), left: target.length }
    this.#begun.set(target, begun)
    return begun
  }
}

/** @returns the dtype of all; null where there is nothing to share. @throws MoeError E_SHAPE, E_DTYPE for what cannot be shared out so */
export function checkShares(op: string, shares: Shares, size: number): DType | null {
  if (shares.length !== size)
    throw refusal(op, `there are ${shares.length} shares for ${size} ranks`, 'give one for each, be it empty')
  const all = shares.flat()
  if (all.length === 0) return null
  const [{ tensor: first }] = all
  checkReduction(op, first.dtype, 'sum')
  for (const { tensor, from, to } of all) {
    const rows = tensor.shape[0] ?? 1
    if (!(Number.isSafeInteger(from) && Number.isSafeInteger(to) && 0 <= from && from < to && to <= rows))
      throw refusal(op, `[${tensor.shape}] has no rows from ${from} to before ${to}`, `give some of its ${rows}`)
    if (tensor.dtype === first.dtype) continue
    const problem = `there are tensors of ${first.dtype} and of ${tensor.dtype}`
    throw new MoeError({ code: 'E_DTYPE', op, problem, fix: 'make a call for each' })
  }
  return first.dtype
}

/** @throws MoeError E_SHAPE unless there is a tensor for each of the rows */
export function checkOwn(op: string, share: readonly Rows[], own: readonly Tensor[]): void {
  if (own.length === share.length && own.every(({ shape }, i) => sameShape(shape, shapeOf(share[i])))) return
  const show = (shapes: readonly Shape[]) => shapes.map(shape => `[${shape}]`).join(', ') || 'nothing'
  const problem = `this rank's share is ${show(share.map(shapeOf))}, given is ${show(own.map(({ shape }) => shape))}`
  throw refusal(op, problem, 'give a tensor for each of its rows')
}

/** The tensors that shares are of. @throws MoeError E_SHAPE where a row is nobody's, or several ranks' */
export function wholeTensors(op: string, shares: Shares): Tensor[] {
  const runs = new Map<Tensor, Rows[]>()
  for (const rows of shares.flat()) runs.set(rows.tensor, [...(runs.get(rows.tensor) ?? []), rows])
  for (const [{ shape }, of] of runs) {
    const end = of.sort((a, b) => a.from - b.from).reduce((end, { from, to }) => (from === end ? to : Number.NaN), 0)
    if (end !== (shape[0] ?? 1))
      throw refusal(op, `the shares do not make up [${shape}]`, 'give each of its rows to one rank')
  }
  return [...runs.keys()]
}

const refusal = (op: string, problem: string, fix: string) => new MoeError({ code: 'E_SHAPE', op, problem, fix })
