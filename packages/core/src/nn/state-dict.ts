/** @file Models to named host arrays and back, strictly. */
import type { Shape } from '../backend.ts'
import { fromHost } from '../create.ts'
import { type DType, decodeHost, encodeHost, type HostArray, hostArray } from '../dtype.ts'
import { describe, MoeError } from '../errors.ts'
import { attrError } from '../infer.ts'
import { checkOptions } from '../options.ts'
import { sameShape, showShape, sizeOf } from '../shape.ts'
import { type Module, type NamedParameter, namedParameters } from './module.ts'
import type { Parameter } from './parameter.ts'
import { QuantizedParameter, weightShape } from './quantized.ts'

/** One stored tensor. `data` is raw bits for the 16- and 8-bit floats. */
export interface StateEntry {
  /** Checkpoint key. */
  readonly name: string
  /** Of the elements that `data` gives. */
  readonly dtype: DType
  /** Of the whole tensor. */
  readonly shape: Shape
  /** Reads the elements when they are wanted, so that a whole model is never on the host at once. */
  data(): Promise<HostArray>
}

/** Where `loadStateDict` reads from: a checkpoint or a plain object. */
export interface StateSource {
  /** All keys that it has. */
  keys(): Iterable<string>
  /** Dtype and shape of one, without its elements. */
  info(name: string): { readonly dtype: DType; readonly shape: Shape }
  /** The elements of one, row-major; raw bits for the 16- and 8-bit floats. */
  read(name: string): Promise<HostArray>
}

/** What a module stores, under its checkpoint keys; stacked parameters are split. */
export function stateDict(module: Module): StateEntry[] {
  return namedParameters(module).flatMap(entriesOf)
}

/** Elements as checkpoints hold them: weights in 8 or 4 bits are written as the f32 numbers that they stand for. */
function readable(parameter: Parameter): { dtype: DType; read(): Promise<HostArray> } {
  if (!(parameter instanceof QuantizedParameter) || parameter.dtype === 'bf16') {
    return { dtype: parameter.dtype, read: () => parameter.data() }
  }
  return {
    dtype: 'f32',
    async read() {
      using dense = parameter.dequantize()
      return dense.data()
    },
  }
}

function entriesOf({ name, parameter, slices }: NamedParameter): StateEntry[] {
  const { dtype, read } = readable(parameter)
  const shape = weightShape(parameter)
  if (slices === undefined) return [{ name, dtype, shape, data: read }]
  const sliceShape = shape.slice(1)
  const size = sizeOf(sliceShape)
  // All slices come from one download, which is dropped after the last was handed out.
  let whole: Promise<HostArray> | null = null
  let left = slices.length
  return slices.map((slice, i) => ({
    name: slice,
    dtype,
    shape: sliceShape,
    async data() {
      whole ??= read()
      const all = await whole
      if (--left === 0) {
        whole = null
        left = slices.length
      }
      return all.slice(i * size, (i + 1) * size)
    },
  }))
}

/** Which keys may differ between module and source. */
export interface LoadOptions {
  /** Keys of the source that the module may lack (`ignore`), for layers that are not wanted. Default: none. */
  readonly ignore?: (key: string) => boolean
  /** Keys of the module that may stay as they are. Default: none. */
  readonly optional?: (key: string) => boolean
}

/**
 * Fills a module from stored tensors, converting float dtypes and, where the module holds weights in fewer bits, quantizing. Nothing is changed unless every key fits.
 * @throws MoeError E_STATE_DICT that lists every missing, unexpected and mis-shaped key at once.
 */
export async function loadStateDict(module: Module, source: StateSource, options: LoadOptions = {}): Promise<void> {
  checkOptions('loadStateDict', options, { ignore: true, optional: true })
  const { ignore = () => false, optional = () => false } = options
  if (Array.isArray(source) || typeof source?.info !== 'function') throw noSource(describe(source))
  const available = new Set(source.keys())
  const parameters = namedParameters(module)
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

  for (const { name, parameter, slices } of parameters) {
    const keys = slices ?? [name]
    if (!keys.every(key => available.has(key))) continue
    if (parameter instanceof QuantizedParameter) {
      await fillStored(parameter, keys, slices !== undefined, source)
      continue
    }
    const { dtype, shape, backend } = parameter
    const read = async (key: string) => convert(await source.read(key), source.info(key).dtype, dtype)
    let values: HostArray
    if (slices === undefined) values = await read(name)
    else {
      values = hostArray(dtype, parameter.size)
      // One after another, so that besides the whole only one slice is there.
      for (const [i, key] of slices.entries()) values.set(await read(key), (i * values.length) / slices.length)
    }
    parameter.assign(fromHost(values, shape, dtype, backend))
  }
}

/** Stores one slice after another, so that a stacked weight is never there as a whole in f32. */
async function fillStored(
  parameter: QuantizedParameter,
  keys: readonly string[],
  stacked: boolean,
  source: StateSource,
) {
  const read = async (key: string) => convert(await source.read(key), source.info(key).dtype, 'f32') as Float32Array
  if (!stacked) return parameter.assignValues(await read(keys[0]))
  const slice = [1, ...parameter.weight.shape.slice(1)]
  return parameter.assignParts(keys.length, async i => fromHost(await read(keys[i]), slice, 'f32', parameter.backend))
}

function noSource(what: string): MoeError {
  const fix = 'pass entriesSource(stateDict(other)), or stateSource(await openCheckpoint(path)) of @moe/checkpoint'
  return attrError('loadStateDict', `the source is ${what}`, fix)
}

function convert(data: HostArray, from: DType, to: DType): HostArray {
  if (!ArrayBuffer.isView(data)) throw noSource('one that reads more than arrays, such as an open checkpoint')
  return from === to ? data : encodeHost(to, decodeHost(from, data))
}

/** Keys of a kind that a message shows: of a large model there may be 50,000. */
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
    problem: `the stored tensors do not fit the model:${list('missing', missing)}${list('unexpected', unexpected)}${list('of another shape', misshaped)}\n`,
    fix: 'build the model with the configuration that the checkpoint was saved with',
    details: { missing, unexpected, misshaped },
  })
}

/** A state source over entries in memory, as `stateDict` gives them. */
export function entriesSource(entries: Iterable<StateEntry>): StateSource {
  const byName = new Map([...entries].map(entry => [entry.name, entry]))
  const get = (name: string) => byName.get(name) as StateEntry
  return { keys: () => byName.keys(), info: get, read: name => get(name).data() }
}
