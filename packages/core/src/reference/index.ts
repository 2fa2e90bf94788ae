/**
 * @file The reference backend: plain TypeScript in f64, without fused ops. All other backends are tested against it. It
 * runs anywhere, but slowly.
 */
import type { Backend, Handle, Kernel, PrimitiveKernels, Value } from '../backend.ts'
import { dtypes } from '../dtype.ts'
import type { PrimitiveAttrs, PrimitiveName } from '../ops.ts'
import { roundOperand } from './fp8.ts'
import { referencePrimitives } from './primitives.ts'
import { fromHostArray, type Numbers, type ReferenceHandle, type Storage, toHostArray } from './storage.ts'

/** The elements of freed storages. */
const freed = new Float64Array(0)

/** Creates a reference backend. `bytes` in its statistics counts f64 elements. */
export function referenceBackend(): Backend {
  let handles = 0
  let bytes = 0
  let peakBytes = 0

  function own(storage: Storage): ReferenceHandle {
    handles++
    if (storage.refs++ === 0) {
      bytes += storage.data.byteLength
      peakBytes = Math.max(peakBytes, bytes)
    }
    return { storage }
  }

  function kernel<P extends PrimitiveName>(name: P): Kernel<PrimitiveAttrs[P]> {
    const compute = referencePrimitives[name]
    return (inputs, attrs, outputs) => {
      if (name === 'reshape') return [own((inputs[0].handle as ReferenceHandle).storage)]
      return compute(inputs, attrs, outputs).map((data, i) => own({ data, dtype: outputs[i].dtype, refs: 0 }))
    }
  }

  const names = Object.keys(referencePrimitives) as PrimitiveName[]
  return {
    name: 'reference',
    device: 'plain TypeScript, f64',
    dtypes: new Set(dtypes),
    bf16Matmul: false,
    fp8Matmul: true,
    primitives: Object.fromEntries(names.map(name => [name, kernel(name)])) as unknown as PrimitiveKernels,
    fused: {},
    upload: (data, _shape, dtype) => own({ data: fromHostArray(data, dtype), dtype, refs: 0 }),
    async download(value) {
      return toHostArray((value.handle as ReferenceHandle).storage.data, value.dtype)
    },
    free(handle: Handle) {
      const { storage } = handle as ReferenceHandle
      handles--
      if (--storage.refs === 0) {
        bytes -= storage.data.byteLength
        storage.data = freed
      }
    },
    async sync() {},
    stats: () => ({ handles, bytes, peakBytes }),
    dispose() {},
  }
}

export { type Numbers, roundOperand }

/** Returns the unrounded elements of a tensor on a reference backend. This is the live array: do not change it. */
export function readF64(value: Value): Numbers {
  return (value.handle as ReferenceHandle).storage.data
}

/** Opens the backend, for `firstAvailable`. */
export async function createBackend(): Promise<Backend> {
  return referenceBackend()
}
