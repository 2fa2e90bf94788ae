/** @file Finds and opens the native library: the best one that this CPU runs. */
import { existsSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { MoeError } from '@moe/core'
import { familySync } from 'detect-libc'
import { levels, libraryName, platformName } from './platforms.mjs'

/** Instruction sets of x86-64 and, behind the baseline of both, of arm64, where that is NEON. Each has a library of its own. */
export type Isa = 'baseline' | 'avx2' | 'avx512' | 'avx512bf16' | 'dotprod' | 'bf16'
/** Those of this machine's architecture, lowest first. */
export const isas = Object.keys(levels[process.arch as keyof typeof levels] ?? { baseline: {} }) as readonly Isa[]
/** Those whose matrix products can take bf16. */
export const bf16Isas: ReadonlySet<Isa> = new Set(['avx512bf16', 'bf16'])

const abiVersion = 4

/** The C functions of native/abi.h, with addresses and sizes as numbers. */
export interface NativeLibrary {
  readonly isa: Isa
  readonly path: string
  readonly defaultThreads: number
  /** The C function of an op: takes the address of its slots, gives a status. @throws MoeError E_BACKEND when it is not there. */
  entry(name: string): (slots: number) => number
  /** Address of that function, for `replay`. */
  entryAddress(name: string): number
  /** Runs recorded calls: see native/runtime.cc. */
  replay(calls: number, count: number): number
  lastError(): string
  /** 0 when there is no memory. */
  allocate(bytes: number): number
  release(pointer: number, bytes: number): void
  /** Pages of it whose content is no longer needed may go. */
  discard(pointer: number, bytes: number): void
  trim(): void
  upload(to: number, from: ArrayBufferView, bytes: number): void
  download(to: ArrayBufferView, from: number, bytes: number): void
  /** Address of an array buffer's memory, valid while the buffer lives. */
  address(buffer: ArrayBufferLike): number
}

/**
 * @param most Highest instruction set to use, when the CPU has it.
 * @throws MoeError E_NO_BACKEND when there is no library for this machine, with the places that were tried.
 */
export async function loadLibrary(most: Isa): Promise<NativeLibrary> {
  const koffi = await importKoffi()
  const folder = findFolder()
  const present = isas.filter(isa => existsSync(join(folder, fileName(isa))))
  // The lowest one says what the CPU has. Where it is alone, it was built for this machine.
  const probe = open(koffi, folder, present[0])
  const limit = Math.min(isas.indexOf(probe.isaOfCpu), isas.indexOf(most))
  const best = present.findLast(isa => isas.indexOf(isa) <= limit)
  if (best === undefined) {
    throw new MoeError({
      code: 'E_NO_BACKEND',
      op: 'kernels-cpu',
      problem: `${folder} has no library for ${most} or less`,
      fix: 'build all of them: node scripts/build-native.mjs',
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
      problem: `koffi, which calls native code, does not load: ${cause instanceof Error ? cause.message : cause}`,
      fix: 'reinstall with optional dependencies, which bring its binary for this platform',
      cause,
    })
  }
}

const fileName = (isa: Isa): string => libraryName(isa, process.platform)

/** The folder with the libraries: MOE_CPU_LIBRARY, what was built here, or the platform's package. */
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
    problem: `no native library in ${tried.join(' or ')}`,
    fix:
      'install with optional dependencies, which bring it for Linux, macOS and Windows; ' +
      'in a checkout or on another system install a C++ compiler and run `node scripts/build-native.mjs` in the folder of @moe/kernels-cpu',
    details: { platform: `${process.platform}-${process.arch}`, tried },
  })
}

function builtHere(): string {
  const root = dirname(dirname(fileURLToPath(import.meta.url)))
  return join(root, 'build', platformName(process.platform, process.arch))
}

/** The folder of the platform's package, its name where there is none. */
function fromPackage(): string {
  const name = `@moe/kernels-cpu-${platformName(process.platform, process.arch, familySync())}`
  try {
    return dirname(createRequire(import.meta.url).resolve(`${name}/package.json`))
  } catch {
    return name
  }
}

function open(koffi: Koffi, folder: string, isa: Isa): NativeLibrary & { readonly isaOfCpu: Isa } {
  const path = join(folder, fileName(isa))
  let library: ReturnType<Koffi['load']>
  try {
    library = koffi.load(path)
  } catch (cause) {
    throw new MoeError({
      code: 'E_NO_BACKEND',
      op: 'kernels-cpu',
      problem: `${path} does not load: ${cause instanceof Error ? cause.message : cause}`,
      fix: 'build it again on this machine: node scripts/build-native.mjs --force',
      cause,
    })
  }
  const version = library.func('int moe_abi_version()')() as number
  if (version !== abiVersion) {
    throw new MoeError({
      code: 'E_NO_BACKEND',
      op: 'kernels-cpu',
      problem: `${path} speaks version ${version} of the native interface, this package version ${abiVersion}`,
      fix: 'build it again: node scripts/build-native.mjs',
    })
  }
  return {
    isa,
    path,
    isaOfCpu: library.func('const char* moe_cpu_isa()')() as Isa,
    defaultThreads: library.func('int moe_default_threads()')() as number,
    entry(name) {
      try {
        return library.func(`int ${name}(int64_t slots)`) as unknown as (slots: number) => number
      } catch (cause) {
        const fix = 'build it again: node scripts/build-native.mjs'
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
