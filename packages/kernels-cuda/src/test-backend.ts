/** @file For tests: a backend on the emulator, or with MOE_REQUIRE_CUDA=1 on the GPU of this machine. */
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import type { DType, FusedAttrs, HostArray, OpName, PrimitiveAttrs, Shape, TensorSpec, Value } from '@moe/core'
import { encodeHost, sizeOf } from '@moe/core'
import koffi from 'koffi'
import { type CudaBackend, type CudaOptions, createBackend } from './backend.ts'

/** Whether tests run on a real device; without one they then fail. */
export const onDevice = process.env['MOE_REQUIRE_CUDA'] === '1'

const folder = join(import.meta.dirname, '..', 'build', 'emulator')
const library = join(folder, 'libmoe-cuda-emulator.so')

/** The options that choose the emulator. */
export const emulator = { driver: library, kernels: folder } as const

/** Why there is nothing to run on, or undefined. */
export const unavailable =
  onDevice || existsSync(library)
    ? undefined
    : 'the emulator is not built: node packages/kernels-cuda/scripts/build-emulator.mjs (needs a C++ compiler)'

/** Every buffer is an allocation of its own, so that access beside one is found. */
export function testBackend(options: CudaOptions = {}): Promise<CudaBackend> {
  if (!onDevice) resetEmulator()
  return createBackend({ ...(onDevice ? {} : emulator), guarded: true, ...options })
}

/** Forgets faults and frees everything, so that a test does not fail for another's fault. */
export function resetEmulator(): void {
  emulatorFunction('void moe_emulator_reset()')()
}

/** One of the emulator's own functions. */
export function emulatorFunction(prototype: string): (...args: Array<string | number>) => unknown {
  return koffi.load(library).func(prototype) as (...args: Array<string | number>) => unknown
}

/** An input of `runOp`: elements as plain numbers (encoded to the dtype, f32 by default). */
export interface HostInput {
  readonly data: ArrayLike<number>
  readonly shape: Shape
  readonly dtype?: DType
}

/** Runs one op on host arrays and gives its outputs as host arrays. */
export async function runOp<O extends OpName>(
  backend: CudaBackend,
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
  const results = await Promise.all(handles.map((handle, i) => backend.download({ handle, ...outputs[i] })))
  for (const { handle } of values) backend.free(handle)
  for (const handle of handles) backend.free(handle)
  return results
}
