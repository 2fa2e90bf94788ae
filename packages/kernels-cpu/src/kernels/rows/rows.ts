/** @file Rows by index: takeRows, scatterAddRows, setRows. */
import { sizeOf } from '@moe/core'
import { bySize, type PrimitiveFactory, pointerOf } from '../../native.ts'

export const takeRows: PrimitiveFactory<'takeRows'> = native => {
  const kernelFor = bySize(native, 'take_rows')
  return ([x, index], _attrs, [spec]) => {
    const y = native.output(spec)
    const width = sizeOf(x.shape.slice(1))
    kernelFor(spec.dtype)(y.pointer, pointerOf(x), pointerOf(index), sizeOf(index.shape), x.shape[0], width)
    return [y]
  }
}

export const scatterAddRows: PrimitiveFactory<'scatterAddRows'> = native => {
  const f32 = native.kernel('moe_scatter_add_rows_f32')
  const i32 = native.kernel('moe_scatter_add_rows_i32')
  return ([index, source], { rows }, [spec]) => {
    const y = native.output(spec)
    const width = sizeOf(spec.shape.slice(1))
    const kernel = spec.dtype === 'f32' ? f32 : i32
    kernel(y.pointer, pointerOf(index), pointerOf(source), sizeOf(index.shape), rows, width)
    return [y]
  }
}

export const setRows: PrimitiveFactory<'setRows'> = native => {
  const kernelFor = bySize(native, 'set_rows')
  return ([x, index, source], { donate }, [spec]) => {
    const y = donate ? native.donated(x) : native.copied(x)
    const width = sizeOf(x.shape.slice(1))
    kernelFor(spec.dtype)(y.pointer, pointerOf(index), pointerOf(source), sizeOf(index.shape), x.shape[0], width)
    return [y]
  }
}
