/** @file Movement ops: copies elements as bits between two nests of strides. */
import type { Kernel, PrimitiveAttrs, Shape, TensorSpec, Value } from '@moe/core'
import { broadcastStrides, mergeAxes, rowMajor } from '@moe/core/strides'
import { bufferOf, countOf, type DeviceOps, eachElement, placeInNest } from '../device-ops.ts'
import type { Buffer } from '../memory.ts'
import { fillAll } from './elementwise.ts'
import { compute, put, putsInto, readBits } from './packed.ts'

interface Side {
  readonly start: number
  readonly strides: readonly number[]
}

/** Words: 1 axes, 2 offset of element 0, then sizes and strides. */
const nestOf = (shape: Shape, { start, strides }: Side): readonly number[] => {
  const nest = mergeAxes(shape, [strides])
  return [nest.sizes.length, start, ...nest.sizes, ...nest.strides[0]]
}

const placed = 'p(2u) + place(i, 3u, 3u + p(1u))'

/** An op whose output is `x` read as described by `side`. */
const seen =
  <Attrs>(op: string, side: (x: Value, attrs: Attrs, spec: TensorSpec) => Side) =>
  (gpu: DeviceOps): Kernel<Attrs> =>
  ([x], attrs, [spec]) => {
    const { shape, dtype } = spec
    const y = gpu.output(op, spec)
    if (countOf(spec) === 0) return [y]
    const functions = `${placeInNest}${readBits('x', dtype)}
fn bits(i: u32) -> u32 { return x_at(${placed}); }`
    const program = { label: 'seen', buffers: ['x u32'], functions, dtype }
    compute(gpu, program, [bufferOf(x)], y, shape, nestOf(shape, side(x, attrs, spec)))
    return [y]
  }

/** Copies all of `x` into a part of `y`. */
function placeIn(gpu: DeviceOps, x: Value, y: Buffer, side: Side): void {
  if (countOf(x) === 0) return
  const { dtype, shape } = x
  const program = {
    label: `placed ${dtype}`,
    buffers: ['x u32', putsInto(dtype)],
    body: `${placeInNest}${readBits('x', dtype)}${put(dtype)}${eachElement(`put(${placed}, x_at(i));`)}`,
  }
  gpu.each(program, [bufferOf(x), y], countOf(x), nestOf(shape, side))
}

const offset = (starts: readonly number[], strides: readonly number[]) =>
  starts.reduce((sum, at, axis) => sum + at * strides[axis], 0)

export const reshape =
  (gpu: DeviceOps): Kernel<PrimitiveAttrs['reshape']> =>
  ([x]) => [gpu.memory.share(bufferOf(x))]

export const permute = seen<PrimitiveAttrs['permute']>('permute', ({ shape }, { axes }) => {
  const strides = rowMajor(shape)
  return { start: 0, strides: axes.map(axis => strides[axis]) }
})

export const expand = seen<PrimitiveAttrs['expand']>('expand', (x, _, { shape }) => ({
  start: 0,
  strides: broadcastStrides(x.shape, shape),
}))

export const slice = seen<PrimitiveAttrs['slice']>('slice', ({ shape }, { starts }) => {
  const strides = rowMajor(shape)
  return { start: offset(starts, strides), strides }
})

export const pad =
  (gpu: DeviceOps): Kernel<PrimitiveAttrs['pad']> =>
  ([x], { before, value }, [spec]) => {
    const y = gpu.output('pad', spec)
    fillAll(gpu, y, spec.dtype, value)
    const strides = rowMajor(spec.shape)
    placeIn(gpu, x, y, { start: offset(before, strides), strides })
    return [y]
  }

export const concat =
  (gpu: DeviceOps): Kernel<PrimitiveAttrs['concat']> =>
  (parts, { axis }, [spec]) => {
    const y = gpu.output('concat', spec)
    const strides = rowMajor(spec.shape)
    let done = 0
    for (const part of parts) {
      placeIn(gpu, part, y, { start: done * strides[axis], strides })
      done += part.shape[axis]
    }
    return [y]
  }
