/** @file Checks that every kernel in every .cu file has a launcher, with the kernel's parameters. */
import { expect, test } from 'vitest'
import { fusedFactories, primitiveFactories } from './kernels/index.ts'
import { reduceRanks } from './kernels/reduce-ranks/reduce-ranks.ts'
import type { Cuda } from './native.ts'
import { emulatorFunction, onDevice, translated, unavailable } from './test-backend.ts'

/** Returns `module name signature` of every kernel that a launcher requests. */
function requested(): string[] {
  const found = new Set<string>()
  const kernel = (module: string, name: string, signature: string) => {
    found.add(`${module} ${name} ${translated ? inPtx(signature) : signature}`)
    return () => {}
  }
  // Launchers differ by device.
  for (const capability of [80, 90, 100]) {
    const onHopper = () => capability === 90
    const cuda = { capability, onHopper, multiprocessors: 4, sharedMemory: 99 * 1024, kernel } as unknown as Cuda
    for (const factory of Object.values({ ...primitiveFactories, ...fusedFactories, reduceRanks }))
      (factory as (cuda: Cuda) => unknown)(cuda)
  }
  return [...found].sort()
}

/** Returns parameters as in PTX: pointers are integers, arrays and structures are bytes. */
function inPtx(signature: string): string {
  const bytes: Record<string, number> = { p: 8, l: 8, i: 4, f: 4 }
  return signature
    .replaceAll(/([plif])\[(\d+)\]/g, (_, letter: string, count: string) => `b[${bytes[letter]! * Number(count)}]`)
    .replaceAll(/\bp\b/g, 'l')
    .replaceAll(/\bt\b/g, 'b[128]')
}

/** The signatures of all compiled kernels: lines of `module name bounds signature`. */
function compiled(): string[] {
  const lines = (emulatorFunction('const char* moe_emulator_kernels()')() as string).split('\n')
  return lines
    .filter(line => line !== '' && !line.startsWith('emulator-tests '))
    .map(line => line.replace(/^(\S+ \S+) \S+ /, '$1 '))
    .sort()
}

test.skipIf(unavailable || onDevice)('launchers and kernels agree on names and parameters', () => {
  expect(requested()).toEqual(compiled())
})
