/** @file cuBLASLt where it is installed: found and opened with koffi, its functions with handles and addresses as numbers. */
import { MoeError } from '@moe/core'
import type { Device } from '../driver/device.ts'
import type { Koffi } from '../driver/driver.ts'
import { candidates } from './candidates.ts'

/** As cublasLt.h 13.1.1 declares them; 12.0 and later have the same. */
const prototypes = {
  cublasLtGetVersion: 'size_t cublasLtGetVersion()',
  cublasLtCreate: 'int cublasLtCreate(void* handle)',
  cublasLtDestroy: 'int cublasLtDestroy(uint64_t handle)',
  cublasLtMatmulDescCreate: 'int cublasLtMatmulDescCreate(void* description, int compute, int scale)',
  cublasLtMatmulDescDestroy: 'int cublasLtMatmulDescDestroy(uint64_t description)',
  cublasLtMatmulDescSetAttribute:
    'int cublasLtMatmulDescSetAttribute(uint64_t description, int attribute, const void* value, size_t bytes)',
  cublasLtMatrixLayoutCreate:
    'int cublasLtMatrixLayoutCreate(void* layout, int type, uint64_t rows, uint64_t columns, int64_t ld)',
  cublasLtMatrixLayoutDestroy: 'int cublasLtMatrixLayoutDestroy(uint64_t layout)',
  cublasLtMatrixLayoutSetAttribute:
    'int cublasLtMatrixLayoutSetAttribute(uint64_t layout, int attribute, const void* value, size_t bytes)',
  cublasLtMatmulPreferenceCreate: 'int cublasLtMatmulPreferenceCreate(void* preference)',
  cublasLtMatmulPreferenceDestroy: 'int cublasLtMatmulPreferenceDestroy(uint64_t preference)',
  cublasLtMatmulPreferenceSetAttribute:
    'int cublasLtMatmulPreferenceSetAttribute(uint64_t preference, int attribute, const void* value, size_t bytes)',
  cublasLtMatmulAlgoGetHeuristic:
    'int cublasLtMatmulAlgoGetHeuristic(uint64_t handle, uint64_t description, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t preference, int most, void* results, void* count)',
  cublasLtMatmul:
    'int cublasLtMatmul(uint64_t handle, uint64_t description, uint64_t alpha, uint64_t a, uint64_t layoutA, uint64_t b, uint64_t layoutB, uint64_t beta, uint64_t c, uint64_t layoutC, uint64_t d, uint64_t layoutD, uint64_t algorithm, uint64_t workspace, size_t workspaceBytes, uint64_t stream)',
} as const

type Argument = number | ArrayBufferView
type Functions = { readonly [Name in keyof typeof prototypes]: (...args: Argument[]) => number }

/** The library, with a handle of the current context. */
export interface CublasLtLibrary {
  readonly path: string
  /** "13.1.1". */
  readonly version: string
  readonly handle: number
  /** `call.cublasLtX(...)` returns the raw status. */
  readonly call: Functions
  statusName(code: number): string
}

/** The oldest major version known to use these constants. */
const leastMajor = 12

/**
 * Opens cuBLASLt for the current context.
 * @param path Path of the library, or undefined to search the usual places.
 * @returns undefined if no library was found that fits the driver
 * @throws MoeError E_CONFIG, with the reason, if the library at `path` cannot be loaded or does not fit
 */
export function openCublasLt(koffi: Koffi, device: Device, path: string | undefined): CublasLtLibrary | undefined {
  for (const candidate of path === undefined ? candidates(process.env) : [path]) {
    try {
      return open(koffi, candidate, device)
    } catch (cause) {
      if (path !== undefined) throw unusable(path, cause)
    }
  }
  return undefined
}

function open(koffi: Koffi, path: string, { driverVersion }: Device): CublasLtLibrary {
  const library = koffi.load(path)
  const call = Object.fromEntries(
    Object.entries(prototypes).map(([name, prototype]) => [name, library.func(prototype)]),
  ) as unknown as Functions
  const nameOf = library.func('const char* cublasLtGetStatusName(int status)') as unknown as (code: number) => string
  const number = call.cublasLtGetVersion()
  const major = Math.floor(number / 10000)
  const version = `${major}.${Math.floor((number % 10000) / 100)}.${number % 100}`
  if (major < leastMajor) throw new Error(`it has version ${version}, but ${leastMajor} or later is required`)
  // Within a major version, older drivers run newer libraries.
  if (driverVersion < major * 1000) {
    const made = `${Math.floor(driverVersion / 1000)}.${(driverVersion % 1000) / 10}`
    throw new Error(`version ${version} needs a driver for CUDA ${major}, but this one supports CUDA ${made}`)
  }
  const word = new BigUint64Array(1)
  const code = call.cublasLtCreate(word)
  if (code !== 0) throw new Error(`cublasLtCreate returned ${nameOf(code)} (${code})`)
  return { path, version, handle: Number(word[0]), call, statusName: nameOf }
}

function unusable(path: string, cause: unknown): MoeError {
  return new MoeError({
    code: 'E_CONFIG',
    op: 'kernels-cuda',
    problem: `cuBLASLt from ${path} cannot be used: ${cause instanceof Error ? cause.message : cause}`,
    fix: 'pass the path of a libcublasLt.so that fits the driver, or set MOE_CUDA_CUBLASLT=0 to disable cuBLASLt',
    cause,
  })
}
