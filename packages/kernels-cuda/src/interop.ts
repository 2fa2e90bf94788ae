/** @file Access to the device for other libraries: addresses, memory, and separate queues. */
import { type Backend, type DType, MoeError, type Shape, Tensor, type Value } from '@moe/core'
import { reduceRanks } from './kernels/reduce-ranks/reduce-ranks.ts'
import type { CudaBuffer } from './memory.ts'
import { pointerOf } from './native.ts'
import type { Opened } from './open.ts'
import { Stream } from './stream.ts'

/** Device memory that belongs to no tensor. */
export interface DeviceMemory {
  /** Address on the device. */
  readonly pointer: number
  /** Frees the memory. Wait for other queues that use it first: the backend may reuse it for its next kernels. */
  free(): void
}

/** A queue of work besides the backend's own: a CUDA stream. */
export interface DeviceQueue {
  /** The `CUstream` as a number. */
  readonly handle: number
  /** Makes work that is added from now on wait for everything that the backend has launched. */
  waitForBackend(): void
  /**
   * Resolves when all work added so far is finished.
   * @param look called before each query of the device; if it throws, waiting ends with that error
   */
  synchronize(look?: () => void): Promise<void>
  /** Waits for the queue's work and frees the queue. */
  dispose(): void
}

/**
 * For ranks that exchange tensors without the host (NCCL, used by `@moe/parallel`), and for your own CUDA libraries and kernels. Addresses and
 * handles are numbers below 2^53. Do not call these functions while a graph is being captured.
 */
export interface CudaInterop {
  /** Makes the device's context current in this thread. Call it before every call of another library, as another backend's may be current. */
  makeCurrent(): void
  /** Address of a tensor's first element. Accesses to it are ordered by the backend's own queue. */
  pointerOf(value: Value): number
  /** Uninitialized memory. @throws MoeError E_OUT_OF_MEMORY */
  allocate(bytes: number): DeviceMemory
  /** An uninitialized tensor of this backend. @throws MoeError E_OUT_OF_MEMORY */
  tensor(shape: Shape, dtype: DType): Tensor
  /** Copies device memory to device memory, in the backend's queue. */
  copy(to: number, from: number, bytes: number): void
  /** Call this after writing to a tensor's elements: it discards the backend's cached copies of them. */
  markModified(value: Value): void
  /** Reduces the elements at `parts`, one address per rank, to `to`, in the backend's queue: in f64 and in the order of `parts`, rounded once (for bf16 via f32). `to` may be one of them. */
  reduceRanks(
    to: number,
    parts: readonly number[],
    length: number,
    dtype: 'f32' | 'bf16' | 'i32',
    reduction: 'sum' | 'mean' | 'max',
  ): void
  /** Creates a queue. Dispose of it before the backend. The first one loads all kernels, because loading one may wait for the work of all queues. */
  queue(): DeviceQueue
}

export function createInterop(
  opened: Opened,
  run: <T>(op: string, fn: () => T) => T,
  backend: () => Backend,
): CudaInterop {
  const { context, cuda, device, driver, memory, modules, stream } = opened
  const reduce = reduceRanks(cuda)
  const direct = <T>(op: string, fn: () => T): T => {
    if (opened.recording === null) return run(op, fn)
    throw new MoeError({
      code: 'E_ATTR',
      op,
      problem: `${op} cannot be called while a graph is being captured`,
      fix: 'call it outside of capture()',
    })
  }
  return {
    makeCurrent: () => context.use(),
    pointerOf,
    allocate: bytes =>
      direct('allocate', () => {
        const buffer = memory.allocate(bytes)
        return {
          pointer: buffer.pointer,
          free() {
            if (context.open) memory.release(buffer)
          },
        }
      }),
    tensor: (shape, dtype) =>
      direct('tensor', () => new Tensor(backend(), cuda.output({ shape, dtype }), shape, dtype)),
    copy: (to, from, bytes) => direct('copy', () => stream.copy(to, from, bytes)),
    markModified: value => memory.changed(value.handle as CudaBuffer),
    reduceRanks: (...args) => direct('reduceRanks', () => reduce(...args)),
    queue() {
      context.use()
      modules.loadAll()
      const queue = new Stream(driver, context, device)
      return {
        handle: queue.handle,
        waitForBackend: () => direct('waitForBackend', () => queue.follow(stream)),
        synchronize(look) {
          context.use()
          return queue.sync(look)
        },
        dispose() {
          if (!context.open) return
          context.use()
          queue.dispose()
        },
      }
    },
  }
}
