/**
 * @file Short names for the TensorFlow.js kernels that the device tier is built from. Every one of them exists on the tensorflow (CPU and
 * GPU), webgpu, webgl, wasm and cpu backends.
 */
import { type DType, type Shape, sameShape, sizeOf } from '@moe/core'
import type { TfDType, TfTensor } from '../namespace.ts'
import type { Runner } from '../runner.ts'

export interface Device {
  readonly runner: Runner
  /** Whether reading a tensor returns at once instead of a promise. Never true of webgpu. */
  readonly syncReads: boolean
  /** What this backend's own kernels do with NaN, as tried out when the backend was made. */
  readonly maxKeepsNaN: boolean
  readonly maximumKeepsNaN: boolean
}

/** u8 is held as int32, or as bool where it is known to be 0 or 1 (results of comparisons). */
export const tfDType = (dtype: DType): TfDType => (dtype === 'f32' ? 'float32' : 'int32')

export function ops(runner: Runner) {
  const run = runner.run
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
    cast: (x: TfTensor, dtype: TfDType) => (x.dtype === dtype ? x : run('Cast', { x }, { dtype })),
    add: (a: TfTensor, b: TfTensor) => run('Add', { a, b }),
    sub: (a: TfTensor, b: TfTensor) => run('Sub', { a, b }),
    mul: (a: TfTensor, b: TfTensor) => run('Multiply', { a, b }),
    equal: (a: TfTensor, b: TfTensor) => run('Equal', { a, b }),
    notEqual: (a: TfTensor, b: TfTensor) => run('NotEqual', { a, b }),
    less: (a: TfTensor, b: TfTensor) => run('Less', { a, b }),
    lessEqual: (a: TfTensor, b: TfTensor) => run('LessEqual', { a, b }),
    and: (a: TfTensor, b: TfTensor) => run('LogicalAnd', { a, b }),
    isNaN: (x: TfTensor) => run('NotEqual', { a: x, b: x }),
    sum: (x: TfTensor, axes: readonly number[]) => run('Sum', { x }, { axis: axes.slice(), keepDims: false }),
    max: (x: TfTensor, axes: readonly number[]) =>
      run('Max', { x }, { reductionIndices: axes.slice(), keepDims: false }),
    gather: (x: TfTensor, indices: TfTensor) => run('GatherV2', { x, indices }, { axis: 0, batchDims: 0 }),
    slice: (x: TfTensor, begin: readonly number[], size: Shape) =>
      run('Slice', { x }, { begin: begin.slice(), size: size.slice() }),
    concat: (parts: TfTensor[], axis: number) => run('Concat', parts, { axis }),
    matmul: (a: TfTensor, b: TfTensor, transposeA: boolean, transposeB: boolean) =>
      run('BatchMatMul', { a, b }, { transposeA, transposeB }),
    /** Repeats axes of size 1; leading axes of size 1 are added first. */
    expand(x: TfTensor, shape: Shape): TfTensor {
      if (sameShape(x.shape, shape)) return x
      const grown = [...new Array<number>(shape.length - x.shape.length).fill(1), ...x.shape]
      const reps = shape.map((size, axis) => (grown[axis] === size ? 1 : size))
      const from = self.as(x, grown)
      return reps.every(n => n === 1) ? from : run('Tile', { x: from }, { reps })
    },
    /** `condition ? t : e`; kernels want three equal shapes. */
    select: (condition: TfTensor, t: TfTensor, e: TfTensor, shape: Shape) =>
      run('Select', {
        condition: self.expand(condition, shape),
        t: self.expand(t, shape),
        e: self.expand(e, shape),
      }),
    /** The elements, where reads are synchronous. */
    read: (x: TfTensor) => runner.backend.readSync(x.dataId),
  }
  return self
}

export type Ops = ReturnType<typeof ops>
