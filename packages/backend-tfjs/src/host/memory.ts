/**
 * @file Direct views of tensor memory on the two backends whose memory JavaScript can access: `cpu` (typed arrays) and `wasm` (one heap).
 *
 * Plain loops over these views compute what the kernels do inexactly, slowly or not at all. A view of the wasm heap is only valid until the next allocation, so
 * allocate all outputs first and then take views.
 */
import { type Shape, sizeOf, type Value } from '@moe/core'
import type { TfDType, TfKernelBackend, TfTensor, TfTensorInfo } from '../namespace.ts'
import { type Runner, tensorOf } from '../runner.ts'

export type Elements = Float32Array | Int32Array | Uint8Array

export interface Host {
  readonly runner: Runner
  /** Whether matrix products without transposition are much faster than others (XNNPACK on wasm). */
  readonly plainProducts: boolean
  /** A new tensor with undefined contents. */
  output(shape: Shape, dtype: TfDType): TfTensor
  /** The elements of a tensor; valid until the next allocation. */
  view(tensor: TfTensor): Elements
}

interface CpuBackend extends TfKernelBackend {
  readonly data: { get(dataId: object): { values: Elements } }
  makeTensorInfo(shape: number[], dtype: string, values: Elements): TfTensorInfo
}

interface WasmBackend extends TfKernelBackend {
  makeOutput(shape: number[], dtype: string): TfTensorInfo
  typedArrayFromHeap(tensor: TfTensorInfo): Elements
  getMemoryOffset(dataId: object): number
}

const arrays = { float32: Float32Array, int32: Int32Array, bool: Uint8Array }

/** Host memory of a runner, or null if JavaScript cannot access it. */
export function hostMemory(runner: Runner): Host | null {
  if (runner.name === 'cpu') {
    const backend = runner.backend as CpuBackend
    return {
      runner,
      plainProducts: false,
      output: (shape, dtype) =>
        runner.adopt(backend.makeTensorInfo(shape.slice(), dtype, new arrays[dtype](sizeOf(shape)))),
      view: tensor => backend.data.get(tensor.dataId).values,
    }
  }
  if (runner.name === 'wasm') {
    const backend = runner.backend as WasmBackend
    return {
      runner,
      plainProducts: true,
      output: (shape, dtype) => runner.adopt(backend.makeOutput(shape.slice(), dtype)),
      view: tensor => backend.typedArrayFromHeap(tensor),
    }
  }
  return null
}

/** Whether the allocation of a wasm tensor failed: the allocator returns address 0, which the library does not check. */
export function wasmAllocationFailed(backend: TfKernelBackend): (tensor: TfTensor) => boolean {
  const { getMemoryOffset } = backend as WasmBackend
  return tensor => getMemoryOffset.call(backend, tensor.dataId) === 0 && sizeOf(tensor.shape) > 0
}

export const f32Of = (host: Host, value: Value): Float32Array => host.view(tensorOf(value)) as Float32Array
export const i32Of = (host: Host, value: Value): Int32Array => host.view(tensorOf(value)) as Int32Array
export const elementsOf = (host: Host, value: Value): Elements => host.view(tensorOf(value))
export const tfDType = (dtype: string): TfDType => (dtype === 'f32' ? 'float32' : dtype === 'i32' ? 'int32' : 'bool')
