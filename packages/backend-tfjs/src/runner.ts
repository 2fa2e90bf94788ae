/** @file Runs TensorFlow.js kernels for one backend, and owns and counts the tensors behind core's handles. */
import { type BackendStats, type DType, dtypeBytes, type Handle, MoeError, sizeOf, type TensorSpec } from '@moe/core'
import type {
  TfAttrs,
  TfEngine,
  TfInputs,
  TfKernel,
  TfKernelBackend,
  TfNamespace,
  TfTensor,
  TfTensorInfo,
} from './namespace.ts'

/** Memory shared by a tensor and its reshapes. */
interface Storage {
  readonly bytes: number
  owners: number
}

/** A handle of core. */
export interface TfHandle {
  readonly tensor: TfTensor
  readonly storage: Storage
}

export const tensorOf = (value: { readonly handle: Handle }): TfTensor => (value.handle as TfHandle).tensor

export interface Runner {
  readonly name: string
  readonly backend: TfKernelBackend
  readonly stats: () => BackendStats
  /** Runs one TensorFlow.js kernel. The result belongs to the enclosing scope. */
  run(kernel: string, inputs: TfInputs, attrs?: TfAttrs): TfTensor
  runAll(kernel: string, inputs: TfInputs, attrs?: TfAttrs): TfTensor[]
  /** Registers a buffer, which a TensorFlow.js backend already counts, with the engine. */
  adopt(info: TfTensorInfo): TfTensor
  /** Runs `fn`, disposes every tensor created inside except those it returns, and turns those into handles. */
  handles(op: string, outputs: readonly TensorSpec[], fn: () => TfTensor[]): TfHandle[]
  /** A handle for `tensor`, which shares the memory of `from`. */
  share(from: Handle, tensor: TfTensor): TfHandle
  free(handle: Handle): void
  /** The elements of a tensor, which may be freed while they are being read. */
  read(handle: Handle): Promise<ArrayLike<number>>
  /** Frees all remaining handles. */
  dispose(): void
}

/** Backends whose kernels call no other ops. Those of other backends do, and TensorFlow.js runs them on the current backend. */
const selfContained = new Set(['cpu', 'wasm'])

export function makeRunner(tf: TfNamespace, name: string, outOfMemory: (tensor: TfTensor) => boolean): Runner {
  const backend = tf.findBackend(name) as TfKernelBackend
  const engine = tf.engine() as TfEngine
  const kernels = new Map<string, TfKernel>()
  const alone = selfContained.has(name)
  const live = new Set<TfHandle>()
  /** Number of reads in progress per tensor. */
  const reads = new Map<TfTensor, number>()
  let bytes = 0
  let peakBytes = 0

  function kernelOf(kernel: string): TfKernel {
    let found = kernels.get(kernel)
    if (found === undefined) {
      found = tf.getKernel(kernel, name)?.kernelFunc as TfKernel | undefined
      if (found === undefined) {
        throw new MoeError({
          code: 'E_UNSUPPORTED',
          op: kernel,
          problem: `the TensorFlow.js backend ${name} does not have this kernel`,
          fix: 'register its kernels (import the whole backend package), or use the wasm, cpu or tensorflow backend',
          details: { kernel, backend: name },
        })
      }
      kernels.set(kernel, found)
    }
    return found
  }

  function adopt(info: TfTensorInfo): TfTensor {
    const tensor = 'dispose' in info ? (info as TfTensor) : engine.makeTensorFromTensorInfo(info, backend)
    if (outOfMemory(tensor)) {
      throw new MoeError({
        code: 'E_OUT_OF_MEMORY',
        op: name,
        problem: `cannot allocate a tensor of shape [${tensor.shape}]: ${bytes} bytes are in use`,
        fix: 'use a smaller batch or free tensors; wasm is limited to 4 GB',
        details: { shape: tensor.shape, bytes },
      })
    }
    return tensor
  }

  function runAll(kernel: string, inputs: TfInputs, attrs: TfAttrs = {}): TfTensor[] {
    const result = kernelOf(kernel)({ inputs, attrs, backend })
    return Array.isArray(result) ? result.map(adopt) : [adopt(result)]
  }

  function checkCurrent(op: string): void {
    if (alone || tf.getBackend() === name) return
    throw new MoeError({
      code: 'E_BACKEND',
      op,
      problem: `the current backend of TensorFlow.js is ${tf.getBackend()}, but these tensors are on ${name}`,
      fix: `call await tf.setBackend('${name}') first`,
      details: { current: tf.getBackend(), expected: name },
    })
  }

  function hold(handle: TfHandle): TfHandle {
    live.add(handle)
    return handle
  }

  function free(handle: Handle): void {
    const { tensor, storage } = handle as TfHandle
    if (!live.delete(handle as TfHandle)) return
    if (--storage.owners === 0) bytes -= storage.bytes
    // webgpu and webgl access a tensor again after its elements have arrived.
    if (!reads.has(tensor)) tensor.dispose()
  }

  async function read(handle: Handle): Promise<ArrayLike<number>> {
    const { tensor } = handle as TfHandle
    reads.set(tensor, (reads.get(tensor) ?? 0) + 1)
    try {
      return await backend.read(tensor.dataId)
    } finally {
      const others = (reads.get(tensor) as number) - 1
      if (others > 0) reads.set(tensor, others)
      else reads.delete(tensor)
      if (others === 0 && !live.has(handle as TfHandle)) tensor.dispose()
    }
  }

  function own(tensor: TfTensor, dtype: DType): TfHandle {
    const storage: Storage = { bytes: sizeOf(tensor.shape) * dtypeBytes[dtype], owners: 1 }
    bytes += storage.bytes
    if (bytes > peakBytes) peakBytes = bytes
    return hold({ tensor, storage })
  }

  return {
    name,
    backend,
    stats: () => ({ handles: live.size, bytes, peakBytes }),
    runAll,
    run: (kernel, inputs, attrs) => runAll(kernel, inputs, attrs)[0],
    adopt,
    handles(op, outputs, fn) {
      checkCurrent(op)
      engine.startScope(op)
      try {
        const tensors = fn()
        const owned = new Array<TfHandle>(tensors.length)
        for (let i = 0; i < tensors.length; i++) {
          tensors[i].kept = true
          owned[i] = own(tensors[i], outputs[i].dtype)
        }
        return owned
      } catch (error) {
        throw asMoeError(op, name, error)
      } finally {
        engine.endScope()
      }
    },
    share(from, tensor) {
      const { storage } = from as TfHandle
      tensor.kept = true
      storage.owners++
      return hold({ tensor, storage })
    },
    free,
    read,
    dispose() {
      for (const handle of [...live]) free(handle)
    },
  }
}

/** Turns errors of TensorFlow.js into core's error class, with the op that was called. */
function asMoeError(op: string, backend: string, error: unknown): unknown {
  if (error instanceof MoeError) return error
  const text = error instanceof Error ? error.message : String(error)
  const memory = /out of memory|OOM when allocating|Cannot enlarge memory|Array buffer allocation failed/i.test(text)
  return new MoeError({
    code: memory ? 'E_OUT_OF_MEMORY' : 'E_BACKEND',
    op,
    problem: `TensorFlow.js (${backend}) failed: ${text}`,
    fix: memory ? 'use a smaller batch or free tensors' : undefined,
    cause: error,
  })
}
