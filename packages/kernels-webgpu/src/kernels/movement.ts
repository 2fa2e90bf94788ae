/** @file Movement: elements go as their bits from one nest of strides to another. */
import type { Kernel, PrimitiveAttrs, Shape, TensorSpec, Value } from '@moe/core'
import { broadcastStrides, mergeAxes, rowMajor } from '@moe/core/strides'
import { type Program, word } from '../commands.ts'
import { bufferOf, countOf, type DeviceOps, eachElement, placeInNest } from '../device-ops.ts'
import type { Buffer } from '../memory.ts'
import { filled } from './elementwise.ts'

const moved: Program = {
  label: 'move',
  buffers: ['x u32', 'y* u32'],
  body: `${placeInNest}${eachElement(`
  let rank = p(1u);
  let sizes = 4u;
  y[p(3u) + place(i, sizes, sizes + 2u * rank)] = x[p(2u) + place(i, sizes, sizes + rank)];`)}`,
}

interface Side {
  readonly start: number
  readonly strides: readonly number[]
}

function move(gpu: DeviceOps, x: Buffer, y: Buffer, shape: Shape, from: Side, to: Side): void {
  const count = shape.reduce((product, size) => product * size, 1)
  if (count === 0) return
  const { sizes, strides } = mergeAxes(shape, [from.strides, to.strides])
  gpu.each(moved, [x, y], count, [sizes.length, from.start, to.start, ...sizes, ...strides[0], ...strides[1]])
}

const whole = ({ shape }: TensorSpec): Side => ({ start: 0, strides: rowMajor(shape) })

const offset = (starts: readonly number[], strides: readonly number[]) =>
  starts.reduce((sum, at, axis) => sum + at * strides[axis], 0)

export const reshape =
  (gpu: DeviceOps): Kernel<PrimitiveAttrs['reshape']> =>
  ([x]) => [gpu.memory.share(bufferOf(x))]

/** An op whose output is `x` seen through `side`. */
const seen =
  <Attrs>(op: string, side: (x: Value, attrs: Attrs, spec: TensorSpec) => Side) =>
  (gpu: DeviceOps): Kernel<Attrs> =>
  ([x], attrs, [spec]) => {
    const y = gpu.output(op, spec)
    move(gpu, bufferOf(x), y, spec.shape, side(x, attrs, spec), whole(spec))
    return [y]
  }

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
    gpu.each(filled, [y], countOf(spec), [spec.dtype === 'f32' ? word(value) : value])
    const { strides } = whole(spec)
    move(gpu, bufferOf(x), y, x.shape, whole(x), { start: offset(before, strides), strides })
    return [y]
  }

export const concat =
  (gpu: DeviceOps): Kernel<PrimitiveAttrs['concat']> =>
  (parts, { axis }, [spec]) => {
    const y = gpu.output('concat', spec)
    const { strides } = whole(spec)
    let done = 0
    for (const part of parts) {
      move(gpu, bufferOf(part), y, part.shape, whole(part), { start: done * strides[axis], strides })
      done += part.shape[axis]
    }
    return [y]
  }
