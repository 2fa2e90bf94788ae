/** @file For tests: backends of every variant, and ops called on host arrays. */
import type { Backend, DType, FusedAttrs, HostArray, OpName, PrimitiveAttrs, Shape, TensorSpec, Value } from '@moe/core'
import { encodeHost, sizeOf } from '@moe/core'
import { type CpuBackend, type CpuOptions, createBackend } from './backend.ts'
import { type Isa, isas } from './load.ts'

/** A backend whose buffers are guarded, so that a write beside one fails the test. */
export function testBackend(options: CpuOptions = {}): Promise<CpuBackend> {
  return createBackend({ guarded: true, ...options })
}

/** Every instruction set that this machine runs and that MOE_CPU_ISA allows, lowest first. */
export async function availableIsas(): Promise<Isa[]> {
  const best = (await createBackend()).isa
  return isas.slice(0, isas.indexOf(best) + 1)
}

/** An input of `runOp`: elements as plain numbers (encoded to the dtype, f32 by default). */
export interface HostInput {
  readonly data: ArrayLike<number>
  readonly shape: Shape
  readonly dtype?: DType
}

/** Runs one op on host arrays and gives its outputs as host arrays. Checks guards and that inputs were left alone. */
export async function runOp<O extends OpName>(
  backend: Backend,
  op: O,
  inputs: readonly HostInput[],
  attrs: (PrimitiveAttrs & FusedAttrs)[O],
  outputs: readonly TensorSpec[],
): Promise<HostArray[]> {
  const values: Value[] = inputs.map(({ data, shape, dtype = 'f32' }) => {
    const host = encodeHost(dtype, data)
    if (host.length !== sizeOf(shape)) throw new Error(`${host.length} elements for [${shape}]`)
    return { handle: backend.upload(host, shape, dtype), shape, dtype }
  })
  const table = { ...backend.primitives, ...backend.fused } as Record<string, unknown>
  const kernel = table[op] as (i: readonly Value[], a: unknown, o: readonly TensorSpec[]) => unknown[] | undefined
  if (kernel === undefined) throw new Error(`${backend.name} has no ${op}`)
  const handles = kernel(values, attrs, outputs)
  if (handles === undefined) throw new Error(`${op} declined`)
  ;(backend as Partial<CpuBackend>).checkGuards?.()
  const results = await Promise.all(handles.map((handle, i) => backend.download({ handle, ...outputs[i] })))
  for (const { handle } of values) backend.free(handle)
  for (const handle of handles) backend.free(handle)
  return results
}
