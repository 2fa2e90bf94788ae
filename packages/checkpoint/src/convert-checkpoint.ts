/** @file Rewrites a checkpoint tensor by tensor: other names, another float dtype, fp8 blocks undone. */

import { checkOptions, type OptionNames } from '@moe/core'
import { isScaleKey, type ReadF32Options, readF32, scaleKey } from './read-f32.ts'
import type { TensorSource } from './read-safetensors.ts'
import { type SavedCheckpoint, type SaveOptions, saveCheckpoint } from './save-checkpoint.ts'
import type { StoredDType } from './stored-dtype.ts'
import { fromF32 } from './to-f32.ts'
import type { TensorEntry } from './write-safetensors.ts'

/** What changes on the way into the new checkpoint; everything that is not asked for stays. */
export interface ConvertOptions extends SaveOptions, ReadF32Options {
  /** Name of a tensor in the new checkpoint; undefined leaves it out and reports it. Default: the same name. */
  readonly rename?: (key: string) => string | undefined
  /**
   * What floating-point tensors become. Weights with block scales are then dequantized and their scales left out. Default:
   * everything stays as it is stored, scales included.
   */
  readonly dtype?: 'f32' | 'bf16' | 'f16'
  /**
   * Floating-point tensors that become f32 whatever `dtype` says. Default: `e_score_correction_bias`, because rounding it to
   * bf16 changes the routing (NVIDIA/Megatron-LM#1482).
   */
  readonly keepF32?: (key: string) => boolean
}

const names: OptionNames<ConvertOptions> = {
  rename: true,
  dtype: true,
  keepF32: true,
  block: true,
  metadata: true,
  maxShardBytes: true,
}

/** What became of every tensor. */
export interface Conversion extends SavedCheckpoint {
  /** Names in the new checkpoint. */
  readonly written: readonly string[]
  /** Names of the source for which `rename` had none. */
  readonly unmapped: readonly string[]
  /** Names of the source that had block scales and were multiplied by them. */
  readonly dequantized: readonly string[]
  /** Names of the source with finite values that the new dtype cannot hold, now infinite (only f16 is so narrow). */
  readonly overflowed: readonly string[]
}

const floats: ReadonlySet<StoredDType> = new Set(['f64', 'f32', 'bf16', 'f16', 'f8e4m3', 'f8e5m2'])

/**
 * Streams an open checkpoint into a folder, one tensor in memory at a time, and reports what became of every name.
 *
 * @throws {MoeError} `E_CHECKPOINT` as {@link saveCheckpoint} does, also when two tensors are given one name
 *
 * @example
 * ```ts no-run
 * await using source = await openCheckpoint('DeepSeek-V3')
 * const report = await convertCheckpoint(source, 'DeepSeek-V3-bf16', { dtype: 'bf16' })
 * console.log(report.dequantized.length, 'weights dequantized,', report.unmapped, 'left out')
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
    if (info.dtype === 'f8e4m3' && source.has(scaleKey(key))) dequantized.push(key)
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

/** Values from 65520 on round to infinity in f16. */
function overflows(data: Float32Array): boolean {
  return data.some(value => Math.abs(value) >= 65520 && Number.isFinite(value))
}
