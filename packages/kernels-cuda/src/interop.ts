/** @file The device as libraries beside the backend see it: addresses, memory, and queues of their own. */
import { type DType, MoeError, type Shape, Tensor, type Value } from '@moe/core'
import type { CudaBackend } from './backend.ts'
import { reduceRanks } from './kernels/reduce-ranks/reduce-ranks.ts'
import type { CudaBuffer } from './memory.ts'
import { pointerOf } from './native.ts'
import type { Opened } from './open.ts'
import { Stream } from './stream.ts'

/** Device memory that is no tensor's. */
export interface DeviceMemory {
  /** Address on the device. */
  readonly pointer: number
  /** Gives it back. What the backend launches afterwards may write there: work of other queues must have ended. */
  free(): void
}

/** A queue of work beside the backend's own: a CUDA stream. */
export interface DeviceQueue {
  /** The `CUstream` as a number. */
  readonly handle: number
  /** What is put into it from here on waits for all that the backend has launched. */
  follow(): void
  /**
   * Resolves when all its work so far is done.
   * @param look called each time before the device is asked again; what it throws ends the waiting
   */
  done(look?: () => void): Promise<void>
  /** Waits for its work, and frees it. */
  dispose(): void
}

/**
 * What `@moe/parallel` needs for ranks that exchange tensors without the host (NCCL), and whoever calls a CUDA library or kernel of his own. Addresses and
 * handles are numbers below 2^53. Nothing here may be called while a graph is recorded.
 */
export interface CudaInterop {
  /** Makes the device's context that of this thread: before every call of another library, as other backends may have had their turn. */
  use(): void
  /** Address of a tensor's first element. The backend's own queue is what orders accesses to it. */
  pointerOf(value: Value): number
  /** Uninitialized memory. @throws MoeError E_OUT_OF_MEMORY */
  allocate(bytes: number): DeviceMemory
  /** An uninitialized tensor of this backend. @throws MoeError E_OUT_OF_MEMORY */
  tensor(shape: Shape, dtype: DType): Tensor
  /** Device to device, in the backend's queue. */
  copy(to: number, from: number, bytes: number): void
  /** To be said of a tensor whose elements have been written to: what the backend has made of them is void. */
  changed(value: Value): void
  /** Elements at `to` become those at `parts`, one rank's each, reduced in the backend's queue: in f64, in their order, rounded once (bf16 by f32). `to` may be one of them. */
  reduceRanks(
    to: number,
    parts: readonly number[],
    length: number,
    dtype: 'f32' | 'bf16' | 'i32',
    reduction: 'sum' | 'mean' | 'max',
  ): void
  /** A queue of your own; dispose of it before the backend. */
  queue(): DeviceQueue
}

export function createInterop(
  opened: Opened,
  run: <T>(op: string, fn: () => T) => T,
  backend: () => CudaBackend,
): CudaInterop {
  const { context, cuda, device, driver, memory, stream } = opened
  const reduce = reduceRanks(cuda)
  const direct = <T>(op: string, fn: () => T): T => {
    if (opened.recording === null) return run(op, fn)
    throw new MoeError({
      code: 'E_ATTR',
      op,
      problem: `${op} while a graph is recorded`,
      fix: 'call it outside of capture',
    })
  }
  return {
    use: () => context.use(),
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
    changed: value => memory.changed(value.handle as CudaBuffer),
    reduceRanks: (...args) => direct('reduceRanks', () => reduce(...args)),
    queue() {
      context.use()
      const queue = new Stream(driver, device)
      return {
        handle: queue.handle,
        follow() {
          context.use()
          queue.follow(stream)
        },
        done(look) {
          context.use()
          return queue.sync(() => {
            look?.()
            context.use()
          })
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
