import { readdir, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { toBf16, toF16 } from '@moe/core'
import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { convertCheckpoint } from './convert-checkpoint.ts'
import { openCheckpoint } from './open-checkpoint.ts'
import { readF32 } from './read-f32.ts'
import type { TensorSource } from './read-safetensors.ts'
import { fixture, temporaryFolder } from './test-files.ts'
import { fromF32 } from './to-f32.ts'
import { writeSafetensors } from './write-safetensors.ts'

const weight = 'model.layers.0.mlp.up_proj.weight'

describe('convertCheckpoint', () => {
  it('copies bit for bit without options', async () => {
    const folder = await temporaryFolder()
    await using source = await openCheckpoint(fixture('dtypes.safetensors'))
    const report = await convertCheckpoint(source, folder, { maxShardBytes: 30 })
    expect(report.written.toSorted()).toEqual(source.keys().sort())
    await using copy = await openCheckpoint(folder)
    for (const key of source.keys()) expect(await copy.read(key)).toEqual(await source.read(key))
  })

  it('dequantizes fp8 blocks and omits their scales', async () => {
    const folder = await temporaryFolder()
    await using source = await openCheckpoint(fixture('fp8-blocks.safetensors'))
    const report = await convertCheckpoint(source, folder, { dtype: 'bf16' })
    expect(report.dequantized).toEqual([weight])
    expect(report.unmapped).toEqual([])
    await using copy = await openCheckpoint(folder)
    expect(copy.has(`${weight}_scale_inv`)).toBe(false)
    const expected = (await readF32(source, weight)).data
    expect((await copy.read(weight)).data).toEqual(Uint16Array.from(expected, toBf16))
    expect(copy.info('expected.rows').dtype, 'integers stay').toBe('i32')
  })

  it('keeps the balance bias of the router in f32', async () => {
    const folder = await temporaryFolder()
    const key = 'model.layers.3.mlp.gate.e_score_correction_bias'
    const bias = Float32Array.of(6.951, 6.952, 6.953)
    await writeSafetensors(join(folder, 'in.safetensors'), [{ name: key, dtype: 'f32', shape: [3], data: bias }])
    await using source = await openCheckpoint(join(folder, 'in.safetensors'))
    await convertCheckpoint(source, join(folder, 'out'), { dtype: 'bf16' })
    await using copy = await openCheckpoint(join(folder, 'out'))
    expect(await copy.read(key)).toEqual({ dtype: 'f32', shape: [3], data: bias })
  })

  it('renames, reports omitted names, and rejects duplicate names', async () => {
    const folder = await temporaryFolder()
    await using source = await openCheckpoint(fixture('sharded'))
    const rename = (key: string) => (key.startsWith('model.') ? key.slice(6) : undefined)
    const report = await convertCheckpoint(source, folder, { rename })
    expect(report.unmapped).toEqual(['lm_head.weight'])
    expect(report.written).toContain('layers.0.mlp.up_proj.weight')
    await expect(convertCheckpoint(source, folder, { rename: () => 'same' })).rejects.toThrow(/"same" occurs twice/)
  })

  it('reads one tensor at a time, after the previous ones are on disk', async () => {
    const folder = await temporaryFolder()
    const elements = 2 ** 19
    const keys = Array.from({ length: 9 }, (_, i) => `layers.${i}.weight`)
    const bytesOnDisk = async () => {
      const files = await readdir(folder, { recursive: true, withFileTypes: true })
      const sizes = files.filter(file => file.isFile()).map(file => stat(join(file.parentPath, file.name)))
      return (await Promise.all(sizes)).reduce((sum, { size }) => sum + size, 0)
    }
    let reading = 0
    const unwritten: number[] = []
    const source: TensorSource = {
      path: 'made up',
      metadata: {},
      close: async () => {},
      [Symbol.asyncDispose]: async () => {},
      keys: () => keys.slice(),
      has: key => keys.includes(key),
      info: () => ({ dtype: 'f32', shape: [elements], bytes: 4 * elements, file: 'made up' }),
      async read(key) {
        reading++
        // Bytes of the previous tensors (in bf16) that are not on disk yet.
        unwritten.push(keys.indexOf(key) * elements * 2 - (await bytesOnDisk()))
        const data = new Float32Array(elements).fill(keys.indexOf(key))
        expect(reading--).toBe(1)
        return { dtype: 'f32', shape: [elements], data }
      },
    }
    await convertCheckpoint(source, folder, { dtype: 'bf16', maxShardBytes: 3 * elements })
    expect(unwritten).toHaveLength(9)
    // The writer's buffer of 1 MiB.
    expect(Math.max(...unwritten)).toBeLessThanOrEqual(2 ** 20)
    await using copy = await openCheckpoint(folder)
    expect((await copy.read('layers.8.weight')).data[elements - 1]).toBe(toBf16(8))
  })

  it('reports values that overflow f16', async () => {
    const folder = await temporaryFolder()
    await writeSafetensors(join(folder, 'in.safetensors'), [
      { name: 'large', dtype: 'f32', shape: [2], data: Float32Array.of(1, -65520) },
      { name: 'largest', dtype: 'f32', shape: [2], data: Float32Array.of(65519, Number.POSITIVE_INFINITY) },
    ])
    await using source = await openCheckpoint(join(folder, 'in.safetensors'))
    const report = await convertCheckpoint(source, join(folder, 'out'), { dtype: 'f16' })
    expect(report.overflowed).toEqual(['large'])
  })
})

describe('fromF32', () => {
  it('rounds like the conversions of core, for any bit pattern', () => {
    const bits = fc.uint32Array({ minLength: 1, maxLength: 64 })
    const edges = Uint32Array.of(0x7fffffff, 0xffffffff, 0x7f800001, 0x7f7fffff, 0x3f808000, 0x3f818000, 1, 0x80000000)
    fc.assert(
      fc.property(bits, words => {
        const data = new Float32Array(words.buffer)
        expect(fromF32('bf16', data)).toEqual(Uint16Array.from(data, toBf16))
        expect(fromF32('f16', data)).toEqual(Uint16Array.from(data, toF16))
        expect(fromF32('f32', data)).toBe(data)
      }),
      { examples: [[edges]], numRuns: 500 },
    )
  })
})
