/** @file Converts modules to named host arrays, and loads them with strict checks. */
import { attrError, shapeError } from '../checks.ts'
import { fromHost } from '../create.ts'
import { type DType, decodeHost, encodeHost, type HostArray, hostArray } from '../dtype.ts'
import { describe, MoeError } from '../errors.ts'
import { dequantizeWeight, type QuantizedWeight, quantizeWeight, storedColumns } from '../fused/quantized-matmul.ts'
import { checkOptions } from '../options.ts'
import type { Parameter } from '../parameter.ts'
import { scope } from '../scope.ts'
import { type Shape, sameShape, showShape, sizeOf } from '../shape.ts'
import { noGrad } from '../tape.ts'
import type { Tensor } from '../tensor.ts'
import { type Module, type NamedParameter, parametersOf } from './module.ts'
import type { LocalParameter } from './parameter-shard.ts'
import { QuantizedParameter, quantizedRows, weightShape } from './quantized.ts'

/** One stored tensor. */
export interface StateEntry {
  /** Checkpoint key. */
  readonly name: string
  /** Dtype of the elements that `data` returns. */
  readonly dtype: DType
  /** Shape of the whole tensor. */
  readonly shape: Shape
  /**
   * Reads the elements of this tensor on demand, so that neither the model nor a stack of experts is in host memory at
   * once. Returns raw bits for the 16- and 8-bit floats.
   */
  data(): Promise<HostArray>
}

/** A source of tensors for `loadStateDict`: a checkpoint or `entriesSource`. */
export interface StateSource {
  /** Returns all keys. */
  keys(): Iterable<string>
  /** Returns dtype and shape of a tensor without reading its elements. */
  info(name: string): { readonly dtype: DType; readonly shape: Shape }
  /** Reads the elements of a tensor, row-major, as raw bits for the 16- and 8-bit floats. */
  read(name: string): Promise<HostArray>
  /**
   * Reads a matrix as codes and scales, so that a quantized weight is loaded without rounding. Returns undefined if it is
   * not stored in that format with those blocks; `read` is called then. Default: no matrix is.
   */
  readonly readQuantized?: ((name: string, like: QuantizedLayout) => Promise<QuantizedElements | undefined>) | undefined
}

/** How a quantized weight is stored. */
export type QuantizedLayout = Pick<QuantizedWeight, 'format' | 'block'>

/** The elements of a quantized matrix: those of `q` and `scale` of a `QuantizedWeight`. */
export interface QuantizedElements {
  /** Codes. */
  readonly q: Uint8Array<ArrayBuffer>
  /** Scales. */
  readonly scale: Float32Array
}

/**
 * Returns the parameters and buffers of a module under their checkpoint keys. Stacked parameters are split into their
 * slices.
 */
export function stateDict(module: Module): StateEntry[] {
  return parametersOf('stateDict', module).flatMap(entriesOf)
}

function entriesOf({ name, parameter, slices }: NamedParameter): StateEntry[] {
  const dtype = parameter instanceof QuantizedParameter && parameter.dtype !== 'bf16' ? 'f32' : parameter.dtype
  const shape = weightShape(parameter)
  if (slices === undefined) return [{ name, dtype, shape, data: () => readRows(parameter, 0, shape[0] ?? 1) }]
  return slices.map((slice, i) => {
    return { name: slice, dtype, shape: shape.slice(1), data: () => readRows(parameter, i, i + 1) }
  })
}

/** Reads rows as checkpoints store them. */
async function readRows(parameter: Parameter, from: number, to: number): Promise<HostArray> {
  const { backend } = parameter
  const isQuantized = parameter instanceof QuantizedParameter
  let read = () => {
    if (isQuantized) return storedValues(quantizedRows(parameter.weight, from, to))
    return parameter.rank === 0 ? parameter : parameter.narrow(0, from, to)
  }
  if (parameter.handle === null && parameter.elsewhere !== null) {
    const values = await parameter.elsewhere(from, to)
    if (!isQuantized) return values
    const { format, block, shape } = parameter.weight
    const rows = [to - from, ...shape.slice(1)]
    read = () => storedValues(quantizeWeight(fromHost(values, rows, 'f32', backend), format, block))
  }
  // Detached, because all rows are the parameter itself.
  using rows = scope(() => noGrad(() => read().detach()))
  return await rows.data()
}

/** Weights in 8 or 4 bits become the f32 values that they represent. */
const storedValues = (weight: QuantizedWeight): Tensor =>
  weight.format === 'bf16' ? weight.q : dequantizeWeight(weight)

/** Which keys may differ between module and source. */
export interface LoadOptions {
  /**
   * Returns whether a key of the source may be missing in the module, for example a layer that is not wanted. Default:
   * none.
   */
  readonly ignore?: ((key: string) => boolean) | undefined
  /**
   * Returns whether a key of the module may be missing in the source; the parameter then keeps its values. Default:
   * none.
   */
  readonly optional?: ((key: string) => boolean) | undefined
  /**
   * The parameters to load, if a rank has only a part of the module: parameters of the module, or ranges of their rows.
   * All keys are checked nevertheless. Default: all parameters of the module.
   */
  readonly parameters?: readonly LocalParameter[] | undefined
}

/**
 * Loads stored tensors into a module. Converts float dtypes, and quantizes if the module's weights are quantized.
 * Checks all keys first, and changes nothing unless every key matches. Of the stored weights, at most one is in host
 * memory at a time; the old elements of a weight are freed before the new ones are uploaded.
 * @throws MoeError E_STATE_DICT that lists all missing, unexpected and mis-shaped keys
 */
export async function loadStateDict(module: Module, source: StateSource, options: LoadOptions = {}): Promise<void> {
  checkOptions('loadStateDict', options, { ignore: true, optional: true, parameters: true })
  const { ignore = () => false, optional = () => false } = options
  if (Array.isArray(source) || typeof source?.info !== 'function') throw noSource(describe(source))
  const available = new Set(source.keys())
  const parameters = parametersOf('loadStateDict', module)
  const missing: string[] = []
  const misshaped: string[] = []
  const known = new Set<string>()
  for (const { name, parameter, slices } of parameters) {
    const whole = weightShape(parameter)
    const shape = slices === undefined ? whole : whole.slice(1)
    for (const key of slices ?? [name]) {
      known.add(key)
      if (!available.has(key)) {
        if (!optional(key)) missing.push(key)
        continue
      }
      const stored = source.info(key).shape
      if (!sameShape(stored, shape)) misshaped.push(`${key}: stored ${showShape(stored)}, model ${showShape(shape)}`)
    }
  }
  const unexpected = [...available].filter(key => !known.has(key) && !ignore(key))
  if (missing.length + misshaped.length + unexpected.length > 0) throw mismatch(missing, unexpected, misshaped)

  const stackOf = reusedArrays()
  for (const { name, parameter, slices, firstRow = 0 } of options.parameters ?? (parameters as LocalParameter[])) {
    const keys = slices ?? [name]
    if (!keys.every(key => available.has(key))) continue
    if (parameter instanceof QuantizedParameter) {
      await loadQuantized(parameter, keys, slices !== undefined, source)
      continue
    }
    const { dtype, shape, backend } = parameter
    const read = (key: string) => readAs(source, key, dtype)
    let values: HostArray
    if (slices === undefined) {
      const from = firstRow * sizeOf(shape.slice(1))
      values = (await read(name)).subarray(from, from + parameter.size)
    } else {
      values = stackOf(dtype, parameter.size)
      // Read one after another, so that only one slice at a time is in memory besides the whole.
      for (const [i, key] of slices.entries()) values.set(await read(key), (i * values.length) / slices.length)
    }
    // The weight is never in memory twice.
    parameter.freeElements()
    parameter.assign(fromHost(values, shape, dtype, backend))
  }
}

/** Returns a function that creates host arrays, or returns its previous one if that fits. */
function reusedArrays(): (dtype: DType, length: number) => HostArray {
  let last: { readonly dtype: DType; readonly array: HostArray } | undefined
  return (dtype, length) => {
    if (last?.dtype !== dtype || last.array.length !== length) last = { dtype, array: hostArray(dtype, length) }
    return last.array
  }
}

/** Quantizes one slice after another, so that a stacked weight is never in memory as f32 as a whole. */
async function loadQuantized(
  parameter: QuantizedParameter,
  keys: readonly string[],
  stacked: boolean,
  source: StateSource,
) {
  const { weight } = parameter
  const slice = stacked ? [1, ...weight.shape.slice(1)] : weight.shape
  const read = async (key: string) => (await readAs(source, key, 'f32')) as Float32Array
  const readCodes = async (key: string) => {
    const elements = await source.readQuantized?.(key, weight)
    return elements && onDevice(elements, slice, parameter)
  }
  if (!stacked) {
    const whole = await readCodes(keys[0])
    return whole === undefined ? parameter.assignValues(await read(keys[0])) : parameter.assignQuantized(whole)
  }
  return parameter.assignParts(keys.length, async i => {
    return (await readCodes(keys[i])) ?? fromHost(await read(keys[i]), slice, 'f32', parameter.backend)
  })
}

/** Uploads codes and scales of the shape in the format of a parameter. */
function onDevice({ q, scale }: QuantizedElements, shape: Shape, parameter: QuantizedParameter): QuantizedWeight {
  const { dtype, backend, weight } = parameter
  const { format, block } = weight
  const lead = shape.slice(0, -2)
  const [rows, columns] = shape.slice(-2)
  const blocks = [...lead, Math.ceil(rows / block[0]), Math.ceil(columns / block[1])]
  return {
    format,
    block,
    shape,
    q: fromHost(q, [...lead, rows, storedColumns(format, columns)], dtype, backend),
    scale: fromHost(scale, blocks, 'f32', backend),
  }
}

function noSource(what: string): MoeError {
  const fix = 'pass entriesSource(stateDict(other)), or stateSource(await openCheckpoint(path)) of @moe/checkpoint'
  return attrError('loadStateDict', `the source is ${what}`, fix)
}

/** Reads all elements of a tensor in another dtype. @throws MoeError E_SHAPE for another number of elements */
async function readAs(source: StateSource, key: string, to: DType): Promise<HostArray> {
  const data = await source.read(key)
  if (!ArrayBuffer.isView(data)) throw noSource('one whose read() does not return an array, such as an open checkpoint')
  const { dtype: from, shape } = source.info(key)
  if (data.length !== sizeOf(shape)) {
    const problem = `${key} has shape ${showShape(shape)}, but read() returned ${data.length} elements`
    throw shapeError('loadStateDict', problem, 'return all elements, as info() describes them')
  }
  return from === to ? data : encodeHost(to, decodeHost(from, data))
}

/** Maximum number of keys of each kind in a message: a large model may have 50,000. */
const shownKeys = 20

function mismatch(missing: string[], unexpected: string[], misshaped: string[]): MoeError {
  const list = (title: string, keys: string[]) => {
    if (keys.length === 0) return ''
    const lines = keys.slice(0, shownKeys)
    if (keys.length > shownKeys) lines.push(`and ${keys.length - shownKeys} more: all are in the error's details`)
    return `\n  ${keys.length} ${title}:\n${lines.map(line => `    ${line}`).join('\n')}`
  }
  return new MoeError({
    code: 'E_STATE_DICT',
    op: 'loadStateDict',
    problem: `the stored tensors do not match the model:${list('missing', missing)}${list('unexpected', unexpected)}${list('with another shape', misshaped)}\n`,
    fix: 'build the model with the configuration that the checkpoint was saved with',
    details: { missing, unexpected, misshaped },
  })
}

/** Returns a state source for entries in memory, such as those from `stateDict`. */
export function entriesSource(entries: Iterable<StateEntry>): StateSource {
  if (typeof entries?.[Symbol.iterator] !== 'function')
    throw attrError('entriesSource', `the entries are ${describe(entries)}`, 'pass those of stateDict(module)')
  const byName = new Map([...entries].map(entry => [entry.name, entry]))
  const get = (name: string) => byName.get(name) as StateEntry
  return { keys: () => byName.keys(), info: get, read: name => get(name).data() }
}
