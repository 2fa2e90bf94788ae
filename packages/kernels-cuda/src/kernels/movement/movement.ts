/** @file Ops that move elements: reshape, permute, expand, slice, pad, concat. */
import { bitsOf, type DType, dtypeBytes, type Shape, sizeOf } from '@moe/core'
import { broadcastStrides, mergeAxes, type Nest, rowMajor } from '@moe/core/strides'
import { bySize, type Cuda, elementwiseGrid, type PrimitiveFactory, pointerOf } from '../../native.ts'
import { nestList } from '../binary/nest.ts'
import { filler } from '../fill/fill.ts'
import { byUnit, unitOf } from './units.ts'

export const reshape: PrimitiveFactory<'reshape'> = cuda => {
  return ([x]) => [cuda.shared(x)]
}

type CopyNest = (dtype: DType, to: number, from: number, nest: Nest) => void

/** Copies between two buffers along a nest with strides of the destination and of the source. */
function nestCopier(cuda: Cuda): CopyNest {
  const kernelFor = byUnit(cuda, 'movement', 'moe_copy_box', 'p p l i l[24]')
  return (dtype, to, from, { sizes, strides }) => {
    const n = sizeOf(sizes)
    if (n === 0) return
    const size = dtypeBytes[dtype]
    const last = sizes.length - 1
    if (!strides.every(stride => stride[last] === 1)) {
      const launch = { grid: elementwiseGrid(cuda, n), block: 256 }
      kernelFor(size)(launch, to, from, n, sizes.length, nestList({ sizes, strides }))
      return
    }
    if (last === 0) {
      cuda.copy(to, from, n * size)
      return
    }
    // Contiguous runs, in the largest unit that their length, strides and addresses allow.
    const outer = strides.flatMap(stride => stride.slice(0, last))
    const unit = unitOf(to, from, ...[sizes[last], ...outer].map(elements => elements * size))
    const inUnits = (elements: number) => (elements * size) / unit
    const nest = {
      sizes: sizes.map((count, axis) => (axis === last ? inUnits(count) : count)),
      strides: strides.map(stride => stride.map((step, axis) => (axis === last ? step : inUnits(step)))),
    }
    const launch = { grid: elementwiseGrid(cuda, inUnits(n)), block: 256 }
    kernelFor(unit)(launch, to, from, inUnits(n), sizes.length, nestList(nest))
  }
}

type CopyBox = (dtype: DType, to: number, from: number, sizes: Shape, strides: [number[], number[]]) => void

/** Copies a box of `sizes` between two buffers; strides are in elements: [of the destination, of the source]. */
function boxCopier(cuda: Cuda): CopyBox {
  const copyNest = nestCopier(cuda)
  return (dtype, to, from, sizes, strides) => copyNest(dtype, to, from, mergeAxes(sizes, strides))
}

const offsetOf = (starts: readonly number[], strides: readonly number[]) =>
  starts.reduce((sum, start, axis) => sum + start * strides[axis], 0)

/** Tile size for transposes. */
const tile = 32

export const permute: PrimitiveFactory<'permute'> = cuda => {
  const copyNest = nestCopier(cuda)
  const transposeFor = bySize(cuda, 'movement', 'moe_transpose', 'p p l l l l i l[24]')
  return ([x], { axes }, [spec]) => {
    const xStrides = rowMajor(x.shape)
    const nest = mergeAxes(spec.shape, [rowMajor(spec.shape), axes.map(axis => xStrides[axis])])
    const { sizes, strides } = nest
    const [to, from] = strides
    const last = sizes.length - 1
    // The order is unchanged.
    if (last === 0 && from[0] === 1) return [cuda.shared(x)]
    const y = cuda.output(spec)
    // The axis along which the source is contiguous. If it is short, tiles would be mostly empty.
    const dense = from.indexOf(1)
    if (dense < 0 || dense === last || Math.min(sizes[dense], sizes[last]) < tile / 4) {
      copyNest(spec.dtype, y.pointer, pointerOf(x), nest)
      return [y]
    }
    const others = sizes.map((_, axis) => axis).filter(axis => axis !== last && axis !== dense)
    const pick = (list: readonly number[]) => others.map(axis => list[axis])
    const outer = { sizes: pick(sizes), strides: strides.map(pick) }
    const [p, q] = [sizes[dense], sizes[last]]
    const grid = Math.ceil(p / tile) * Math.ceil(q / tile) * sizeOf(outer.sizes)
    const kernel = transposeFor(spec.dtype)
    const steps = [to[dense], from[last]] as const
    kernel({ grid, block: 256 }, y.pointer, pointerOf(x), p, q, ...steps, others.length, nestList(outer))
    return [y]
  }
}

export const expand: PrimitiveFactory<'expand'> = cuda => {
  const copyBox = boxCopier(cuda)
  return ([x], _attrs, [spec]) => {
    const y = cuda.output(spec)
    const strides: [number[], number[]] = [rowMajor(spec.shape), broadcastStrides(x.shape, spec.shape)]
    copyBox(spec.dtype, y.pointer, pointerOf(x), spec.shape, strides)
    return [y]
  }
}

export const slice: PrimitiveFactory<'slice'> = cuda => {
  const copyBox = boxCopier(cuda)
  return ([x], { starts }, [spec]) => {
    const y = cuda.output(spec)
    const strides = rowMajor(x.shape)
    const from = pointerOf(x) + offsetOf(starts, strides) * dtypeBytes[spec.dtype]
    copyBox(spec.dtype, y.pointer, from, spec.shape, [rowMajor(spec.shape), strides])
    return [y]
  }
}

/** An axis of a padded tensor: its size, the source's size, the padding before it, and the source's stride. */
type Border = [size: number, inside: number, before: number, stride: number]

/** The axes of a padded tensor, last first; axes without padding are merged into the previous one. */
export function borders(from: Shape, before: readonly number[], to: Shape): Border[] {
  const list: Border[] = []
  let [size, stride] = [1, 1]
  for (let axis = to.length - 1; axis >= 0; axis--) {
    if (to[axis] === from[axis] && axis > 0) {
      size *= to[axis]
      continue
    }
    list.push([size * to[axis], size * from[axis], size * before[axis], stride])
    stride *= size * from[axis]
    size = 1
  }
  return list.length === 0 ? [[1, 1, 0, 1]] : list
}

export const pad: PrimitiveFactory<'pad'> = cuda => {
  const signature = 'p p l i i l[32]'
  const kernels = {
    4: cuda.kernel('movement', 'moe_pad_b32', signature),
    16: cuda.kernel('movement', 'moe_pad_b128', signature),
  }
  const fillAll = filler(cuda)
  const copyBox = boxCopier(cuda)
  return ([x], { before, value }, [spec]) => {
    const y = cuda.output(spec)
    const size = dtypeBytes[spec.dtype]
    if (size < 4) {
      // Rare: in two passes.
      fillAll(y.pointer, spec, value)
      const strides = rowMajor(spec.shape)
      const inside = y.pointer + offsetOf(before, strides) * size
      copyBox(spec.dtype, inside, pointerOf(x), x.shape, [strides, rowMajor(x.shape)])
      return [y]
    }
    const [innermost, ...outer] = borders(x.shape, before, spec.shape)
    const wide = innermost.slice(0, 3).every(count => count % 4 === 0)
    const inUnits = (elements: number) => (wide ? elements / 4 : elements)
    const nest = [
      ...innermost.slice(0, 3).map(inUnits),
      innermost[3],
      ...outer.flatMap(([size, inside, start, stride]) => [size, inside, start, inUnits(stride)]),
    ]
    const n = inUnits(sizeOf(spec.shape))
    const launch = { grid: elementwiseGrid(cuda, n), block: 256 }
    kernels[wide ? 16 : 4](launch, y.pointer, pointerOf(x), n, bitsOf(value, spec.dtype) | 0, nest.length / 4, nest)
    return [y]
  }
}

export const concat: PrimitiveFactory<'concat'> = cuda => {
  const copyBox = boxCopier(cuda)
  return (parts, { axis }, [spec]) => {
    const y = cuda.output(spec)
    const strides = rowMajor(spec.shape)
    let done = 0
    for (const part of parts) {
      const to = y.pointer + done * strides[axis] * dtypeBytes[spec.dtype]
      copyBox(spec.dtype, to, pointerOf(part), part.shape, [strides, rowMajor(part.shape)])
      done += part.shape[axis]
    }
    return [y]
  }
}
