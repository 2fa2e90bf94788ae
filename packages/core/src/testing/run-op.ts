/** @file Runs one kernel of a backend on host arrays, for cases that the suite does not cover. */
import type { Backend, TensorSpec, Value } from '../backend.ts'
import { type DType, encodeHost, type HostArray } from '../dtype.ts'
import type { FusedAttrs, OpName, PrimitiveAttrs } from '../ops.ts'
import { type Shape, sizeOf } from '../shape.ts'

/** An input of `runOp`: elements as plain numbers, which are encoded to the dtype. */
export interface HostInput {
  /** All elements, row-major. */
  readonly data: ArrayLike<number>
  /** Sizes of the axes. */
  readonly shape: Shape
  /** The dtype that the numbers are encoded to. Default f32. */
  readonly dtype?: DType
}

/**
 * Runs one kernel of the backend on host arrays and returns its outputs as host arrays. `guards` throws if memory next
 * to a buffer was written.
 * @throws Error if the backend lacks the kernel or the kernel declines
 */
export async function runOp<O extends OpName>(
  backend: Backend,
  op: O,
  inputs: readonly HostInput[],
  attrs: (PrimitiveAttrs & FusedAttrs)[O],
  outputs: readonly TensorSpec[],
  options: { guards?: (backend: Backend) => void } = {},
): Promise<HostArray[]> {
  const values: Value[] = inputs.map(({ data, shape, dtype = 'f32' }) => {
    const host = encodeHost(dtype, data)
    if (host.length !== sizeOf(shape)) throw new Error(`${host.length} elements for [${shape}]`)
    return { handle: backend.upload(host, shape, dtype), shape, dtype }
  })
  const table = { ...backend.primitives, ...backend.fused } as Record<string, unknown>
  const kernel = table[op] as (i: readonly Value[], a: unknown, o: readonly TensorSpec[]) => unknown[] | undefined
  if (kernel === undefined) throw new Error(`${backend.name} has no kernel for ${op}`)
  const handles = kernel(values, attrs, outputs)
  if (handles === undefined) throw new Error(`the kernel of ${op} declined`)
  options.guards?.(backend)
  const results = await Promise.all(handles.map((handle, i) => backend.download({ handle, ...outputs[i] })))
  for (const { handle } of values) backend.free(handle)
  for (const handle of handles) backend.free(handle)
  return results
}
