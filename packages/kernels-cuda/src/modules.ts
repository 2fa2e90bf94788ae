/** @file Loads fatbins when their first kernel is launched, and packs arguments according to the kernel's signature. */
import { existsSync, readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { isMoeError, MoeError } from '@moe/core'
import type { Device } from './driver/device.ts'
import type { Driver } from './driver/driver.ts'
import { status } from './driver/status.ts'
import { mapAlignment, mapWords, type TensorMap } from './tensor-map.ts'

/** How a kernel is launched. */
export interface LaunchShape {
  /** Number of blocks along x, or along x, y and z, up to `mostBlocks`. If one is zero, nothing is launched. */
  readonly grid: number | readonly number[]
  /** Number of threads per block. */
  readonly block: number
  /** Dynamic shared memory in bytes. */
  readonly shared?: number
}

/** A launch as it is passed to the driver. */
export interface Launch {
  readonly kernel: string
  readonly function: number
  readonly grid: readonly [x: number, y: number, z: number]
  readonly block: number
  readonly shared: number
  /** Address of the list of argument addresses. The driver lays the arguments out on the device, as compilers may align large ones differently. */
  readonly arguments: number
}

/** A number, a list for an array parameter (padded with zeros), or a tensor map. */
type Argument = number | readonly number[] | TensorMap

/** Launches a kernel: its arguments in order. */
export type CudaKernel = (shape: LaunchShape, ...args: ReadonlyArray<Argument>) => void

/** Maximum number of blocks of a grid along x, y and z, on all devices. */
export const mostBlocks = [2 ** 31 - 1, 65535, 65535] as const

/** Maximum total size of a kernel's parameters. */
const mostArgumentBytes = 4096
/** CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: without it static and dynamic shared memory are 48 KiB together. */
export const attributeMaxDynamicShared = 8

export class Modules {
  readonly #driver: Driver
  readonly #folder: string
  readonly #device: Device
  readonly #loaded = new Map<string, number>()
  /** Loads each kernel that has not been loaded yet; undefined after `loadAll`. */
  #loads: Array<() => void> | undefined = []
  /** The addresses of each kernel's arguments. The driver reads them, so they are kept alive. */
  readonly #lists: BigUint64Array[] = []
  readonly #arguments: Packed
  readonly #address: number

  /** @param folder Contains `<module>.fatbin` files; default: MOE_CUDA_KERNELS, or the package's own. */
  constructor(driver: Driver, device: Device, folder = process.env['MOE_CUDA_KERNELS'] || ownFolder()) {
    this.#driver = driver
    this.#device = device
    this.#folder = folder
    const buffer = new ArrayBuffer(mostArgumentBytes)
    this.#arguments = { floats: new Float32Array(buffer), ints: new Int32Array(buffer) }
    this.#address = driver.address(buffer)
  }

  /** @throws MoeError E_NO_BACKEND if the kernels are missing, need another driver, or were not built for this device */
  probe(): void {
    const { driverVersion } = this.#device
    const { driver: least } = readManifest(this.#folder)
    const [major, minor] = least.split('.').map(Number)
    if (driverVersion < major * 1000 + minor * 10) {
      const version = `${Math.floor(driverVersion / 1000)}.${(driverVersion % 1000) / 10}`
      const named = driverOf[least] === undefined ? '' : ` (${driverOf[least]})`
      throw new MoeError({
        code: 'E_NO_BACKEND',
        op: 'kernels-cuda',
        problem: `the driver supports CUDA ${version}, but the kernels need a driver for CUDA ${least} or later${named}`,
        fix: 'update the NVIDIA driver, or use @moe/kernels-cpu',
      })
    }
    try {
      this.#module('fill')
    } catch (cause) {
      if (!isMoeError(cause, 'E_BACKEND')) throw cause
      const [problem, fix] = cause.message.replace(/^fill: /, '').split('; ')
      throw new MoeError({ code: 'E_NO_BACKEND', op: 'kernels-cuda', problem, fix, cause })
    }
  }

  /**
   * Returns the kernel `name` of `module` as a function; it is loaded at its first launch.
   * @param signature Its parameters: `p` pointer, `i` int, `l` int64_t, `f` float, `i[24]` an array by value, `t` a tensor map.
   * @param launch Receives the launches.
   */
  kernel(module: string, name: string, signature: string, launch: (launch: Launch) => void): CudaKernel {
    const parameters = parseSignature(signature)
    const packed = this.#arguments
    const addresses = BigUint64Array.from(parameters, ({ offset }) => BigInt(this.#address + offset))
    this.#lists.push(addresses)
    const list = this.#driver.address(addresses.buffer)
    let entry = 0
    const load = () => {
      if (entry === 0) entry = this.#find(module, name)
    }
    if (this.#loads === undefined) load()
    else this.#loads.push(load)
    let shared = 0
    return (shape, ...args) => {
      const { grid, block, shared: sharedBytes = 0 } = shape
      const [x, y, z] = typeof grid === 'number' ? [grid, 1, 1] : [grid[0], grid[1] ?? 1, grid[2] ?? 1]
      if (x === 0 || y === 0 || z === 0) return
      if (x > mostBlocks[0] || y > mostBlocks[1] || z > mostBlocks[2]) throw tooManyBlocks(name, [x, y, z])
      load()
      if (sharedBytes > shared) {
        const context = `asking for ${sharedBytes} bytes of shared memory`
        this.#driver.check(
          this.#driver.call.cuFuncSetAttribute(entry, attributeMaxDynamicShared, sharedBytes),
          name,
          context,
        )
        shared = sharedBytes
      }
      if (args.length !== parameters.length)
        throw new Error(`${name} expected ${parameters.length} arguments, got ${args.length}`)
      pack(name, packed, parameters, args)
      launch({
        kernel: name,
        function: entry,
        grid: [x, y, z],
        block,
        shared: sharedBytes,
        arguments: list,
      })
    }
  }

  /**
   * Loads all kernels, and later ones when they are created. Loading a kernel may wait until the device has finished all work of the context, which never
   * happens if a message on another stream waits for a rank that needs the results of this kernel (CUDA programming guide, "Lazy Loading").
   */
  loadAll(): void {
    const loads = this.#loads ?? []
    this.#loads = undefined
    for (const load of loads) load()
  }

  /** Whether this module exists: those for one architecture (`<op>-sm90a`) may not have been built. */
  has(module: string): boolean {
    return existsSync(join(this.#folder, `${module}.fatbin`))
  }

  #module(name: string): number {
    let loaded = this.#loaded.get(name)
    if (loaded === undefined) {
      loaded = this.#load(name)
      this.#loaded.set(name, loaded)
    }
    return loaded
  }

  #find(module: string, name: string): number {
    const found = this.#module(module)
    return this.#driver.out(
      word => this.#driver.call.cuModuleGetFunction(word, found, name),
      name,
      `in module ${module}`,
    )
  }

  #load(module: string): number {
    const { call } = this.#driver
    const file = join(this.#folder, `${module}.fatbin`)
    let image: Uint8Array
    try {
      image = readFileSync(file)
    } catch (cause) {
      throw unreadable(file, cause)
    }
    const word = new BigUint64Array(1)
    const code = call.cuModuleLoadData(word, image)
    if (code === status.noBinaryForGpu) {
      const { name, capability } = this.#device
      const architecture = `compute capability ${(capability / 10).toFixed(1)}`
      this.#driver.check(code, module, `loading ${file}: nothing in it runs on ${name} (${architecture})`)
    }
    this.#driver.check(code, module, `loading ${file}`)
    return Number(word[0])
  }

  /** Unloads all modules. Never throws. */
  dispose(): void {
    for (const module of this.#loaded.values()) this.#driver.call.cuModuleUnload(module)
    this.#loaded.clear()
  }
}

function tooManyBlocks(kernel: string, grid: readonly number[]): MoeError {
  return new MoeError({
    code: 'E_UNSUPPORTED',
    op: kernel,
    problem: `the tensors need a grid of ${grid.join(' x ')} blocks, but CUDA allows at most ${mostBlocks.join(' x ')}`,
    fix: 'split them along their largest axis, and compute the parts one after another',
  })
}

/** Driver versions by the CUDA version that they support. */
const driverOf: Readonly<Record<string, string>> = { '12.0': '525', '12.4': '550', '13.0': '580' }

/** The minimum CUDA version of the driver, from the manifest that build-fatbins.mjs writes. */
function readManifest(folder: string): { readonly driver: string } {
  const file = join(folder, 'manifest.json')
  try {
    const { cuda, driver = `${Number.parseInt(String(cuda), 10)}.0` } = JSON.parse(readFileSync(file, 'utf8')) as {
      cuda?: string
      driver?: string
    }
    if (/^[1-9]\d*\.\d+$/.test(driver)) return { driver }
    throw new Error('it contains no CUDA version')
  } catch (cause) {
    throw unreadable(file, cause)
  }
}

function unreadable(file: string, cause: unknown): MoeError {
  return new MoeError({
    code: 'E_NO_BACKEND',
    op: 'kernels-cuda',
    problem: `found no kernels: cannot read ${file} (${cause instanceof Error ? cause.message : cause})`,
    fix: 'reinstall the package; in a checkout, run `node scripts/build-fatbins.mjs` in packages/kernels-cuda (needs nvcc)',
    cause,
  })
}

/** The package's own fatbins: `build/fatbins` next to `src` or `dist`. */
function ownFolder(): string {
  return join(dirname(dirname(fileURLToPath(import.meta.url))), 'build', 'fatbins')
}

/** As in signatures; `w` are the words of a tensor map. */
type Code = 'p' | 'i' | 'l' | 'f' | 'w'

interface Parameter {
  readonly code: Code
  readonly offset: number
  /** Number of elements of an array; 0 for a single value. */
  readonly count: number
}

/** The offset of each parameter: one after another, each aligned to its element's size. */
function parseSignature(signature: string): Parameter[] {
  let offset = 0
  const list = signature
    .split(' ')
    .filter(part => part !== '')
    .map(part => {
      if (part === 't') {
        const at = Math.ceil(offset / mapAlignment) * mapAlignment
        offset = at + mapWords * 4
        return { code: 'w' as const, offset: at, count: mapWords }
      }
      const parsed = part.match(/^([pilf])(?:\[(\d+)\])?$/)
      if (parsed === null) throw new Error(`invalid parameter '${part}' in the signature '${signature}'`)
      const code = parsed[1] as Code
      const size = code === 'p' || code === 'l' ? 8 : 4
      const count = Number(parsed[2] ?? 0)
      const at = Math.ceil(offset / size) * size
      offset = at + size * Math.max(count, 1)
      return { code, offset: at, count }
    })
  if (offset > mostArgumentBytes) throw new Error(`the parameters '${signature}' take ${offset} bytes`)
  return list
}

/** Two views of the arguments' memory. */
interface Packed {
  readonly floats: Float32Array
  readonly ints: Int32Array
}

function pack(kernel: string, to: Packed, parameters: readonly Parameter[], args: ReadonlyArray<Argument>): void {
  for (let i = 0; i < parameters.length; i++) {
    const { code, offset, count } = parameters[i]
    const value = args[i]
    if (count === 0) {
      put(kernel, to, code, offset >> 2, value as number)
      continue
    }
    const values = value as readonly number[] | TensorMap
    const { length } = values
    if (length > count) throw new Error(`got ${length} elements for an array parameter of ${count}`)
    const words = code === 'p' || code === 'l' ? 2 : 1
    const at = offset >> 2
    for (let k = 0; k < length; k++) put(kernel, to, code, at + k * words, values[k])
    to.ints.fill(0, at + length * words, at + count * words)
  }
}

/** Writes a value at an offset in 32-bit words. Writing an int64 as two halves is faster than a BigInt; negative numbers become two's complement. */
function put(kernel: string, { floats, ints }: Packed, code: Code, at: number, value: number): void {
  if (code === 'f') {
    floats[at] = value
    return
  }
  ints[at] = value
  if (code === 'p' || code === 'l') ints[at + 1] = Math.floor(value / 4294967296)
  else if (code === 'i' && ints[at] !== value) throw tooLarge(kernel, value)
}

function tooLarge(kernel: string, value: number): MoeError {
  return new MoeError({
    code: 'E_UNSUPPORTED',
    op: kernel,
    problem: `a size or an attribute is ${value}, but kernels take integers of 32 bits`,
    fix: 'split tensors along axes of 2^31 elements or more, and compute the parts one after another',
  })
}
