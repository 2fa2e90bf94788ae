/**
 * @file Finds the MPI library, opens it with koffi, and detects its binary interface. There are two: Open MPI's, whose handles are pointers to exported objects, and
 * MPICH's (also Intel MPI, MVAPICH, Cray), whose handles are numbers. Only eleven functions and three handles are used.
 */
import { MoeError } from '@moe/core'
import { type Koffi, openFirst } from '../open-library.ts'

type Library = ReturnType<Koffi['load']>

/** Buffers, as arrays or addresses, handles, and counts. */
type Argument = ArrayBufferView | bigint | number | null
type Call = (...args: Argument[]) => number

/** MPI's functions and handles. Requests and messages have 8 bytes, of which each interface uses as many as it needs. */
export interface MpiLibrary {
  readonly path: string
  readonly interface: 'Open MPI' | 'MPICH'
  /** The first line of the library's version string. */
  readonly version: string
  readonly world: Argument
  readonly byte: Argument
  /** The error handler that makes functions return errors instead of aborting. */
  readonly errorsReturn: Argument
  readonly call: Readonly<Record<keyof typeof prototypes, Call>>
  /** The address of a buffer, valid while the buffer is alive. */
  address(bytes: Uint8Array): bigint
  /** @throws MoeError E_BACKEND unless the status is success */
  check(status: number, op: string): void
}

/** `HANDLE` stands for the interface's type of communicators, datatypes and error handlers. */
const prototypes = {
  initThread: 'int MPI_Init_thread(void* argc, void* argv, int required, void* provided)',
  setErrorHandler: 'int MPI_Comm_set_errhandler(HANDLE communicator, HANDLE handler)',
  rank: 'int MPI_Comm_rank(HANDLE communicator, void* rank)',
  size: 'int MPI_Comm_size(HANDLE communicator, void* size)',
  send: 'int MPI_Isend(uint64_t bytes, int count, HANDLE type, int to, int tag, HANDLE communicator, void* request)',
  probe: 'int MPI_Improbe(int from, int tag, HANDLE communicator, void* found, void* message, void* status)',
  receive: 'int MPI_Imrecv(uint64_t bytes, int count, HANDLE type, void* message, void* request)',
  test: 'int MPI_Test(void* request, void* done, void* status)',
  count: 'int MPI_Get_count(void* status, HANDLE type, void* count)',
  errorString: 'int MPI_Error_string(int code, void* text, void* length)',
  finalize: 'int MPI_Finalize()',
} as const

const names: Readonly<Partial<Record<NodeJS.Platform, Readonly<Record<'open' | 'mpich', readonly string[]>>>>> = {
  linux: { open: ['libmpi.so.40', 'libmpi.so'], mpich: ['libmpich.so.12', 'libmpi.so.12', 'libmpi.so'] },
  darwin: { open: ['libmpi.dylib'], mpich: ['libmpi.dylib', 'libmpich.dylib'] },
}

/** The libraries to try: first that of the launcher that started this process. */
function candidates(environment: NodeJS.ProcessEnv): readonly string[] {
  const { open = [], mpich = [] } = names[process.platform] ?? {}
  const started = environment['PMI_RANK'] !== undefined && environment['OMPI_COMM_WORLD_RANK'] === undefined
  return [...new Set(started ? [...mpich, ...open] : [...open, ...mpich])]
}

/**
 * Opens the MPI library.
 * @param path of the library. Default: MOE_MPI_LIBRARY, or else the installed ones
 * @throws MoeError E_NO_BACKEND if none can be opened, with what was tried
 */
export async function openMpi(path = process.env['MOE_MPI_LIBRARY']): Promise<MpiLibrary> {
  const tried = path ? [path] : candidates(process.env)
  if (tried.length === 0) throw noMpi(`no known MPI library names on ${process.platform}`)
  // Open MPI's plugins need its symbols in the global namespace.
  const open = (koffi: Koffi, name: string) => bind(koffi, koffi.load(name, { global: true }), name)
  return openFirst('MPI library', tried, open, noMpi)
}

function noMpi(problem: string): MoeError {
  return new MoeError({
    code: 'E_NO_BACKEND',
    op: 'mpi',
    problem,
    fix: 'install Open MPI or MPICH, or set MOE_MPI_LIBRARY to the path of the library; without MPI, local(size, work) runs several ranks in one process',
  })
}

function bind(koffi: Koffi, library: Library, path: string): MpiLibrary {
  const handles = handlesOf(library)
  const declared = (prototype: string) => library.func(prototype.replaceAll('HANDLE', handles.type)) as unknown as Call
  const call = Object.fromEntries(
    Object.entries(prototypes).map(([name, prototype]) => [name, declared(prototype)]),
  ) as unknown as MpiLibrary['call']
  const textOf = (fill: (text: Uint8Array, length: Int32Array) => number) => {
    const text = new Uint8Array(8192)
    const length = new Int32Array(1)
    return fill(text, length) === 0 ? new TextDecoder().decode(text.subarray(0, length[0])) : 'an unknown error'
  }
  return {
    ...handles,
    path,
    version: textOf(declared('int MPI_Get_library_version(void* text, void* length)')).split('\n')[0],
    call,
    address: bytes => koffi.address(bytes.buffer) + BigInt(bytes.byteOffset),
    check(status, op) {
      if (status === 0) return
      throw new MoeError({
        code: 'E_BACKEND',
        op: `mpi ${op}`,
        problem: textOf((text, length) => call.errorString(status, text, length)),
        fix: 'end all ranks, because the others may wait for messages that will not arrive',
        details: { status },
      })
    },
  }
}

/** Detects the interface, and returns its handles. */
function handlesOf(library: Library) {
  const address = (name: string): bigint | undefined => {
    try {
      return library.symbol(name) as bigint
    } catch {
      return undefined
    }
  }
  const world = address('ompi_mpi_comm_world')
  if (world !== undefined) {
    const [byte, errorsReturn] = ['ompi_mpi_byte', 'ompi_mpi_errors_return'].map(name => address(name) as bigint)
    return { interface: 'Open MPI', type: 'uint64_t', world, byte, errorsReturn } as const
  }
  // Values in mpi.h that the MPICH ABI Compatibility Initiative guarantees.
  return { interface: 'MPICH', type: 'int', world: 0x44000000, byte: 0x4c00010d, errorsReturn: 0x54000001 } as const
}
