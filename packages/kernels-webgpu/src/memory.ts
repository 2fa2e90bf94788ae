/** @file Device memory: reference-counted buffers, and a cache of free ones. */
import { type BackendStats, type DType, dtypeBytes, MoeError, type Shape, sizeOf } from '@moe/core'
import type { Commands } from './commands.ts'
import { type GpuBuffer, type GpuDevice, usage } from './gpu.ts'

/** A piece of device memory. @moe/core uses it as a handle; each handle accounts for one of `refs`. */
export interface Buffer {
  readonly gpu: GpuBuffer
  /** Size of the elements, rounded up to whole words of four bytes. */
  readonly bytes: number
  refs: number
}

/** The cache may grow to this many bytes more than live tensors use. */
const KEPT_BYTES = 2 ** 28

export class Memory {
  readonly #device: GpuDevice
  readonly #commands: Commands
  /** By size, oldest last, so that the same work finds the same buffers, and with them the bind groups created for them. */
  readonly #free = new Map<number, GpuBuffer[]>()
  readonly #live = new Set<Buffer>()
  /** What the op has allocated or shared so far. */
  readonly #fresh: Buffer[] = []
  #kept = 0
  #handles = 0
  #bytes = 0
  #peakBytes = 0

  constructor(device: GpuDevice, commands: Commands) {
    this.#device = device
    this.#commands = commands
  }

  /** @throws MoeError E_OUT_OF_MEMORY for a tensor larger than the device can bind */
  allocate(op: string, shape: Shape, dtype: DType): Buffer {
    const bytes = Math.ceil((sizeOf(shape) * dtypeBytes[dtype]) / 4) * 4
    const { maxBufferSize, maxStorageBufferBindingSize } = this.#device.limits
    const most = Math.floor(Math.min(maxBufferSize, maxStorageBufferBindingSize) / 4) * 4
    if (bytes > most) {
      throw new MoeError({
        code: 'E_OUT_OF_MEMORY',
        op,
        problem: `a tensor ${dtype} [${shape}] needs ${bytes} bytes, but this GPU allows ${most} per buffer`,
        fix: 'use a smaller batch',
        details: { shape, bytes, most },
      })
    }
    const buffer: Buffer = { gpu: this.#take(Math.min(roomFor(bytes), most)), bytes, refs: 1 }
    this.#live.add(buffer)
    this.#fresh.push(buffer)
    this.#handles++
    this.#bytes += bytes
    this.#peakBytes = Math.max(this.#peakBytes, this.#bytes)
    return buffer
  }

  /** Runs an op. If it fails, what it has allocated is freed. */
  during<T>(op: () => T): T {
    this.#fresh.length = 0
    try {
      return op()
    } catch (error) {
      for (const buffer of this.#fresh) this.release(buffer)
      throw error
    }
  }

  #take(size: number): GpuBuffer {
    const kept = this.#free.get(size)?.pop()
    if (kept !== undefined) {
      this.#kept -= size
      return kept
    }
    const made = this.#device.createBuffer({ size, usage: usage.storage | usage.copyFrom | usage.copyTo })
    this.#commands.numberOf(made)
    return made
  }

  share(buffer: Buffer): Buffer {
    this.#fresh.push(buffer)
    buffer.refs++
    this.#handles++
    return buffer
  }

  release(buffer: Buffer): void {
    if (buffer.refs <= 0) return
    this.#handles--
    if (--buffer.refs > 0) return
    this.#live.delete(buffer)
    this.#bytes -= buffer.bytes
    const { size } = buffer.gpu
    if (this.#kept + size > KEPT_BYTES + this.#bytes) {
      // Recorded work may still use it.
      this.#commands.submit()
      buffer.gpu.destroy()
      return
    }
    this.#keep(size, buffer.gpu)
  }

  #keep(size: number, gpu: GpuBuffer): void {
    let free = this.#free.get(size)
    if (free === undefined) {
      free = []
      this.#free.set(size, free)
    }
    const number = this.#commands.numberOf(gpu)
    let at = free.length
    while (at > 0 && this.#commands.numberOf(free[at - 1]) < number) at--
    free.splice(at, 0, gpu)
    this.#kept += size
  }

  trim(): void {
    this.#commands.submit()
    for (const buffers of this.#free.values()) for (const buffer of buffers) buffer.destroy()
    this.#free.clear()
    this.#kept = 0
  }

  stats(): BackendStats {
    return { handles: this.#handles, bytes: this.#bytes, peakBytes: this.#peakBytes }
  }

  dispose(): void {
    // First, because it submits work that may still use live buffers.
    this.trim()
    for (const buffer of this.#live) {
      buffer.gpu.destroy()
      buffer.refs = 0
    }
    this.#live.clear()
    this.#handles = 0
    this.#bytes = 0
  }
}

/** Rounds sizes up by at most an eighth, so that buffers can be reused for tensors of about the same size. */
function roomFor(bytes: number): number {
  const step = Math.max(256, 2 ** (Math.floor(Math.log2(Math.max(1, bytes))) - 3))
  return Math.max(step, Math.ceil(bytes / step) * step)
}
