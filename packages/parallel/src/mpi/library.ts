/**
 * @file The MPI library: found, opened with koffi, and told apart. There are two binary interfaces: Open MPI's, whose handles are pointers to objects that it exports, and
 * MPICH's (also Intel MPI, MVAPICH, Cray), whose handles are numbers. Eleven functions and three handles are all that is used.
 */
import { MoeError } from '@moe/core'
import { type Koffi, openFirst } from '../open-library.ts'

type Library = ReturnType<Koffi['load']>

/** Buffers, as arrays or as addresses; handles and counts. */
type Argument = ArrayBufferView | bigint | number | null
type Call = (...args: Argument[]) => number

/** MPI with the handles that are used. Requests and messages are 8 bytes, of which either interface fills what it needs. */
export interface MpiLibrary {
  readonly path: string
  readonly interface: 'Open MPI' | 'MPICH'
  /** First line of what the library calls itself. */
  readonly version: string
  readonly world: Argument
  readonly byte: Argument
  /** The error handler that makes failures return values. */
  readonly errorsReturn: Argument
  readonly call: Readonly<Record<keyof typeof prototypes, Call>>
  /** Address of a buffer, valid while it lives. */
  address(bytes: Uint8Array): bigint
  /** @throws MoeError E_BACKEND unless the status is success */
  check(status: number, op: string): void
}

/** `HANDLE` is what either interface has for communicators, datatypes and error handlers. */
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

/** Libraries to try: that of the launcher that started this process first. */
function candidates(environment: NodeJS.ProcessEnv): readonly string[] {
  const { open = [], mpich = [] } = names[process.platform] ?? {}
  const started = environment['PMI_RANK'] !== undefined && environment['OMPI_COMM_WORLD_RANK'] === undefined
  return [...new Set(started ? [...mpich, ...open] : [...open, ...mpich])]
}

/**
 * Opens the MPI library.
 * @param path in place of the installed ones; default: MOE_MPI_LIBRARY
 * @throws MoeError E_NO_BACKEND where there is none, with what was tried
 */
export async function openMpi(path = process.env['MOE_MPI_LIBRARY']): Promise<MpiLibrary> {
  const tried = path ? [path] : candidates(process.env)
  if (tried.length === 0) throw noMpi(`MPI is not looked for on ${process.platform}`)
  // Open MPI's plugins look for its symbols among the global ones.
  const open = (koffi: Koffi, name: string) => bind(koffi, koffi.load(name, { global: true }), name)
  return openFirst('MPI library', tried, open, noMpi)
}

function noMpi(problem: string): MoeError {
  return new MoeError({
    code: 'E_NO_BACKEND',
    op: 'mpi',
    problem,
    fix: 'install Open MPI or MPICH, or name the library in MOE_MPI_LIBRARY; without MPI, local(size, work) runs several ranks in one process',
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
        fix: 'end all ranks: what others wait for will not come',
        details: { status },
      })
    },
  }
}

/** Which of the two interfaces it is, and its handles. */
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
  // Values of mpi.h that the MPICH ABI Compatibility Initiative keeps.
  return { interface: 'MPICH', type: 'int', world: 0x44000000, byte: 0x4c00010d, errorsReturn: 0x54000001 } as const
}
