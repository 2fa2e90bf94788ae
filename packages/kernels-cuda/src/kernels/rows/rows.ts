/** @file Rows by index: takeRows, scatterAddRows, setRows. */
import { dtypeBytes, sizeOf } from '@moe/core'
import { mostBlocks } from '../../modules.ts'
import { elementwiseGrid, type PrimitiveFactory, pointerOf } from '../../native.ts'
import { byUnit, unitOf } from '../movement/units.ts'

export const takeRows: PrimitiveFactory<'takeRows'> = cuda => {
  const kernelFor = byUnit(cuda, 'rows', 'moe_take_rows', 'p p p l i l')
  return ([x, index], _attrs, [spec]) => {
    const y = cuda.output(spec)
    const n = sizeOf(index.shape)
    const bytes = sizeOf(x.shape.slice(1)) * dtypeBytes[spec.dtype]
    const unit = unitOf(bytes)
    const width = bytes / unit
    const launch = { grid: elementwiseGrid(cuda, n * width), block: 256 }
    kernelFor(unit)(launch, y.pointer, pointerOf(x), pointerOf(index), n, x.shape[0], width)
    return [y]
  }
}

/** Up to this many indices, every block of setRows searches all of them for a later source of its row. */
const fewRows = 4096

export const setRows: PrimitiveFactory<'setRows'> = cuda => {
  const kernelFor = byUnit(cuda, 'rows', 'moe_set_rows', 'p p p p i i l')
  const findLast = cuda.kernel('rows', 'moe_set_rows_last', 'p p i i')
  return ([x, index, source], { donate }, [spec]) => {
    const y = donate ? cuda.donated(x) : cuda.copied(x)
    const n = sizeOf(index.shape)
    const rows = x.shape[0]
    const bytes = sizeOf(x.shape.slice(1)) * dtypeBytes[spec.dtype]
    const unit = unitOf(bytes)
    const width = bytes / unit
    let last = 0
    if (n > fewRows) {
      last = cuda.scratch(rows * 4).pointer
      cuda.clear(last, rows * 4)
      findLast({ grid: elementwiseGrid(cuda, n), block: 256 }, last, pointerOf(index), n, rows)
    }
    // Eight units per thread.
    const launch = { grid: [n, Math.min(Math.ceil(width / 1024), mostBlocks[1])], block: 128 }
    kernelFor(unit)(launch, y.pointer, pointerOf(index), pointerOf(source), last, n, rows, width)
    return [y]
  }
}

export const scatterAddRows: PrimitiveFactory<'scatterAddRows'> = cuda => {
  const count = cuda.kernel('rows', 'moe_scatter_count', 'p p p l i')
  const reserve = cuda.kernel('rows', 'moe_scatter_reserve', 'p p p p p l i')
  const list = cuda.kernel('rows', 'moe_scatter_list', 'p p p p l i')
  const sort = cuda.kernel('rows', 'moe_scatter_sort', 'p p p p p l i')
  const add = {
    f32: cuda.kernel('rows', 'moe_scatter_add_f32', 'p p p p p i l'),
    i32: cuda.kernel('rows', 'moe_scatter_add_i32', 'p p p p p i l'),
  }
  return ([index, source], { rows }, [spec]) => {
    const y = cuda.output(spec)
    const n = sizeOf(index.shape)
    const width = sizeOf(spec.shape.slice(1))
    const to = pointerOf(index)
    const each = { grid: elementwiseGrid(cuda, n), block: 256 }
    // After the counts: the total length of all lists so far.
    const counts = cuda.scratch(rows * 4 + 4).pointer
    const [starts, arrivals, lists, sorted] = [rows, n, n, n].map(length => cuda.scratch(length * 4).pointer)
    cuda.clear(counts, rows * 4 + 4)
    count(each, counts, arrivals, to, n, rows)
    reserve(each, starts, counts + rows * 4, counts, arrivals, to, n, rows)
    list(each, lists, starts, arrivals, to, n, rows)
    sort(each, sorted, lists, starts, counts, to, n, rows)
    const launch = { grid: elementwiseGrid(cuda, rows * width), block: 256 }
    add[spec.dtype as 'f32' | 'i32'](launch, y.pointer, pointerOf(source), sorted, starts, counts, rows, width)
    return [y]
  }
}
