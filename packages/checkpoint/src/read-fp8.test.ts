import { join } from 'node:path'
import { Linear, loadStateDict, type QuantizedParameter, setDefaultBackend, type WeightFormat } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { beforeAll, describe, expect, it } from 'vitest'
import { openCheckpoint } from './open-checkpoint.ts'
import { readF32, readFp8 } from './read-f32.ts'
import { stateSource } from './state-source.ts'
import { temporaryFolder } from './test-files.ts'
import { type TensorEntry, writeSafetensors } from './write-safetensors.ts'

beforeAll(() => setDefaultBackend(referenceBackend()))

const like = { format: 'fp8', block: [128, 128] } as const

/** A checkpoint with one fp8 weight, and scales of this shape. */
async function stored(shape: [number, number], scales?: number[]) {
  const folder = await temporaryFolder()
  const codes = Uint8Array.from({ length: shape[0] * shape[1] }, (_, i) => (i % 127) + 128 * (i % 2))
  const entries: TensorEntry[] = [{ name: 'weight', dtype: 'f8e4m3', shape, data: codes }]
  if (scales) {
    const data = Float32Array.from({ length: scales.reduce((a, b) => a * b, 1) }, (_, i) => 0.3 + i)
    entries.push({ name: 'weight_scale_inv', dtype: 'f32', shape: scales, data })
  }
  await writeSafetensors(join(folder, 'model.safetensors'), entries)
  return { codes, checkpoint: await openCheckpoint(folder) }
}

describe('fp8 weights', () => {
  it.each<[string, [number, number], number[] | undefined, readonly [number, number] | null]>([
    ['blocks of the same size', [300, 260], [3, 3], [128, 128]],
    ['larger blocks', [300, 260], [2, 1], [256, 384]],
    ['blocks larger than the matrix', [100, 260], [1, 3], [101, 128]],
    ['one scale per matrix', [300, 260], [1], null],
    ['no scales', [300, 260], undefined, [128, 128]],
  ])('are loaded into fp8 weights as they are: %s', async (_, shape, scales, block) => {
    const { codes, checkpoint } = await stored(shape, scales)
    const linear = new Linear(shape[1], shape[0], { std: 0, weights: 'fp8' })
    await loadStateDict(linear, stateSource(checkpoint, { block }))
    const parameter = linear.weight as QuantizedParameter
    expect(await parameter.weight.q.data()).toEqual(codes)
    const { data } = await readF32(checkpoint, 'weight', { block })
    expect(await parameter.dequantize().values()).toEqual(data)
    if (scales?.length === 2 && block?.every(size => size === 128)) {
      expect(await parameter.weight.scale?.values()).toEqual((await checkpoint.read('weight_scale_inv')).data)
    }
    await checkpoint.close()
  })

  it.each<[string, number[], readonly [number, number]]>([
    ['one scale per row', [300, 1], [1, 260]],
    ['smaller blocks', [5, 5], [64, 64]],
    ['blocks of fewer columns', [3, 5], [128, 64]],
    ['blocks that end elsewhere', [2, 3], [192, 128]],
  ])('are rounded again with %s', async (_, scales, block) => {
    const { checkpoint } = await stored([300, 260], scales)
    expect(await readFp8(checkpoint, 'weight', like, { block })).toBeUndefined()
    const linear = new Linear(260, 300, { std: 0, weights: 'fp8' })
    await loadStateDict(linear, stateSource(checkpoint, { block }))
    const { data } = await readF32(checkpoint, 'weight', { block })
    const values = await (linear.weight as QuantizedParameter).dequantize().values()
    const largest = Math.max(...data)
    const error = Math.max(...values.map((value, i) => Math.abs(value - data[i])))
    expect(error).toBeGreaterThan(0)
    expect(error).toBeLessThan(largest / 16)
    await checkpoint.close()
  })

  it('have the scales of smaller blocks that are not square', async () => {
    const { checkpoint } = await stored([4, 6], [2, 2])
    const fp8 = await readFp8(checkpoint, 'weight', { format: 'fp8', block: [1, 2] }, { block: [2, 4] })
    expect(fp8?.scale).toEqual(Float32Array.from([0, 0, 1, 0, 0, 1, 2, 2, 3, 2, 2, 3], i => 0.3 + i))
    await checkpoint.close()
  })

  it('have no codes for other formats, and other tensors have none', async () => {
    const { checkpoint } = await stored([4, 4], [1, 1])
    for (const format of ['int8', 'int4', 'bf16'] satisfies WeightFormat[]) {
      expect(await readFp8(checkpoint, 'weight', { ...like, format })).toBeUndefined()
    }
    expect(await readFp8(checkpoint, 'weight_scale_inv', like)).toBeUndefined()
    await checkpoint.close()
  })

  it('are rejected with scales of another shape', async () => {
    const { checkpoint } = await stored([300, 260], [3, 2])
    await expect(readFp8(checkpoint, 'weight', like)).rejects.toThrow(
      /tensor "weight": a weight \[300, 260\] in blocks of 128 x 128 needs scales \[3, 3\], got \[3, 2\]/,
    )
    await expect(readF32(checkpoint, 'weight', { block: null })).rejects.toThrow(/needs scales \[1, 1\], got \[3, 2\]/)
    await checkpoint.close()
  })
})
