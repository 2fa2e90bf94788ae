/** @file For tests: a backend on the emulator, or with MOE_REQUIRE_CUDA=1 on the GPU of this machine. */
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import type { WidePrecision } from '@moe/core'
import koffi from 'koffi'
import { type CudaBackend, createBackend } from './backend.ts'
import type { CudaOptions } from './open.ts'

/** Whether tests run on a real device; without one they then fail. */
export const onDevice = process.env['MOE_REQUIRE_CUDA'] === '1'

if (onDevice) {
  // Sizes of tests are made for the emulator's four: with more of them, large tiles would never be chosen.
  process.env['MOE_CUDA_MULTIPROCESSORS'] ??= '4'
  // Keeps the device's context, which takes longer to make than most tests run.
  await createBackend()
}

/** Which ways of multiplying tests try: on a device the one that MOE_CUDA_WGMMA chooses, lest a fault of the new one take the old one's tests along. */
export const wgmmaVariants = onDevice ? [!['', '0'].includes(process.env['MOE_CUDA_WGMMA'] ?? '')] : [false, true]

/** Precisions with the ways of multiplying in them. */
export const productVariants: ReadonlyArray<{ readonly precision: WidePrecision; readonly wgmma: boolean }> = [
  { precision: 'f32', wgmma: false },
  ...wgmmaVariants.map(wgmma => ({ precision: 'bf16', wgmma }) as const),
]

/** The kernels as the host's compiler made them, or with `ptx` as nvcc did (`build-emulator.mjs --ptx`). */
export const translated = process.env['MOE_EMULATOR_KERNELS'] === 'ptx'

const folder = join(import.meta.dirname, '..', 'build', translated ? 'emulator-ptx' : 'emulator')
const library = join(folder, 'libmoe-cuda-emulator.so')

/** The emulated cuBLASLt. */
export const emulatedCublasLt = join(folder, 'libmoe-cublas-lt-emulator.so')

/** The options that choose cuBLASLt in tests: the emulated one, on a device what MOE_CUDA_CUBLASLT says; none where it says nothing. */
export const cublasLtVariants: readonly CudaOptions[] = onDevice
  ? process.env['MOE_CUDA_CUBLASLT']
    ? [{}]
    : []
  : [{ cublasLt: emulatedCublasLt }]

/** Ways of multiplying dense matrices. */
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

/** The options that choose the emulator. */
export const emulator = { driver: library, kernels: folder } as const

/** Why there is nothing to run on, or undefined. */
export const unavailable =
  onDevice || existsSync(library)
    ? undefined
    : 'the emulator is not built: node packages/kernels-cuda/scripts/build-emulator.mjs (needs a C++ compiler)'

/** The emulated device where it need not be a Hopper. Those of 8.6, 8.9 and 12.0 have the least shared memory for a block: what is launched there can be on all. */
const capability = Number(process.env['MOE_EMULATOR_CAPABILITY'] || 80)

/** Every buffer is an allocation of its own, so that access beside one is found. With `wgmma` the emulator is a Hopper, otherwise an Ampere. */
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

/** Blocks and threads run last to first from now on, or first to last: an order that a device does not promise. */
export function reverseOrder(reversed: boolean): void {
  if (!onDevice) emulatorFunction('void moe_emulator_set(const char* name, int value)')('reversed', +reversed)
}

/** Whether sums, exponentials and reciprocals are a device's, or off as its may be, rather than those of the host. */
export const inexact = onDevice || process.env['MOE_EMULATOR_APPROXIMATE'] === '1'

/** How many bits of a sum Hopper's products in fp8 keep (DeepSeek-V3 report, 3.3.2). */
export const hopperFp8Bits = 14

/** Products in fp8 on the emulator keep so many bits of a sum from now on; 0: all of f32's. A device does as it does. */
export function keepFp8Bits(bits: number): void {
  if (!onDevice) emulatorFunction('void moe_emulator_set(const char* name, int value)')('fp8Bits', bits)
}

/** Forgets faults and frees everything, so that a test does not fail for another's fault. */
export function resetEmulator(): void {
  emulatorFunction('void moe_emulator_reset()')()
}

/** One of the emulator's own functions. */
export function emulatorFunction(prototype: string): (...args: Array<string | number>) => unknown {
  return koffi.load(library).func(prototype) as (...args: Array<string | number>) => unknown
}
