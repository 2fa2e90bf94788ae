/** @file Finds and loads the native library for the best instruction set that this CPU supports. */
import { existsSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { MoeError } from '@moe/core'
import { familySync } from 'detect-libc'
import { levels, libraryName, platformName } from './platforms.mjs'

/** An instruction set. `baseline` is SSE2 on x86-64 and NEON on arm64; `avx*` are x86-64, `dotprod` and `bf16` arm64. Each has its own library. */
export type Isa = 'baseline' | 'avx2' | 'avx512' | 'avx512vnni' | 'avx512bf16' | 'dotprod' | 'bf16'
/** The instruction sets of this machine's architecture, lowest first. */
export const isas = Object.keys(levels[process.arch as keyof typeof levels] ?? { baseline: {} }) as readonly Isa[]
/** Instruction sets with bf16 matrix products. */
export const bf16Isas: ReadonlySet<Isa> = new Set(['avx512bf16', 'bf16'])

const abiVersion = 5

/** The C functions of native/abi.h, with addresses and sizes as numbers. */
export interface NativeLibrary {
  readonly isa: Isa
  readonly path: string
  readonly defaultThreads: number
  /** The C function of an op: takes the address of its slots and returns a status. @throws MoeError E_BACKEND if the library lacks it */
  entry(name: string): (slots: number) => number
  /** Address of that function, for `replay`. */
  entryAddress(name: string): number
  /** Runs recorded calls; see native/runtime.cc. */
  replay(calls: number, count: number): number
  lastError(): string
  /** Address of new memory; 0 if out of memory. */
  allocate(bytes: number): number
  release(pointer: number, bytes: number): void
  /** Lets the system reclaim the pages of this memory, whose contents are no longer needed. */
  discard(pointer: number, bytes: number): void
  trim(): void
  upload(to: number, from: ArrayBufferView, bytes: number): void
  download(to: ArrayBufferView, from: number, bytes: number): void
  /** Address of an array buffer's memory, valid while the buffer lives. */
  address(buffer: ArrayBufferLike): number
}

const statusOutOfMemory = 2

/** The error for a kernel's status, with the library's last message. */
export function failure(library: NativeLibrary, op: string, status: number): MoeError {
  const problem = library.lastError()
  if (status !== statusOutOfMemory) return new MoeError({ code: 'E_BACKEND', op, problem })
  const fix = 'use a smaller batch or free tensors that are no longer needed'
  return new MoeError({ code: 'E_OUT_OF_MEMORY', op, problem, fix })
}

/**
 * Loads the native library.
 * @param most highest instruction set to use; lower ones are used if the CPU does not support it. Default: the fastest one of this CPU
 * @throws MoeError E_NO_BACKEND if there is no library for this machine, listing the places that were tried
 */
export async function loadLibrary(most?: Isa): Promise<NativeLibrary> {
  const koffi = await importKoffi()
  const folder = findFolder()
  const present = isas.filter(isa => existsSync(join(folder, fileName(isa))))
  // The lowest one reports what the CPU supports. If it is the only one, it was built for this machine.
  const probe = open(koffi, folder, present[0])
  const limit = Math.min(isas.indexOf(probe.isaOfCpu), isas.indexOf(most ?? probe.fastestIsa))
  const best = present.findLast(isa => isas.indexOf(isa) <= limit)
  if (best === undefined) {
    throw new MoeError({
      code: 'E_NO_BACKEND',
      op: 'kernels-cpu',
      problem: `${folder} has no library for ${most ?? probe.fastestIsa} or a lower instruction set`,
      fix: 'build all libraries with `node scripts/build-native.mjs`',
    })
  }
  return best === probe.isa ? probe : open(koffi, folder, best)
}

type Koffi = typeof import('koffi')

async function importKoffi(): Promise<Koffi> {
  try {
    const module = await import('koffi')
    return (module as unknown as { default?: Koffi }).default ?? module
  } catch (cause) {
    throw new MoeError({
      code: 'E_NO_BACKEND',
      op: 'kernels-cpu',
      problem: `koffi (used to call native code) failed to load: ${cause instanceof Error ? cause.message : cause}`,
      fix: 'reinstall with optional dependencies, which include its binary for this platform; if your program is bundled, leave @moe/kernels-cpu out of the bundle',
      cause,
    })
  }
}

const fileName = (isa: Isa): string => libraryName(isa, process.platform)

/** The folder that contains the libraries: MOE_CPU_LIBRARY, or else the local build, or else the package for this platform. */
function findFolder(): string {
  const chosen = process.env['MOE_CPU_LIBRARY']
  const folders = chosen ? [() => chosen] : [builtHere, fromPackage]
  const tried: string[] = []
  for (const find of folders) {
    const folder = find()
    if (isas.some(isa => existsSync(join(folder, fileName(isa))))) return folder
    tried.push(folder)
  }
  throw new MoeError({
    code: 'E_NO_BACKEND',
    op: 'kernels-cpu',
    problem: `found no native library in ${tried.join(' or ')}`,
    fix:
      'install with optional dependencies, which include it for Linux, macOS and Windows; ' +
      'in a checkout or on another system, install a C++ compiler and run `node scripts/build-native.mjs` in the folder of @moe/kernels-cpu',
    details: { platform: `${process.platform}-${process.arch}`, tried },
  })
}

function builtHere(): string {
  const root = dirname(dirname(fileURLToPath(import.meta.url)))
  return join(root, 'build', platformName(process.platform, process.arch))
}

/** The folder of this platform's package, or the package's name if it is not installed. */
function fromPackage(): string {
  const name = `@moe/kernels-cpu-${platformName(process.platform, process.arch, familySync())}`
  try {
    return dirname(createRequire(import.meta.url).resolve(`${name}/package.json`))
  } catch {
    return name
  }
}

function open(
  koffi: Koffi,
  folder: string,
  isa: Isa,
): NativeLibrary & { readonly isaOfCpu: Isa; readonly fastestIsa: Isa } {
  const path = join(folder, fileName(isa))
  let library: ReturnType<Koffi['load']>
  try {
    library = koffi.load(path)
  } catch (cause) {
    throw new MoeError({
      code: 'E_NO_BACKEND',
      op: 'kernels-cpu',
      problem: `${path} failed to load: ${cause instanceof Error ? cause.message : cause}`,
      fix: 'rebuild it on this machine with `node scripts/build-native.mjs --force`',
      cause,
    })
  }
  const version = library.func('int moe_abi_version()')() as number
  if (version !== abiVersion) {
    throw new MoeError({
      code: 'E_NO_BACKEND',
      op: 'kernels-cpu',
      problem: `${path} has version ${version} of the native interface, but this package needs version ${abiVersion}`,
      fix: 'rebuild it with `node scripts/build-native.mjs`',
    })
  }
  return {
    isa,
    path,
    isaOfCpu: library.func('const char* moe_cpu_isa()')() as Isa,
    fastestIsa: library.func('const char* moe_fastest_isa()')() as Isa,
    defaultThreads: library.func('int moe_default_threads()')() as number,
    entry(name) {
      try {
        return library.func(`int ${name}(int64_t slots)`) as unknown as (slots: number) => number
      } catch (cause) {
        const fix = 'rebuild it with `node scripts/build-native.mjs`'
        throw new MoeError({ code: 'E_BACKEND', op: name, problem: `${path} has no such kernel`, fix, cause })
      }
    },
    entryAddress: name => Number(koffi.address(library.symbol(name))),
    replay: library.func('int64_t moe_replay(int64_t calls, int64_t count)') as unknown as NativeLibrary['replay'],
    lastError: library.func('const char* moe_last_error()') as unknown as () => string,
    allocate: library.func('int64_t moe_allocate(int64_t bytes)') as unknown as (bytes: number) => number,
    release: library.func('void moe_release(int64_t pointer, int64_t bytes)') as unknown as NativeLibrary['release'],
    discard: library.func('void moe_discard(int64_t pointer, int64_t bytes)') as unknown as NativeLibrary['discard'],
    trim: library.func('void moe_trim()') as unknown as () => void,
    upload: library.func(
      'void moe_upload(int64_t to, const void* from, int64_t bytes)',
    ) as unknown as NativeLibrary['upload'],
    download: library.func(
      'void moe_download(void* to, int64_t from, int64_t bytes)',
    ) as unknown as NativeLibrary['download'],
    address: buffer => Number(koffi.address(buffer as ArrayBuffer)),
  }
}
