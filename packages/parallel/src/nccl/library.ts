/** @file Finds NVIDIA's NCCL and opens it with koffi. Handles and addresses are numbers. */
import { existsSync, readdirSync } from 'node:fs'
import { join } from 'node:path'
import { MoeError } from '@moe/core'
import { type Koffi, openFirst } from '../open-library.ts'

/** Arrays, addresses and handles. */
type Argument = ArrayBufferView | number
type Call = (...args: Argument[]) => number

/** As declared in nccl.h 2.30; the same since 2.18. */
export const prototypes = {
  ncclGetVersion: 'int ncclGetVersion(void* version)',
  ncclGetUniqueId: 'int ncclGetUniqueId(void* id)',
  ncclCommFinalize: 'int ncclCommFinalize(uint64_t comm)',
  ncclCommDestroy: 'int ncclCommDestroy(uint64_t comm)',
  ncclCommAbort: 'int ncclCommAbort(uint64_t comm)',
  ncclCommGetAsyncError: 'int ncclCommGetAsyncError(uint64_t comm, void* state)',
  ncclGroupStart: 'int ncclGroupStart()',
  ncclGroupEnd: 'int ncclGroupEnd()',
  ncclSend: 'int ncclSend(uint64_t from, size_t count, int type, int peer, uint64_t comm, uint64_t stream)',
  ncclRecv: 'int ncclRecv(uint64_t to, size_t count, int type, int peer, uint64_t comm, uint64_t stream)',
} as const

/** Constants of nccl.h. */
export const numbers = {
  success: 0,
  inProgress: 7,
  /** ncclUint8: everything is sent as bytes. */
  bytes: 1,
  uniqueIdBytes: 128,
  configMagic: 0xcafebeef,
  /** NCCL_VERSION(2, 18, 0): the version whose ncclConfig_t is filled in, and the oldest one supported. */
  leastVersion: 21800,
} as const

/** The NCCL library. `call.ncclX(...)` returns the raw result. */
export interface NcclLibrary {
  readonly path: string
  /** For example "2.30.7". */
  readonly version: string
  readonly call: { readonly [Name in keyof typeof prototypes]: Call }
  /** Starts to create a communicator of `ranks` ranks on the current device, without waiting for the others. @returns its handle */
  begin(ranks: number, rank: number, id: Uint8Array): number
  /** @param comm adds details of its latest error. @throws MoeError E_BACKEND unless the result is success or in progress */
  check(result: number, op: string, comm?: number): void
}

/**
 * Opens NCCL.
 * @param path of the library. Default: MOE_NCCL_LIBRARY, or else the installed one
 * @throws MoeError E_NO_BACKEND if none can be opened, with what was tried
 */
export async function openNccl(path = process.env['MOE_NCCL_LIBRARY']): Promise<NcclLibrary> {
  return openFirst('NCCL', path ? [path] : candidates(process.env), bind, noNccl)
}

/** The library in the system's search path, and the ones that PyTorch installs into an active Python environment. */
function candidates(env: NodeJS.ProcessEnv): string[] {
  const found = [env['VIRTUAL_ENV'], env['CONDA_PREFIX']].flatMap(root => {
    if (!root) return []
    const lib = join(root, 'lib')
    const versions = existsSync(lib) ? readdirSync(lib).filter(name => name.startsWith('python3')) : []
    return [lib, ...versions.sort().map(version => join(lib, version, 'site-packages', 'nvidia', 'nccl', 'lib'))]
  })
  return ['libnccl.so.2', ...found.map(folder => join(folder, 'libnccl.so.2')).filter(file => existsSync(file))]
}

function noNccl(problem: string): MoeError {
  return new MoeError({
    code: 'E_NO_BACKEND',
    op: 'nccl',
    problem,
    fix: "install NVIDIA's libnccl2 (2.18 or later), or set MOE_NCCL_LIBRARY to its path; without NCCL, the communicator of mpi() sends GPU tensors through host memory",
  })
}

function bind(koffi: Koffi, path: string): NcclLibrary {
  const library = koffi.load(path)
  const call = Object.fromEntries(
    Object.entries(prototypes).map(([name, prototype]) => [name, library.func(prototype)]),
  ) as unknown as NcclLibrary['call']
  const errorString = library.func('const char* ncclGetErrorString(int result)') as unknown as (code: number) => string
  const lastError = library.func('const char* ncclGetLastError(uint64_t comm)') as unknown as (comm: number) => string
  const word = new Int32Array(1)
  call.ncclGetVersion(word)
  const version = `${Math.floor(word[0] / 10000)}.${Math.floor((word[0] % 10000) / 100)}.${word[0] % 100}`
  if (word[0] < numbers.leastVersion) throw new Error(`version ${version} is too old, 2.18 or later is required`)
  const id = koffi.struct({ internal: koffi.array('uint8_t', numbers.uniqueIdBytes, 'Typed') })
  const init = library.func('ncclCommInitRankConfig', 'int', ['void*', 'int', id, 'int', 'void*']) as unknown as (
    comm: BigUint64Array,
    ranks: number,
    id: { readonly internal: Uint8Array },
    rank: number,
    config: Uint8Array,
  ) => number

  function check(result: number, op: string, comm = 0): void {
    if (result === numbers.success || result === numbers.inProgress) return
    const lastMessage = lastError(comm)
    throw new MoeError({
      code: 'E_BACKEND',
      op: `nccl ${op}`,
      problem: `${errorString(result)}${lastMessage ? `: ${lastMessage}` : ''}`,
      fix: 'end all ranks, because the others may wait for messages that will not arrive; check that each rank has its own device, and set NCCL_DEBUG=WARN for details',
      details: { result },
    })
  }

  return {
    path,
    version,
    call,
    begin(ranks, rank, bytes) {
      const comm = new BigUint64Array(1)
      check(init(comm, ranks, { internal: bytes }, rank, configuration()), 'begin')
      return Number(comm[0])
    },
    check,
  }
}

/** An ncclConfig_t of version 2.18 with non-blocking calls and defaults for everything else. */
function configuration(): Uint8Array {
  const bytes = new DataView(new ArrayBuffer(48))
  const undefinedNumber = -(2 ** 31)
  bytes.setBigUint64(0, 48n, true)
  bytes.setUint32(8, numbers.configMagic, true)
  bytes.setUint32(12, numbers.leastVersion, true)
  // blocking, cgaClusterSize, minCTAs, maxCTAs, netName (null), splitShare
  bytes.setInt32(16, 0, true)
  for (const at of [20, 24, 28, 40]) bytes.setInt32(at, undefinedNumber, true)
  return new Uint8Array(bytes.buffer)
}
