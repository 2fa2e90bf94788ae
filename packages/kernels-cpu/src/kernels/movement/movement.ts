/** @file Ops that move elements: reshape, permute, expand, slice, pad, concat. */
import { bitsOf, type DType, dtypeBytes, sizeOf } from '@moe/core'
import { broadcastStrides, mergeAxes, rowMajor } from '@moe/core/strides'
import { bySize, type Native, type PrimitiveFactory, pointerOf } from '../../native.ts'

export const reshape: PrimitiveFactory<'reshape'> = native => {
  return ([x]) => [native.shared(x)]
}

type CopyBox = (dtype: DType, to: number, from: number, sizes: readonly number[], strides: [number[], number[]]) => void

/** Copies a box of `sizes` between two buffers; strides are in elements: [of the destination, of the source]. */
function boxCopier(native: Native): CopyBox {
  const kernelFor = bySize(native, 'copy_box')
  return (dtype, to, from, sizes, strides) => {
    const nest = mergeAxes(sizes, strides)
    kernelFor(dtype)(to, from, nest.sizes.length, ...nest.sizes, ...nest.strides[0], ...nest.strides[1])
  }
}

const offsetOf = (starts: readonly number[], strides: readonly number[]) =>
  starts.reduce((sum, start, axis) => sum + start * strides[axis], 0)

export const permute: PrimitiveFactory<'permute'> = native => {
  const copyFor = bySize(native, 'copy_box')
  const transposeFor = bySize(native, 'transpose')
  return ([x], { axes }, [spec]) => {
    const strides = rowMajor(x.shape)
    const { sizes, strides: merged } = mergeAxes(spec.shape, [rowMajor(spec.shape), axes.map(axis => strides[axis])])
    const [to, from] = merged
    const y = native.output(spec)
    const last = sizes.length - 1
    // The axis along which the source is contiguous.
    const dense = from.indexOf(1)
    if (sizeOf(spec.shape) === 0) return [y]
    if (from[last] === 1 || dense < 0) {
      copyFor(spec.dtype)(y.pointer, pointerOf(x), sizes.length, ...sizes, ...to, ...from)
      return [y]
    }
    const others = sizes.map((_, axis) => axis).filter(axis => axis !== last && axis !== dense)
    const nest = [
      ...others.map(axis => sizes[axis]),
      ...others.map(axis => to[axis]),
      ...others.map(axis => from[axis]),
    ]
    const outer = others.length === 0 ? [1, 1, 0, 0] : [others.length, ...nest]
    const [stepTo, stepFrom] = [to[dense], from[last]]
    transposeFor(spec.dtype)(y.pointer, pointerOf(x), sizes[dense], sizes[last], stepTo, stepFrom, ...outer)
    return [y]
  }
}

export const expand: PrimitiveFactory<'expand'> = native => {
  const copyBox = boxCopier(native)
  return ([x], _attrs, [spec]) => {
    const y = native.output(spec)
    const strides: [number[], number[]] = [rowMajor(spec.shape), broadcastStrides(x.shape, spec.shape)]
    copyBox(spec.dtype, y.pointer, pointerOf(x), spec.shape, strides)
    return [y]
  }
}

export const slice: PrimitiveFactory<'slice'> = native => {
  const copyBox = boxCopier(native)
  return ([x], { starts }, [spec]) => {
    const y = native.output(spec)
    const strides = rowMajor(x.shape)
    const from = pointerOf(x) + offsetOf(starts, strides) * dtypeBytes[spec.dtype]
    copyBox(spec.dtype, y.pointer, from, spec.shape, [rowMajor(spec.shape), strides])
    return [y]
  }
}

export const pad: PrimitiveFactory<'pad'> = native => {
  const copyBox = boxCopier(native)
  const fillFor = bySize(native, 'fill')
  return ([x], { before, value }, [spec]) => {
    const y = native.output(spec)
    fillFor(spec.dtype)(y.pointer, sizeOf(spec.shape), bitsOf(value, spec.dtype))
    const strides = rowMajor(spec.shape)
    const to = y.pointer + offsetOf(before, strides) * dtypeBytes[spec.dtype]
    copyBox(spec.dtype, to, pointerOf(x), x.shape, [strides, rowMajor(x.shape)])
    return [y]
  }
}

export const concat: PrimitiveFactory<'concat'> = native => {
  const copyBox = boxCopier(native)
  return (parts, { axis }, [spec]) => {
    const y = native.output(spec)
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
