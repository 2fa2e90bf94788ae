/**
 * @file Short names for the TensorFlow.js kernels that the device modes use. All of them exist on the tensorflow (CPU and GPU), webgpu, webgl, wasm and cpu
 * backends.
 */
import { type DType, type Shape, sameShape, sizeOf } from '@moe/core'
import type { TfDType, TfTensor } from '../namespace.ts'
import type { Runner } from '../runner.ts'

export interface Device {
  readonly runner: Runner
  /** Whether tensors can be read synchronously. Never on webgpu. */
  readonly syncReads: boolean
  /** How the backend's own kernels handle NaN, as tested when the backend was created. */
  readonly maxKeepsNaN: boolean
  readonly maximumKeepsNaN: boolean
}

/** u8 is stored as int32, or as bool if it is known to be 0 or 1 (results of comparisons). */
export const tfDType = (dtype: DType): TfDType => (dtype === 'f32' ? 'float32' : 'int32')

/**
 * @param careful avoids what fails on webgpu: its Transpose, which moves for other kernels, too, takes no integers, and its Cast to f32 leaves integers in the memory
 */
export function ops(runner: Runner, careful = false) {
  const run = runner.run
  /** Moves the axes behind all others if the kernel itself would have to move integers. */
  const innermost = (x: TfTensor, axes: readonly number[]): [TfTensor, number[]] => {
    const rank = x.shape.length
    if (!careful || x.dtype === 'float32' || axes.every(axis => axis >= rank - axes.length)) return [x, axes.slice()]
    const others = x.shape.map((_, axis) => axis).filter(axis => !axes.includes(axis))
    return [self.transpose(x, [...others, ...axes]), axes.map((_, i) => others.length + i)]
  }
  const self = {
    upload(values: Float32Array | Int32Array, shape: Shape): TfTensor {
      const dtype = values instanceof Float32Array ? 'float32' : 'int32'
      const own = shape.slice()
      return runner.adopt({ dataId: runner.backend.write(values, own, dtype), shape: own, dtype })
    },
    fill: (shape: Shape, value: number, dtype: TfDType) =>
      sizeOf(shape) === 0
        ? self.upload(dtype === 'float32' ? new Float32Array(0) : new Int32Array(0), shape)
        : run('Fill', [] as never, { shape: shape.slice(), value, dtype }),
    scalar: (value: number, dtype: TfDType) =>
      self.upload(dtype === 'float32' ? Float32Array.of(value) : Int32Array.of(value), []),
    reshape: (x: TfTensor, shape: Shape) => run('Reshape', { x }, { shape: shape.slice() }),
    as: (x: TfTensor, shape: Shape) => (sameShape(x.shape, shape) ? x : self.reshape(x, shape)),
    cast(x: TfTensor, dtype: TfDType): TfTensor {
      if (x.dtype === dtype) return x
      const y = run('Cast', { x }, { dtype })
      return careful && dtype === 'float32' ? self.mul(y, self.scalar(1, 'float32')) : y
    },
    transpose(x: TfTensor, perm: readonly number[]): TfTensor {
      if (!careful || x.dtype === 'float32') return run('Transpose', { x }, { perm: perm.slice() })
      const shape = perm.map(axis => x.shape[axis])
      const flat = self.reshape(x, [sizeOf(shape)])
      return self.reshape(self.gather(flat, self.upload(placesAfter(x.shape, perm), [sizeOf(shape)])), shape)
    },
    cumsum(x: TfTensor, axis: number): TfTensor {
      const [inner, [last]] = innermost(x, [axis])
      const y = run('Cumsum', { x: inner }, { axis: last, exclusive: false, reverse: false })
      if (inner === x) return y
      const back = x.shape.map((_, i) => (i < axis ? i : i === axis ? last : i - 1))
      return self.transpose(y, back)
    },
    add: (a: TfTensor, b: TfTensor) => run('Add', { a, b }),
    sub: (a: TfTensor, b: TfTensor) => run('Sub', { a, b }),
    mul: (a: TfTensor, b: TfTensor) => run('Multiply', { a, b }),
    equal: (a: TfTensor, b: TfTensor) => run('Equal', { a, b }),
    notEqual: (a: TfTensor, b: TfTensor) => run('NotEqual', { a, b }),
    less: (a: TfTensor, b: TfTensor) => run('Less', { a, b }),
    lessEqual: (a: TfTensor, b: TfTensor) => run('LessEqual', { a, b }),
    and: (a: TfTensor, b: TfTensor) => run('LogicalAnd', { a, b }),
    isNaN: (x: TfTensor) => run('NotEqual', { a: x, b: x }),
    sum(x: TfTensor, axes: readonly number[]): TfTensor {
      const [inner, axis] = innermost(x, axes)
      return run('Sum', { x: inner }, { axis, keepDims: false })
    },
    max(x: TfTensor, axes: readonly number[]): TfTensor {
      const [inner, reductionIndices] = innermost(x, axes)
      return run('Max', { x: inner }, { reductionIndices, keepDims: false })
    },
    /** Pads one axis at a time, as a tensor with three axes: not every kernel supports more than four. */
    pad(x: TfTensor, before: readonly number[], after: readonly number[], constantValue: number): TfTensor {
      const shape = x.shape.slice()
      return shape.reduce((padded, size, axis) => {
        if (before[axis] === 0 && after[axis] === 0) return padded
        const sides = [sizeOf(shape.slice(0, axis)), size, sizeOf(shape.slice(axis + 1))]
        shape[axis] += before[axis] + after[axis]
        const paddings = [
          [0, 0],
          [before[axis], after[axis]],
          [0, 0],
        ]
        const y = run('PadV2', { x: self.reshape(padded, sides) }, { paddings, constantValue })
        return self.reshape(y, shape)
      }, x)
    },
    gather: (x: TfTensor, indices: TfTensor) => run('GatherV2', { x, indices }, { axis: 0, batchDims: 0 }),
    slice: (x: TfTensor, begin: readonly number[], size: Shape) =>
      run('Slice', { x }, { begin: begin.slice(), size: size.slice() }),
    concat: (parts: TfTensor[], axis: number) => run('Concat', parts, { axis }),
    matmul: (a: TfTensor, b: TfTensor, transposeA: boolean, transposeB: boolean) =>
      run('BatchMatMul', { a, b }, { transposeA, transposeB }),
    /** Repeats axes of size 1; missing leading axes are added first. */
    expand(x: TfTensor, shape: Shape): TfTensor {
      if (sameShape(x.shape, shape)) return x
      const grown = [...new Array<number>(shape.length - x.shape.length).fill(1), ...x.shape]
      const reps = shape.map((size, axis) => (grown[axis] === size ? 1 : size))
      const from = self.as(x, grown)
      if (reps.every(n => n === 1)) return from
      if (reps.length <= 4) return run('Tile', { x: from }, { reps })
      // webgpu reads tensors with more axes back to repeat them, so repeat one axis at a time, as a tensor with three.
      return reps.reduce((tiled, n, axis) => {
        if (n === 1) return tiled
        const sides = [sizeOf(grown.slice(0, axis)), 1, sizeOf(grown.slice(axis + 1))]
        grown[axis] = n
        return self.reshape(run('Tile', { x: self.reshape(tiled, sides) }, { reps: [1, n, 1] }), grown)
      }, from)
    },
    /** `condition ? t : e`; the kernels need three equal shapes. */
    select: (condition: TfTensor, t: TfTensor, e: TfTensor, shape: Shape) =>
      run('Select', {
        condition: self.expand(condition, shape),
        t: self.expand(t, shape),
        e: self.expand(e, shape),
      }),
    /** The elements, if reads are synchronous. */
    read: (x: TfTensor) => runner.backend.readSync(x.dataId),
  }
  return self
}

/** The index of each element in an array of this shape, in the order of the permuted axes. */
function placesAfter(shape: Shape, perm: readonly number[]): Int32Array {
  const strides = shape.map((_, axis) => sizeOf(shape.slice(axis + 1)))
  let places = Int32Array.of(0)
  for (const axis of perm) {
    const next = new Int32Array(places.length * shape[axis])
    for (let i = 0, at = 0; i < places.length; i++) {
      for (let j = 0; j < shape[axis]; j++) next[at++] = places[i] + j * strides[axis]
    }
    places = next
  }
  return places
}

export type Ops = ReturnType<typeof ops>
