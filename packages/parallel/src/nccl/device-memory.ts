/** @file Elements in device memory, which NCCL sends and receives and in which sums are computed. */
import { type DType, dtypeBytes, MoeError, type Shape, type Tensor, type Value } from '@moe/core'
import type { Memory, Workspace } from '../communicator/carrier.ts'
import type { Reduction, TensorLike } from '../communicator/communicator.ts'

/** The interface to a CUDA backend: `interop` of `@moe/kernels-cuda` implements it. Addresses and handles are numbers. */
export interface CudaAccess {
  makeCurrent(): void
  pointerOf(value: Value): number
  allocate(bytes: number): { readonly pointer: number; free(): void }
  tensor(shape: Shape, dtype: DType): Tensor
  copy(to: number, from: number, bytes: number): void
  markModified(value: Value): void
  reduceRanks(
    to: number,
    parts: readonly number[],
    length: number,
    dtype: 'f32' | 'bf16' | 'i32',
    reduction: Reduction,
  ): void
  queue(): DeviceQueue
}

/** A CUDA stream besides the backend's own. */
export interface DeviceQueue {
  readonly handle: number
  waitForBackend(): void
  synchronize(look?: () => void): Promise<void>
  dispose(): void
}

/** Elements on the device. */
export interface DeviceElements {
  readonly pointer: number
  readonly length: number
  readonly dtype: DType
}

export const bytesOf = ({ length, dtype }: DeviceElements): number => length * dtypeBytes[dtype]

export class DeviceMemory implements Memory<DeviceElements> {
  readonly #access: CudaAccess

  constructor(access: CudaAccess) {
    this.#access = access
  }

  async of(tensor: Tensor): Promise<DeviceElements> {
    if (tensor.disposed)
      throw new MoeError({ code: 'E_DISPOSED', op: 'nccl', problem: `a tensor of shape [${tensor.shape}] is disposed` })
    const own = (tensor.backend as { readonly interop?: CudaAccess }).interop
    if (own !== this.#access) {
      throw new MoeError({
        code: 'E_BACKEND',
        op: 'nccl',
        problem: `a tensor on ${tensor.backend.name} is passed to a communicator of another backend`,
        fix: 'create it on the backend that was passed to nccl()',
      })
    }
    return { pointer: this.#access.pointerOf(tensor), length: tensor.size, dtype: tensor.dtype }
  }

  open(): Workspace<DeviceElements> {
    return new DeviceWorkspace(this.#access)
  }
}

class DeviceWorkspace implements Workspace<DeviceElements> {
  readonly #access: CudaAccess
  readonly #made: Array<{ free(): void }> = []

  constructor(access: CudaAccess) {
    this.#access = access
  }

  make(dtype: DType, length: number): DeviceElements {
    if (length === 0) return { pointer: 0, length, dtype }
    const memory = this.#access.allocate(length * dtypeBytes[dtype])
    this.#made.push(memory)
    return { pointer: memory.pointer, length, dtype }
  }

  part({ pointer, dtype }: DeviceElements, from: number, to: number): DeviceElements {
    return { pointer: pointer + from * dtypeBytes[dtype], length: to - from, dtype }
  }

  copy(to: DeviceElements, from: DeviceElements): void {
    this.#access.copy(to.pointer, from.pointer, bytesOf(from))
  }

  reduce(to: DeviceElements, parts: readonly DeviceElements[], dtype: DType, reduction: Reduction): void {
    const pointers = parts.map(({ pointer }) => pointer)
    this.#access.reduceRanks(to.pointer, pointers, to.length, dtype as 'f32', reduction)
  }

  tensor(elements: DeviceElements, { shape, dtype }: TensorLike): Tensor {
    const tensor = this.#access.tensor(shape, dtype)
    this.#access.copy(this.#access.pointerOf(tensor), elements.pointer, bytesOf(elements))
    return tensor
  }

  write(tensor: Tensor, elements: DeviceElements): void {
    this.#access.copy(this.#access.pointerOf(tensor), elements.pointer, bytesOf(elements))
    this.#access.markModified(tensor)
  }

  close(): void {
    for (const memory of this.#made) memory.free()
  }
}
