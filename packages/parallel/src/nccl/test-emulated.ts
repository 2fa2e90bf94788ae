/** @file For tests only: devices and NCCL without either, and a rank that `mpirun` has started (reports whether all calls give what they should). */
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { isDeepStrictEqual } from 'node:util'
import { type CudaBackend, createBackend } from '@moe/kernels-cuda'
import type { Communicator } from '../communicator/communicator.ts'
import { exercise, expected } from '../communicator/test-exercise.ts'
import { local, mpi } from '../index.ts'
import { report } from '../mpi/test-launch.ts'
import { nccl } from './nccl.ts'

const folder = join(import.meta.dirname, '..', '..', '..', 'kernels-cuda', 'build', 'emulator')
/** The emulated NCCL. */
export const library = join(folder, 'libmoe-nccl-emulator.so')
/** The emulated driver. */
export const driver = join(folder, 'libmoe-cuda-emulator.so')

/** Why there is nothing to run on, or undefined. */
export const unavailable = existsSync(library)
  ? undefined
  : 'the emulator is not built: node packages/kernels-cuda/scripts/build-emulator.mjs (needs a C++ compiler)'

/** A backend on the emulator. `guarded`: access beside a buffer is found. */
export const emulated = (guarded = true): Promise<CudaBackend> => createBackend({ driver, kernels: folder, guarded })

/** `work` on ranks of this process with a device each. */
export function onDevices<T>(
  size: number,
  work: (ranks: Communicator, backend: CudaBackend) => Promise<T>,
  { guarded = true } = {},
): Promise<T[]> {
  return local(size, async host => {
    const backend = await emulated(guarded)
    const ranks = await nccl(host, { backend, library })
    const result = await work(ranks, backend)
    await ranks.close()
    backend.dispose()
    return result
  })
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const backend = await emulated()
  const ranks = await nccl(await mpi(), { backend, library })
  const plain = (value: unknown) => JSON.parse(JSON.stringify(value))
  const same = isDeepStrictEqual(plain(await exercise(ranks, backend)), plain(expected(ranks.rank, ranks.size)))
  report({ rank: ranks.rank, size: ranks.size, same, left: backend.stats().handles })
  await ranks.close()
  backend.dispose()
}
