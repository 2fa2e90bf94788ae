/** @file Converts a checkpoint tensor by tensor: renames tensors, changes their dtype, and dequantizes fp8 blocks. */

import { checkOptions, type OptionNames } from '@moe/core'
import { hasScales, isScaleKey, type ReadF32Options, readF32 } from './read-f32.ts'
import type { TensorSource } from './read-safetensors.ts'
import { type SavedCheckpoint, type SaveOptions, saveCheckpoint } from './save-checkpoint.ts'
import type { StoredDType } from './stored-dtype.ts'
import { fromF32 } from './to-f32.ts'
import type { TensorEntry } from './write-safetensors.ts'

/** Options of {@link convertCheckpoint}. Without any, the checkpoint is copied unchanged. */
export interface ConvertOptions extends SaveOptions, ReadF32Options {
  /** Returns the name of a tensor in the new checkpoint, or undefined to omit it. Default: the same name. */
  readonly rename?: ((key: string) => string | undefined) | undefined
  /**
   * Target dtype of floating-point tensors. Weights with block scales are dequantized, and their scales omitted. Default: everything is
   * copied as stored, including scales.
   */
  readonly dtype?: 'f32' | 'bf16' | 'f16' | undefined
  /**
   * Selects floating-point tensors that become f32 regardless of `dtype`. Default: `e_score_correction_bias`, because rounding it to
   * bf16 changes the routing (NVIDIA/Megatron-LM#1482).
   */
  readonly keepF32?: ((key: string) => boolean) | undefined
}

const names: OptionNames<ConvertOptions> = {
  rename: true,
  dtype: true,
  keepF32: true,
  block: true,
  metadata: true,
  maxShardBytes: true,
}

/** The result of {@link convertCheckpoint}: what happened to each tensor. */
export interface Conversion extends SavedCheckpoint {
  /** Names of all tensors in the new checkpoint. */
  readonly written: readonly string[]
  /** Source names that were omitted because `rename` returned undefined. */
  readonly unmapped: readonly string[]
  /** Source names that were dequantized with their block scales. */
  readonly dequantized: readonly string[]
  /** Source names with finite values that became infinite, because they exceed the range of f16. */
  readonly overflowed: readonly string[]
}

const floats: ReadonlySet<StoredDType> = new Set([
  'f64',
  'f32',
  'bf16',
  'f16',
  'f8e4m3',
  'f8e5m2',
  'f8e4m3fnuz',
  'f8e5m2fnuz',
])

/**
 * Copies an open checkpoint into a folder, optionally with other names and dtypes. Only one tensor is in memory at a time.
 *
 * @returns what happened to each tensor
 * @throws {MoeError} `E_CHECKPOINT` as {@link saveCheckpoint}, and if two tensors get the same name
 *
 * @example
 * ```ts no-run
 * await using source = await openCheckpoint('DeepSeek-V3')
 * const report = await convertCheckpoint(source, 'DeepSeek-V3-bf16', { dtype: 'bf16' })
 * console.log(report.dequantized.length, 'weights dequantized,', report.unmapped, 'omitted')
 * ```
 */
export async function convertCheckpoint(
  source: TensorSource,
  folder: string | URL,
  options: ConvertOptions = {},
): Promise<Conversion> {
  checkOptions('convertCheckpoint', options, names)
  const { rename = key => key, dtype, keepF32 = key => key.endsWith('.e_score_correction_bias') } = options
  const { block, metadata, maxShardBytes } = options
  const entries: TensorEntry[] = []
  const unmapped: string[] = []
  const dequantized: string[] = []
  const overflowed: string[] = []
  for (const key of source.keys()) {
    if (dtype && isScaleKey(source, key)) continue
    const name = rename(key)
    if (name === undefined) {
      unmapped.push(key)
      continue
    }
    const info = source.info(key)
    if (!dtype || !floats.has(info.dtype)) {
      entries.push({ name, dtype: info.dtype, shape: info.shape, data: async () => (await source.read(key)).data })
      continue
    }
    if (hasScales(source, key)) dequantized.push(key)
    const target = keepF32(key) ? 'f32' : dtype
    const convert = async () => {
      const { data } = await readF32(source, key, { block })
      const converted = fromF32(target, data)
      if (target === 'f16' && overflows(data)) overflowed.push(key)
      return converted
    }
    entries.push({ name, dtype: target, shape: info.shape, data: convert })
  }
  const saved = await saveCheckpoint(folder, entries, { metadata, maxShardBytes })
  return { ...saved, written: entries.map(({ name }) => name), unmapped, dequantized, overflowed }
}

/** Magnitudes of 65520 and above round to infinity in f16. */
function overflows(data: Float32Array): boolean {
  return data.some(value => Math.abs(value) >= 65520 && Number.isFinite(value))
}
