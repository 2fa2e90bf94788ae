/** @file Elements in host memory: tensors are downloaded to be sent, and what came is uploaded. */
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
        problem: `${backend.name} cannot change a tensor in its place`,
        fix: 'use allReduce, which makes new ones',
      })
    }
  }

  close(): void {
    for (const buffer of this.#made) giveBack(buffer)
  }
}

/** Large buffers for later calls, latest last: the system takes longer to hand out fresh memory than adding up takes. */
const kept: ArrayBuffer[] = []
const keptBytes = { least: 2 ** 16, inAll: 2 ** 27 }

function take(bytes: number): ArrayBuffer {
  const fits = ({ byteLength }: ArrayBuffer) => byteLength >= bytes && byteLength <= 2 * bytes
  const at = bytes < keptBytes.least ? -1 : kept.findLastIndex(fits)
  return at < 0 ? new ArrayBuffer(bytes) : kept.splice(at, 1)[0]
}

function giveBack(buffer: ArrayBuffer): void {
  if (buffer.byteLength < keptBytes.least) return
  kept.push(buffer)
  let total = kept.reduce((sum, { byteLength }) => sum + byteLength, 0)
  while (total > keptBytes.inAll) total -= (kept.shift() as ArrayBuffer).byteLength
}
