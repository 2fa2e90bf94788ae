/** @file For tests: a backend on the emulator, or with MOE_REQUIRE_CUDA=1 on this machine's GPU. */
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import type { WidePrecision } from '@moe/core'
import koffi from 'koffi'
import { type CudaBackend, createBackend } from './backend.ts'
import type { CudaOptions } from './open.ts'

/** Whether tests run on a real device, and fail if there is none. */
export const onDevice = process.env['MOE_REQUIRE_CUDA'] === '1'

if (onDevice) {
  // Test sizes are chosen for the emulator's four; with more of them, large tiles would never be used.
  process.env['MOE_CUDA_MULTIPROCESSORS'] ??= '4'
  // Keeps the device's context, whose creation takes longer than most tests.
  await createBackend()
}

/** Values of `wgmma` to test. On a device only the one that MOE_CUDA_WGMMA selects, so that a fault in Hopper's kernels does not affect the other tests. */
export const wgmmaVariants = onDevice ? [!['', '0'].includes(process.env['MOE_CUDA_WGMMA'] ?? '')] : [false, true]

/** Precisions, each with the values of `wgmma` to test. */
export const productVariants: ReadonlyArray<{ readonly precision: WidePrecision; readonly wgmma: boolean }> = [
  { precision: 'f32', wgmma: false },
  ...wgmmaVariants.map(wgmma => ({ precision: 'bf16', wgmma }) as const),
]

/** Whether the emulator runs kernels translated from nvcc's PTX (`build-emulator.mjs --ptx`), not those compiled by the host's compiler. */
export const translated = process.env['MOE_EMULATOR_KERNELS'] === 'ptx'

const folder = join(import.meta.dirname, '..', 'build', translated ? 'emulator-ptx' : 'emulator')
const library = join(folder, 'libmoe-cuda-emulator.so')

/** The emulated cuBLASLt. */
export const emulatedCublasLt = join(folder, 'libmoe-cublas-lt-emulator.so')

/** Options for tests with cuBLASLt: the emulated one, or on a device that of MOE_CUDA_CUBLASLT; undefined if it is not set. */
export const cublasLtVariants: readonly CudaOptions[] = onDevice
  ? process.env['MOE_CUDA_CUBLASLT']
    ? [{}]
    : []
  : [{ cublasLt: emulatedCublasLt }]

/** Options for each implementation of dense products. */
export const denseVariants: ReadonlyArray<{
  readonly precision: WidePrecision
  readonly by: string
  readonly options: CudaOptions
}> = [
  ...productVariants.map(({ precision, wgmma }) => ({ precision, by: wgmma ? 'wgmma' : 'mma', options: { wgmma } })),
  ...(onDevice ? [] : cublasLtVariants).flatMap(options => [
    { precision: 'f32' as const, by: 'cuBLASLt', options },
    { precision: 'bf16' as const, by: 'cuBLASLt', options },
  ]),
]

/** Options that select the emulator. */
export const emulator = { driver: library, kernels: folder } as const

/** The reason why tests cannot run, or undefined. */
export const unavailable =
  onDevice || existsSync(library)
    ? undefined
    : 'the emulator is not built: node packages/kernels-cuda/scripts/build-emulator.mjs (needs a C++ compiler)'

/** Capability of the emulated device for tests that need no Hopper. 8.6, 8.9 and 12.0 have the least shared memory per block; launches that work there work everywhere. */
const capability = Number(process.env['MOE_EMULATOR_CAPABILITY'] || 80)

/** Opens a backend. Every buffer is a separate allocation, so that accesses outside it are detected. With `wgmma` the emulator is a Hopper device, otherwise an Ampere. */
export function testBackend(options: CudaOptions = {}): Promise<CudaBackend> {
  if (!onDevice) {
    resetEmulator()
    emulatorFunction('void moe_emulator_set(const char* name, int value)')(
      'capability',
      options.wgmma ? 90 : capability,
    )
  }
  return createBackend({ ...(onDevice ? {} : emulator), guarded: true, ...options })
}

/** Sets whether blocks and threads run in reverse order; devices guarantee no order. */
export function reverseOrder(reversed: boolean): void {
  if (!onDevice) emulatorFunction('void moe_emulator_set(const char* name, int value)')('reversed', +reversed)
}

/** Whether sums, exponentials and reciprocals are those of a device, or have its errors, rather than those of the host. */
export const inexact = onDevice || process.env['MOE_EMULATOR_APPROXIMATE'] === '1'

/** Number of bits of a sum that Hopper's fp8 products keep (DeepSeek-V3 report, 3.3.2). */
export const hopperFp8Bits = 14

/** Sets how many bits of a sum fp8 products on the emulator keep; 0 keeps all bits of f32. Has no effect on a device. */
export function keepFp8Bits(bits: number): void {
  if (!onDevice) emulatorFunction('void moe_emulator_set(const char* name, int value)')('fp8Bits', bits)
}

/** Clears faults and frees everything, so that a test does not fail because of the fault of an earlier one. */
export function resetEmulator(): void {
  emulatorFunction('void moe_emulator_reset()')()
}

/** Returns one of the emulator's own functions. */
export function emulatorFunction(prototype: string): (...args: Array<string | number>) => unknown {
  return koffi.load(library).func(prototype) as (...args: Array<string | number>) => unknown
}
