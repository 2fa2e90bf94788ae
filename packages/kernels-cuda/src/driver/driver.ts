/** @file The driver API: loads libcuda with koffi; addresses and handles are numbers. */
import { MoeError } from '@moe/core'
import { driverError, status } from './status.ts'

/** Host memory that a call reads or writes: an array, or an address. */
export type HostMemory = ArrayBufferView | number

/** Every driver function that is used, as declared in C. Handles and device addresses are 64-bit numbers (below 2^53 on all systems). */
export const prototypes = {
  cuInit: 'int cuInit(unsigned int flags)',
  cuDriverGetVersion: 'int cuDriverGetVersion(void* version)',
  cuDeviceGetCount: 'int cuDeviceGetCount(void* count)',
  cuDeviceGet: 'int cuDeviceGet(void* device, int ordinal)',
  cuDeviceGetName: 'int cuDeviceGetName(void* name, int length, int device)',
  cuDeviceTotalMem: 'int cuDeviceTotalMem_v2(void* bytes, int device)',
  cuDeviceGetAttribute: 'int cuDeviceGetAttribute(void* value, int attribute, int device)',
  cuDevicePrimaryCtxRetain: 'int cuDevicePrimaryCtxRetain(void* context, int device)',
  cuDevicePrimaryCtxRelease: 'int cuDevicePrimaryCtxRelease_v2(int device)',
  cuCtxSetCurrent: 'int cuCtxSetCurrent(uint64_t context)',
  cuStreamCreate: 'int cuStreamCreate(void* stream, unsigned int flags)',
  cuStreamDestroy: 'int cuStreamDestroy_v2(uint64_t stream)',
  cuStreamSynchronize: 'int cuStreamSynchronize(uint64_t stream)',
  cuStreamWaitEvent: 'int cuStreamWaitEvent(uint64_t stream, uint64_t event, unsigned int flags)',
  cuStreamBeginCapture: 'int cuStreamBeginCapture_v2(uint64_t stream, int mode)',
  cuStreamEndCapture: 'int cuStreamEndCapture(uint64_t stream, void* graph)',
  cuEventCreate: 'int cuEventCreate(void* event, unsigned int flags)',
  cuEventDestroy: 'int cuEventDestroy_v2(uint64_t event)',
  cuEventRecord: 'int cuEventRecord(uint64_t event, uint64_t stream)',
  cuEventQuery: 'int cuEventQuery(uint64_t event)',
  cuEventElapsedTime: 'int cuEventElapsedTime(void* milliseconds, uint64_t start, uint64_t end)',
  cuMemGetInfo: 'int cuMemGetInfo_v2(void* free, void* total)',
  cuMemAlloc: 'int cuMemAlloc_v2(void* pointer, size_t bytes)',
  cuMemFree: 'int cuMemFree_v2(uint64_t pointer)',
  cuMemAllocAsync: 'int cuMemAllocAsync(void* pointer, size_t bytes, uint64_t stream)',
  cuMemFreeAsync: 'int cuMemFreeAsync(uint64_t pointer, uint64_t stream)',
  cuMemHostAlloc: 'int cuMemHostAlloc(void* pointer, size_t bytes, unsigned int flags)',
  cuMemFreeHost: 'int cuMemFreeHost(uint64_t pointer)',
  cuMemcpyHtoDAsync: 'int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, uint64_t stream)',
  cuMemcpyDtoHAsync: 'int cuMemcpyDtoHAsync_v2(uint64_t to, uint64_t from, size_t bytes, uint64_t stream)',
  cuMemcpyDtoDAsync: 'int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, uint64_t stream)',
  cuMemsetD8Async: 'int cuMemsetD8Async(uint64_t pointer, unsigned char value, size_t bytes, uint64_t stream)',
  cuModuleLoadData: 'int cuModuleLoadData(void* module, const void* image)',
  cuModuleUnload: 'int cuModuleUnload(uint64_t module)',
  cuModuleGetFunction: 'int cuModuleGetFunction(void* function, uint64_t module, const char* name)',
  cuFuncSetAttribute: 'int cuFuncSetAttribute(uint64_t function, int attribute, int value)',
  cuLaunchKernel:
    'int cuLaunchKernel(uint64_t function, unsigned int gx, unsigned int gy, unsigned int gz, unsigned int bx, unsigned int by, unsigned int bz, unsigned int shared, uint64_t stream, uint64_t parameters, uint64_t extra)',
  cuTensorMapEncodeTiled:
    'int cuTensorMapEncodeTiled(void* map, int type, unsigned int rank, uint64_t address, const void* sizes, const void* strides, const void* box, const void* elementStrides, int interleave, int swizzle, int promotion, int fill)',
  cuGraphInstantiate: 'int cuGraphInstantiateWithFlags(void* exec, uint64_t graph, unsigned long long flags)',
  cuGraphGetNodes: 'int cuGraphGetNodes(uint64_t graph, void* nodes, void* count)',
  cuGraphLaunch: 'int cuGraphLaunch(uint64_t exec, uint64_t stream)',
  cuGraphExecDestroy: 'int cuGraphExecDestroy(uint64_t exec)',
  cuGraphDestroy: 'int cuGraphDestroy(uint64_t graph)',
} as const

export type DriverCall = keyof typeof prototypes
type Argument = number | string | HostMemory
type Functions = { readonly [Name in DriverCall]: (...args: Argument[]) => number }

/** The driver API. `call.cuX(...)` returns the raw status; `check` turns it into an error. */
export interface Driver {
  readonly path: string
  readonly call: Functions
  /** Whether the driver has this function; older ones may not. */
  has(name: DriverCall): boolean
  /** @throws MoeError unless the status is success. `op` and `context` (such as a launch shape or a size) describe what failed. */
  check(code: number, op: string, context?: string): void
  errorName(code: number): string
  /** Returns the value that the function writes through its first argument, as a number. */
  out(call: (pointer: BigUint64Array) => number, op: string, context?: string): number
  /** Address of an array buffer's memory, valid while the buffer lives. */
  address(buffer: ArrayBufferLike): number
  /** Memory at an address as bytes, without a copy. */
  view(address: number, bytes: number): Uint8Array
  /** Descriptions of the faults that the emulator has found; empty with a real driver. */
  report(): string
}

export type Koffi = typeof import('koffi')

const libraryNames: Readonly<Partial<Record<NodeJS.Platform, readonly string[]>>> = {
  linux: ['libcuda.so.1', '/usr/lib/wsl/lib/libcuda.so.1', '/usr/local/nvidia/lib64/libcuda.so.1'],
  win32: ['nvcuda.dll'],
}

/**
 * Loads the driver's library.
 * @param path Path of a library to use instead of the installed driver; default: MOE_CUDA_DRIVER.
 * @throws MoeError E_NO_BACKEND if there is none, with what was tried
 */
export async function openDriver(path = process.env['MOE_CUDA_DRIVER']): Promise<Driver> {
  const koffi = await importKoffi()
  const names = path ? [path] : (libraryNames[process.platform] ?? [])
  if (names.length === 0) throw noDriver(`there is no NVIDIA driver for ${process.platform}`)
  let reason = ''
  for (const name of names) {
    try {
      return bind(koffi, koffi.load(name), name)
    } catch (cause) {
      // The first place is the usual one, so report its error.
      reason ||= `${name}: ${cause instanceof Error ? cause.message : cause}`
    }
  }
  throw noDriver(`found no NVIDIA driver (${reason})`)
}

/** @throws MoeError E_NO_BACKEND if koffi fails to load */
export async function importKoffi(): Promise<Koffi> {
  try {
    const module = await import('koffi')
    return (module as unknown as { default?: Koffi }).default ?? module
  } catch (cause) {
    throw noDriver(`koffi (used to call the driver) failed to load: ${cause instanceof Error ? cause.message : cause}`)
  }
}

function noDriver(problem: string): MoeError {
  return new MoeError({
    code: 'E_NO_BACKEND',
    op: 'kernels-cuda',
    problem,
    fix: 'install the NVIDIA driver (no CUDA toolkit is needed), or use @moe/kernels-cpu',
  })
}

function bind(koffi: Koffi, library: ReturnType<Koffi['load']>, path: string): Driver {
  const call = Object.fromEntries(
    Object.entries(prototypes).map(([name, prototype]) => [name, lazily(library, name, prototype)]),
  ) as Functions
  const nameOf = library.func('int cuGetErrorName(int status, void* name)') as unknown as (
    code: number,
    name: BigUint64Array,
  ) => number
  const report = optional(library, 'const char* moe_emulator_report()') as (() => string) | undefined
  const word = new BigUint64Array(1)

  function errorName(code: number): string {
    if (nameOf(code, word) !== 0 || word[0] === 0n) return 'an unknown error'
    return koffi.decode(word[0], 'char', -1) as string
  }

  const driver: Driver = {
    path,
    call,
    has: name => optional(library, prototypes[name]) !== undefined,
    errorName,
    check(code, op, context = '') {
      if (code !== status.success) throw driverError(op, code, errorName(code), context, driver.report())
    },
    out(run, op, context) {
      word[0] = 0n
      driver.check(run(word), op, context)
      return Number(word[0])
    },
    address: buffer => Number(koffi.address(buffer)),
    view: (address, bytes) => new Uint8Array(koffi.view(BigInt(address), bytes)),
    report: () => report?.() ?? '',
  }
  return driver
}

/** A function of the library, looked up at its first call, so that a missing one only fails the ops that need it. */
function lazily(library: ReturnType<Koffi['load']>, name: string, prototype: string): (...args: Argument[]) => number {
  let found: ((...args: Argument[]) => number) | undefined
  return (...args) => {
    if (found === undefined) {
      const entry = optional(library, prototype)
      if (entry === undefined) {
        throw new MoeError({
          code: 'E_BACKEND',
          op: 'kernels-cuda',
          problem: `the driver has no ${name}`,
          fix: 'update the NVIDIA driver',
        })
      }
      found = entry as (...args: Argument[]) => number
    }
    return found(...args)
  }
}

function optional(library: ReturnType<Koffi['load']>, prototype: string): unknown {
  try {
    return library.func(prototype)
  } catch {
    return undefined
  }
}
