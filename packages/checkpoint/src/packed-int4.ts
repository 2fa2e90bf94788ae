/** @file Reads 4-bit weights as compressed-tensors packs them (format `pack-quantized`, symmetric), such as those of Kimi K2 Thinking. */

import { checkpointError, shown } from './checkpoint-error.ts'
import { readF32 } from './read-f32.ts'
import type { TensorSource } from './read-safetensors.ts'

/** A matrix of 4-bit codes. Code q has the value (q - 8) times the scale of its group. */
export interface Int4Weight {
  /** Rows and columns. */
  readonly shape: readonly [rows: number, columns: number]
  /** Codes `[rows, ceil(columns / 2)]`, two per byte, the first in the low half. */
  readonly q: Uint8Array<ArrayBuffer>
  /** Scales `[rows, columns / group]`. */
  readonly scale: Float32Array
}

/** A checkpoint whose packed weights are read like others. */
export interface Int4Source extends TensorSource {
  /** Reads codes and scales of a packed weight without rounding. Returns undefined for other tensors. */
  readInt4(key: string): Promise<Int4Weight | undefined>
}

const suffix = '_packed'

/**
 * Lists the packed weights of a checkpoint under their names: `weight` for the tensors `weight_packed` (i32, 8 codes per element), `weight_scale` and
 * `weight_shape`. `read` returns their values as f32.
 *
 * @param group number of columns that share a scale, or null for one scale per row
 * @throws {MoeError} `E_CHECKPOINT` for packed weights whose scales are missing, or whose shapes do not match
 */
export function unpackInt4(source: TensorSource, group: number | null): Int4Source {
  const shapes = new Map<string, readonly [number, number]>()
  const parts = new Set<string>()
  for (const packed of source.keys()) {
    if (!packed.endsWith(suffix)) continue
    const key = packed.slice(0, -suffix.length)
    shapes.set(key, shapeOf(source, key, group))
    for (const part of [packed, `${key}_scale`, `${key}_shape`]) parts.add(part)
  }
  const keys = [...shapes.keys(), ...source.keys().filter(key => !parts.has(key))]
  const readInt4 = async (key: string): Promise<Int4Weight | undefined> => {
    const shape = shapes.get(key)
    if (shape === undefined) return undefined
    await checkShape(source, key, shape)
    const [rows, columns] = shape
    const { data } = await source.read(key + suffix)
    const bytes = new Uint8Array(data.buffer as ArrayBuffer, data.byteOffset, data.byteLength)
    const width = Math.ceil(columns / 2)
    const stored = bytes.length / rows
    const q = new Uint8Array(rows * width)
    for (let row = 0; row < rows; row++) q.set(bytes.subarray(row * stored, row * stored + width), row * width)
    return { shape, q, scale: (await readF32(source, `${key}_scale`)).data }
  }
  return {
    path: source.path,
    metadata: source.metadata,
    keys: () => [...keys],
    has: key => shapes.has(key) || (source.has(key) && !parts.has(key)),
    info: key => {
      const shape = shapes.get(key)
      if (shape === undefined) return source.info(key)
      return { dtype: 'f32', shape, bytes: 4 * shape[0] * shape[1], file: source.info(key + suffix).file }
    },
    read: async key => {
      const weight = await readInt4(key)
      return weight === undefined
        ? source.read(key)
        : { dtype: 'f32', shape: weight.shape, data: dequantizeInt4(weight) }
    },
    readInt4,
    close: () => source.close(),
    [Symbol.asyncDispose]: () => source.close(),
  }
}

function dequantizeInt4({ shape: [rows, columns], q, scale }: Int4Weight): Float32Array {
  const out = new Float32Array(rows * columns)
  const width = Math.ceil(columns / 2)
  const perRow = scale.length / rows
  const group = columns / perRow
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const byte = q[row * width + (column >> 1)]
      const code = column % 2 === 0 ? byte & 15 : byte >> 4
      out[row * columns + column] = (code - 8) * scale[row * perRow + Math.floor(column / group)]
    }
  }
  return out
}

/** The shape of a packed weight. It follows from that of its scales, or, with one scale per row, from that of its codes. */
function shapeOf(source: TensorSource, key: string, group: number | null): readonly [number, number] {
  const { dtype, shape: packed, file } = source.info(key + suffix)
  const scaleKey = `${key}_scale`
  if (!source.has(scaleKey)) {
    throw checkpointError(file, `tensor ${shown(key + suffix)} has no scales`, `add the tensor ${shown(scaleKey)}`)
  }
  const { shape: scales } = source.info(scaleKey)
  const [rows, words] = packed
  const columns = group === null ? words * 8 : scales[1] * group
  const fits =
    dtype === 'i32' &&
    packed.length === 2 &&
    scales.length === 2 &&
    scales[0] === rows &&
    (group !== null || scales[1] === 1) &&
    rows > 0 &&
    words > 0 &&
    words === Math.ceil(columns / 8)
  if (fits) return [rows, columns]
  throw checkpointError(
    file,
    `tensor ${shown(key + suffix)} of dtype ${dtype} and shape [${packed.join(', ')}] does not fit scales of shape [${scales.join(', ')}] ` +
      `with ${group === null ? 'one scale per row' : `groups of ${group} columns`}`,
    'check group_size of quantization_config in config.json',
    { packed, scales, group },
  )
}

async function checkShape(source: TensorSource, key: string, shape: readonly [number, number]): Promise<void> {
  const shapeKey = `${key}_shape`
  if (!source.has(shapeKey)) return
  const { data } = await source.read(shapeKey)
  const given = Array.from(data as ArrayLike<number | bigint>, Number)
  if (given.length === 2 && given[0] === shape[0] && given[1] === shape[1]) return
  throw checkpointError(
    source.info(shapeKey).file,
    `tensor ${shown(shapeKey)} is [${given.slice(0, 4).join(', ')}], but the codes and scales have the shape [${shape.join(', ')}]`,
    'check group_size of quantization_config in config.json',
    { given, shape },
  )
}
