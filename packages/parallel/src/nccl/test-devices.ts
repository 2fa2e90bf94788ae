/** @file For tests only: emulated devices and NCCL, or the real ones with MOE_REQUIRE_CUDA=1. As a program: a rank started by `mpirun` that reports whether all calls return the expected results. */
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { isDeepStrictEqual } from 'node:util'
import { type CudaBackend, createBackend } from '@moe/kernels-cuda'
import koffi from 'koffi'
import type { Communicator } from '../communicator/communicator.ts'
import { exercise, expected } from '../communicator/test-exercise.ts'
import { local, mpi } from '../index.ts'
import { report } from '../mpi/test-launch.ts'
import { nccl } from './nccl.ts'

/** Whether tests run on real devices, and fail without one. */
export const onDevice = process.env['MOE_REQUIRE_CUDA'] === '1'

const folder = join(import.meta.dirname, '..', '..', '..', 'kernels-cuda', 'build', 'emulator')
/** The emulated NCCL. */
export const library = join(folder, 'libmoe-nccl-emulator.so')
/** The emulated driver. */
export const driver = join(folder, 'libmoe-cuda-emulator.so')

/** The reason why the tests cannot run, if any. */
export const unavailable =
  onDevice || existsSync(library)
    ? undefined
    : 'the emulator is not built: node packages/kernels-cuda/scripts/build-emulator.mjs (needs a C++ compiler)'

/** NCCL accepts one rank per device. An emulated process can have up to eight. */
export const mostRanks = onDevice ? countDevices() : 4

function countDevices(): number {
  const cuda = koffi.load(process.env['MOE_CUDA_DRIVER'] || 'libcuda.so.1')
  const count = new Int32Array(1)
  cuda.func('int cuInit(unsigned int flags)')(0)
  cuda.func('int cuDeviceGetCount(void* count)')(count)
  return count[0]
}

/** The backend of a rank, on its own device. `guarded` detects out-of-bounds access. */
export function backendOf(rank: number, guarded = true): Promise<CudaBackend> {
  if (!onDevice) koffi.load(driver).func('void moe_emulator_set(const char* name, int value)')('devices', mostRanks)
  return createBackend({ guarded, device: rank, ...(onDevice ? {} : { driver, kernels: folder }) })
}

/** Connects ranks, each with its own backend, by NCCL. */
export const connect = (host: Communicator, backend: CudaBackend): Promise<Communicator> =>
  nccl(host, { backend, ...(onDevice ? {} : { library }) })

/** Runs `work` on ranks of this process, each with its own device. */
export function onDevices<T>(
  size: number,
  work: (ranks: Communicator, backend: CudaBackend) => Promise<T>,
  { guarded = true } = {},
): Promise<T[]> {
  return local(size, async host => {
    const backend = await backendOf(host.rank, guarded)
    const ranks = await connect(host, backend)
    const result = await work(ranks, backend)
    await ranks.close()
    backend.dispose()
    return result
  })
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const host = await mpi()
  const backend = await backendOf(host.rank)
  const ranks = await connect(host, backend)
  const plain = (value: unknown) => JSON.parse(JSON.stringify(value))
  const same = isDeepStrictEqual(plain(await exercise(ranks, backend)), plain(expected(ranks.rank, ranks.size)))
  report({ rank: ranks.rank, size: ranks.size, same, left: backend.stats().handles })
  await ranks.close()
  backend.dispose()
}
