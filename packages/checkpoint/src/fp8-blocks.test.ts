import { copyFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { dequantizeFp8Blocks } from './fp8-blocks.ts'
import { openCheckpoint } from './open-checkpoint.ts'
import { isScaleKey, readF32 } from './read-f32.ts'
import { readSafetensors } from './read-safetensors.ts'
import { fixture, temporaryFolder } from './test-files.ts'
import { writeSafetensors } from './write-safetensors.ts'

const weight = 'model.layers.0.mlp.up_proj.weight'

describe('block scales', () => {
  it('dequantize to the same weight as PyTorch, with partial blocks at both edges', async () => {
    await using file = await readSafetensors(fixture('fp8-blocks.safetensors'))
    expect(file.info(weight)).toMatchObject({ dtype: 'f8e4m3', shape: [192, 320] })
    expect(file.info(`${weight}_scale_inv`).shape).toEqual([2, 3])
    const { shape, data } = await readF32(file, weight)
    expect(shape).toEqual([192, 320])
    const rows = (await file.read('expected.rows')).data as Int32Array
    const expected = (await file.read('expected.dequantized')).data as Float32Array
    for (const [i, row] of rows.entries()) {
      expect(data.slice(row * 320, (row + 1) * 320)).toEqual(expected.slice(i * 320, (i + 1) * 320))
    }
  })

  it('are distinguished from weights', async () => {
    await using file = await readSafetensors(fixture('fp8-blocks.safetensors'))
    expect(file.keys().filter(key => isScaleKey(file, key))).toEqual([`${weight}_scale_inv`])
  })

  it('are found in another shard', async () => {
    const folder = await temporaryFolder()
    await writeSafetensors(join(folder, 'a.safetensors'), [
      { name: 'w', dtype: 'f8e4m3', shape: [1, 2], data: Uint8Array.of(0x38, 0xc0) },
    ])
    await writeSafetensors(join(folder, 'b.safetensors'), [
      { name: 'w_scale_inv', dtype: 'f8e8m0', shape: [1, 1], data: Uint8Array.of(129) },
    ])
    const index = { weight_map: { w: 'a.safetensors', w_scale_inv: 'b.safetensors' } }
    await writeFile(join(folder, 'model.safetensors.index.json'), JSON.stringify(index))
    await using checkpoint = await openCheckpoint(folder)
    expect((await readF32(checkpoint, 'w')).data).toEqual(Float32Array.of(4, -8))
  })

  it('are optional: without them, f8e4m3 is widened', async () => {
    const path = join(await temporaryFolder(), 'a.safetensors')
    await copyFile(fixture('half-values.safetensors'), path)
    await using file = await readSafetensors(path)
    expect((await readF32(file, 'f8_e4m3')).data[0x38]).toBe(1)
  })

  it('apply to blocks of a custom size', () => {
    const q = { shape: [2, 3], data: new Uint8Array(6).fill(0x38) }
    const scale = { shape: [2, 2], data: Float32Array.of(1, 2, 3, 4) }
    expect(dequantizeFp8Blocks(q, scale, [1, 2])).toEqual(Float32Array.of(1, 1, 2, 3, 3, 4))
  })

  it('are applied per block, for any block size (compared in f64)', () => {
    const e4m3 = (code: number) => {
      const [exponent, mantissa] = [(code >> 3) & 15, code & 7]
      const size = exponent === 0 ? mantissa * 2 ** -9 : (1 + mantissa / 8) * 2 ** (exponent - 7)
      return code & 128 ? -size : size
    }
    let state = 1
    const below = (n: number) => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0
      return Math.floor((state / 2 ** 32) * n)
    }
    for (let i = 0; i < 200; i++) {
      const [rows, columns] = [1 + below(20), 1 + below(20)]
      const block = [1 + below(24), 1 + below(24)] as const
      const across = Math.ceil(columns / block[1])
      const shape = [Math.ceil(rows / block[0]), across]
      const data = Uint8Array.from({ length: rows * columns }, () => below(127) + 128 * below(2))
      const scale = Float32Array.from(
        { length: shape[0] * across },
        () => 2 ** (below(20) - 10) * (1 + below(1000) / 1000),
      )
      const expected = Float32Array.from(data, (code, at) => {
        const [row, column] = [Math.floor(at / columns), at % columns]
        return e4m3(code) * scale[Math.floor(row / block[0]) * across + Math.floor(column / block[1])]
      })
      expect(dequantizeFp8Blocks({ shape: [rows, columns], data }, { shape, data: scale }, block)).toEqual(expected)
    }
  })

  it.each([[[0, 128]], [[128, 1.5]], [[-1, 1]]] as [[number, number]][])(
    'are rejected for the invalid block size %j',
    block => {
      const one = { shape: [1, 1], data: new Uint8Array(1) }
      const scale = { shape: [1, 1], data: new Float32Array(1) }
      expect(() => dequantizeFp8Blocks(one, scale, block)).toThrow(
        /expected two positive block sizes, got .*; pass weight_block_size/,
      )
    },
  )

  it.each([
    [[2, 2], [1, 2], /needs scales \[1, 1\], got \[1, 2\]; pass weight_block_size/],
    [[129, 1], [1, 1], /needs scales \[2, 1\]/],
    [[4], [1, 1], /expected a matrix with block scales, got the shape \[4\]/],
    [[2, 2], [1], /got \[1\]/],
  ])('are rejected if the shapes do not fit: weight %j, scales %j', (shape, scaleShape, fault) => {
    const size = (s: number[]) => s.reduce((a, b) => a * b)
    const q = { shape, data: new Uint8Array(size(shape)) }
    const scale = { shape: scaleShape, data: new Float32Array(size(scaleShape)) }
    expect(() => dequantizeFp8Blocks(q, scale)).toThrow(fault)
  })

  it('of a wrong shape are rejected with the path of the file and the name of the tensor', async () => {
    const path = join(await temporaryFolder(), 'a.safetensors')
    await writeSafetensors(path, [
      { name: 'w', dtype: 'f8e4m3', shape: [1, 2], data: new Uint8Array(2) },
      { name: 'w_scale_inv', dtype: 'f32', shape: [2, 1], data: new Float32Array(2) },
    ])
    await using file = await readSafetensors(path)
    await expect(readF32(file, 'w')).rejects.toThrow(`${path}: tensor "w": a weight [1, 2]`)
  })
})
