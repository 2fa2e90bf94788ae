/** @file Reads tensors of any dtype as f32, and fp8 weights dequantized or as they are. */

import { checkOptions, type QuantizedElements, type QuantizedLayout } from '@moe/core'
import { checkpointError, shown } from './checkpoint-error.ts'
import { DEFAULT_BLOCK, dequantizeFp8Blocks, scalesInBlocks } from './fp8-blocks.ts'
import type { TensorSource } from './read-safetensors.ts'
import { toF32 } from './to-f32.ts'

/** Options of {@link readF32} and {@link stateSource}. */
export interface ReadF32Options {
  /**
   * Rows and columns of a block: `quantization_config.weight_block_size` of the config.json. Null: one scale for the
   * whole weight. Default 128 x 128.
   */
  readonly block?: readonly [number, number] | null | undefined
}

/** The name of the block scales of a weight. */
const scaleKey = (key: string): string => `${key}_scale_inv`

/** Whether a weight is `f8e4m3` with block scales in the same source. Scales of other dtypes are never applied. */
export const hasScales = (source: TensorSource, key: string): boolean =>
  source.has(scaleKey(key)) && source.has(key) && source.info(key).dtype === 'f8e4m3'

/** Whether a tensor contains the block scales of an `f8e4m3` weight in the same source. */
export const isScaleKey = (source: TensorSource, key: string): boolean =>
  key.endsWith('_scale_inv') && hasScales(source, key.slice(0, -'_scale_inv'.length))

/** A block that covers a weight. */
const wholeBlock = ([rows, columns]: readonly number[]): readonly [number, number] => [rows || 1, columns || 1]

/** One scale, which may be stored as a scalar, as a matrix. */
const single = (scale: { readonly shape: readonly number[]; readonly data: Float32Array }) =>
  scale.data.length === 1 ? { ...scale, shape: [1, 1] } : scale

/**
 * Reads a tensor as f32. bf16, f16 and 8-bit floats are converted exactly. An `f8e4m3` weight is multiplied by its block scales
 * `<key>_scale_inv`, if the checkpoint has them (in any shard).
 *
 * @throws {MoeError} `E_CHECKPOINT` as `read`, for scales of a wrong shape, and for dtypes that are not plain numbers
 */
export async function readF32(
  source: TensorSource,
  key: string,
  options: ReadF32Options = {},
): Promise<{ shape: readonly number[]; data: Float32Array }> {
  checkOptions('readF32', options, { block: true })
  const scales = await scalesOf(source, key, options)
  const { dtype, shape, data } = await source.read(key)
  if (scales !== undefined) {
    const { scale, block, where } = scales
    return { shape, data: dequantizeFp8Blocks({ shape, data: data as Uint8Array }, scale, block, where) }
  }
  const values = toF32(dtype, data)
  if (!values) {
    throw checkpointError(
      source.info(key).file,
      `tensor ${shown(key)} has dtype ${dtype}`,
      'use read() and decode it yourself',
      { key, dtype },
    )
  }
  return { shape, data: values }
}

/**
 * Reads an `f8e4m3` weight as codes and scales in blocks of the size of `like`, for `StateSource.readQuantized`. Their
 * values are exactly those of `readF32`. Returns undefined for other tensors and formats, and if the blocks of the file
 * are no multiples of those of `like`. A weight without scales gets scales of 1.
 *
 * @throws {MoeError} `E_CHECKPOINT` as `readF32`
 */
export async function readFp8(
  source: TensorSource,
  key: string,
  { format, block: wanted }: QuantizedLayout,
  options: ReadF32Options = {},
): Promise<QuantizedElements | undefined> {
  checkOptions('readFp8', options, { block: true })
  const { dtype, shape } = source.info(key)
  if (format !== 'fp8' || dtype !== 'f8e4m3' || shape.length !== 2) return undefined
  const one = { scale: { shape: [1, 1], data: Float32Array.of(1) }, block: wholeBlock(shape), where: key }
  const { scale, block, where } = (await scalesOf(source, key, options)) ?? one
  const inBlocks = scalesInBlocks(shape, scale, block, wanted, where)
  return inBlocks && { q: (await source.read(key)).data as Uint8Array<ArrayBuffer>, scale: inBlocks }
}

/** The scales of an fp8 weight and the size of their blocks. Undefined for other tensors. */
async function scalesOf(source: TensorSource, key: string, { block = DEFAULT_BLOCK }: ReadF32Options) {
  const { shape, file } = source.info(key)
  if (!hasScales(source, key)) return undefined
  const scale = await readF32(source, scaleKey(key))
  const where = `${file}: tensor ${shown(key)}`
  return block === null ? { scale: single(scale), block: wholeBlock(shape), where } : { scale, block, where }
}
