/** @file Sums and maxima over any axes: a pass over [outer, count, inner] for every run of adjacent axes, and two if an axis is long. */
import type { ReduceCode, Shape } from '@moe/core'
import type { CudaKernel } from '../../modules.ts'
import { type Cuda, type PrimitiveFactory, pointerOf } from '../../native.ts'

type Pass = [outer: number, count: number, inner: number]

/** The passes over `axes`, last axes first. */
export function reducePasses(shape: Shape, axes: readonly number[]): Pass[] {
  const passes: Pass[] = []
  let inner = 1
  let axis = shape.length - 1
  while (axis >= 0) {
    if (!axes.includes(axis)) {
      inner *= shape[axis--]
      continue
    }
    let count = 1
    // An axis of size 1 between two reduced axes does not separate them.
    while (axis >= 0 && (axes.includes(axis) || shape[axis] === 1)) count *= shape[axis--]
    let outer = 1
    for (let i = 0; i <= axis; i++) outer *= shape[i]
    passes.push([outer, count, inner])
  }
  return passes
}

const threads = 256
/** Number of blocks that keeps a device busy. It is the same on all devices, because it determines the order of additions. */
const busyBlocks = 512

const powerOfTwo = (atLeast: number) => 2 ** Math.ceil(Math.log2(Math.max(atLeast, 1)))

interface Launch {
  readonly grid: number
  /** Threads per chunk of a row, or packs of columns per block. */
  readonly width: number
  /** Elements of a chunk along the reduced axis. */
  readonly chunk: number
  readonly chunks: number
}

/** How to split [outer, count, 1]: into chunks of whole packs, so that rows stay aligned. */
export function rowLaunch(outer: number, count: number): Launch {
  // At most a warp if that is enough, because it needs no barrier.
  const width = count <= 1024 ? Math.min(powerOfTwo(count / 8), 32) : threads
  let chunk = Math.max(count, 1)
  if (outer < busyBlocks && count > 16384) {
    chunk = Math.max(8192, Math.ceil(count / Math.ceil((2 * busyBlocks) / outer) / 4) * 4)
  }
  const chunks = Math.ceil(Math.max(count, 1) / chunk)
  return { grid: Math.ceil((outer * chunks * width) / threads), width, chunk, chunks }
}

/** How to split [outer, count, inner]. */
export function columnLaunch(outer: number, count: number, inner: number): Launch {
  const across = outer * (inner % 4 === 0 ? inner / 4 : inner)
  // With many columns, one thread processes a whole column; otherwise several share it, as long as there are rows for them.
  const narrow = Math.max(Math.min(powerOfTwo(across), 32), threads / powerOfTwo(count))
  const width = across >= busyBlocks * threads ? threads : Math.min(narrow, threads)
  const tiles = Math.ceil(across / width)
  const lines = threads / width
  let chunk = Math.max(count, 1)
  if (tiles < busyBlocks && count > 64 * lines) {
    chunk = Math.max(16 * lines, Math.ceil(count / Math.ceil((2 * busyBlocks) / tiles)))
  }
  const chunks = Math.ceil(Math.max(count, 1) / chunk)
  return { grid: tiles * chunks, width, chunk, chunks }
}

interface Kernels {
  readonly rows: CudaKernel
  readonly columns: CudaKernel
}

function kernelsOf(cuda: Cuda, code: ReduceCode, dtype: string): Kernels {
  return {
    rows: cuda.kernel('reduce', `moe_reduce_${code}_${dtype}_rows`, 'p p l l l i i'),
    columns: cuda.kernel('reduce', `moe_reduce_${code}_${dtype}_columns`, 'p p l l l l i i'),
  }
}

export const reduce: PrimitiveFactory<'reduce'> = cuda => {
  const kernels = {
    sum: { f32: kernelsOf(cuda, 'sum', 'f32'), i32: kernelsOf(cuda, 'sum', 'i32') },
    max: { f32: kernelsOf(cuda, 'max', 'f32'), i32: kernelsOf(cuda, 'max', 'i32') },
  }
  return ([x], { code, axes }, [spec]) => {
    const { rows, columns } = kernels[code][spec.dtype as 'f32' | 'i32']
    const y = cuda.output(spec)
    const passes = reducePasses(x.shape, axes)
    let from = pointerOf(x)
    for (let pass = passes.shift(); pass !== undefined; pass = passes.shift()) {
      const [outer, count, inner] = pass
      const { grid, width, chunk, chunks } = inner === 1 ? rowLaunch(outer, count) : columnLaunch(outer, count, inner)
      if (chunks > 1) passes.unshift([outer, chunks, inner])
      const to = passes.length === 0 ? y.pointer : cuda.scratch(outer * chunks * inner * 4).pointer
      const launch = { grid, block: threads }
      if (inner === 1) rows(launch, to, from, outer, count, chunk, chunks, width)
      else columns(launch, to, from, outer, count, inner, chunk, chunks, width)
      from = to
    }
    return [y]
  }
}
