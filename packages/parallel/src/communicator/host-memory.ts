/** @file Elements in host memory: tensors are downloaded before sending, and received elements are uploaded. */
import {
  type DType,
  dtypeBytes,
  fromHost,
  type HostArray,
  MoeError,
  Parameter,
  type Tensor,
  viewBytes,
} from '@moe/core'
import type { Memory, Workspace } from './carrier.ts'
import type { Reduction, TensorLike } from './communicator.ts'
import { reduce } from './reduce.ts'

export const hostMemory: Memory<HostArray> = {
  of: tensor => tensor.data(),
  open: () => new HostWorkspace(),
}

class HostWorkspace implements Workspace<HostArray> {
  readonly #made: ArrayBuffer[] = []

  make(dtype: DType, length: number): HostArray {
    const bytes = length * dtypeBytes[dtype]
    const buffer = take(bytes)
    this.#made.push(buffer)
    return viewBytes(dtype, new Uint8Array(buffer, 0, bytes))
  }

  part(of: HostArray, from: number, to: number): HostArray {
    return of.subarray(from, to)
  }

  copy(to: HostArray, from: HostArray): void {
    to.set(from)
  }

  reduce(to: HostArray, parts: readonly HostArray[], dtype: DType, reduction: Reduction): void {
    reduce(to, parts, dtype, reduction)
  }

  tensor(elements: HostArray, { shape, dtype, backend }: TensorLike): Tensor {
    return fromHost(elements, shape, dtype, backend)
  }

  write(tensor: Tensor, elements: HostArray): void {
    const { backend, shape, dtype } = tensor
    if (backend.write !== undefined) backend.write(tensor, elements)
    else if (tensor instanceof Parameter) tensor.assign(fromHost(elements, shape, dtype, backend))
    else {
      throw new MoeError({
        code: 'E_BACKEND',
        op: 'allReduceInPlace',
        problem: `${backend.name} cannot overwrite a tensor in place`,
        fix: 'use allReduce, which returns new tensors',
      })
    }
  }

  close(failed: boolean): void {
    if (!failed) for (const buffer of this.#made) giveBack(buffer)
  }
}

/** Large buffers for reuse, most recent last: allocating fresh memory takes longer than the additions of a reduction. */
const pool: ArrayBuffer[] = []
const poolBytes = { minimum: 2 ** 16, total: 2 ** 27 }

function take(bytes: number): ArrayBuffer {
  const fits = ({ byteLength }: ArrayBuffer) => byteLength >= bytes && byteLength <= 2 * bytes
  const at = bytes < poolBytes.minimum ? -1 : pool.findLastIndex(fits)
  return at < 0 ? new ArrayBuffer(bytes) : pool.splice(at, 1)[0]
}

function giveBack(buffer: ArrayBuffer): void {
  if (buffer.byteLength < poolBytes.minimum) return
  pool.push(buffer)
  let total = pool.reduce((sum, { byteLength }) => sum + byteLength, 0)
  while (total > poolBytes.total) total -= (pool.shift() as ArrayBuffer).byteLength
}
