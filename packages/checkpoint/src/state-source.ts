/** @file Adapts a checkpoint for `loadStateDict` of `@moe/core`. */

import { checkOptions, type DType, dtypes, type HostArray, type StateSource } from '@moe/core'
import { hasScales, isScaleKey, type ReadF32Options, readF32, readFp8 } from './read-f32.ts'
import type { TensorSource } from './read-safetensors.ts'

/**
 * Adapts an open checkpoint for `loadStateDict(module, stateSource(checkpoint))`. Dtypes of `@moe/core` are returned as stored, all others
 * as f32. fp8 weights with block scales are dequantized to f32, unless the module has them in fp8, and their scales are not listed. To save, no adapter is needed:
 * `saveCheckpoint(folder, stateDict(module))`.
 *
 * @throws {MoeError} `E_CHECKPOINT` from `info` and `read`, as those of the checkpoint
 */
export function stateSource(source: TensorSource, options: ReadF32Options = {}): StateSource {
  checkOptions('stateSource', options, { block: true })
  const dtypeOf = (key: string): DType => {
    const { dtype } = source.info(key)
    if (hasScales(source, key)) return 'f32'
    return dtypes.find(known => known === dtype) ?? 'f32'
  }
  return {
    keys: () => source.keys().filter(key => !isScaleKey(source, key)),
    info: key => ({ dtype: dtypeOf(key), shape: source.info(key).shape }),
    read: async key => {
      if (dtypeOf(key) === 'f32') return (await readF32(source, key, options)).data
      return (await source.read(key)).data as HostArray
    },
    readQuantized: (key, like) => readFp8(source, key, like, options),
  }
}
