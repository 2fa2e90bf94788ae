import { copyFile, readFile, truncate } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { writeAll } from './atomic-file.ts'
import { readF32 } from './read-f32.ts'
import { readRange, readSafetensors } from './read-safetensors.ts'
import { fixture, rawFile, temporaryFile, temporaryFolder } from './test-files.ts'
import { toF32 } from './to-f32.ts'

const values = [0, -0, 1, -2.5, 3.140625, 448]

describe("a file written by Python's safetensors", () => {
  it('returns every dtype, shape and name', async () => {
    const { dtypes } = JSON.parse(await readFile(fixture('files.json'), 'utf8')) as {
      dtypes: Record<string, { dtype: string; shape: number[] }>
    }
    await using file = await readSafetensors(fixture('dtypes.safetensors'))
    expect(file.metadata).toEqual({ format: 'pt', note: 'every dtype' })
    expect(file.keys().sort()).toEqual(Object.keys(dtypes).sort())
    for (const key of file.keys()) {
      expect(file.info(key).shape).toEqual(dtypes[key].shape)
      const { dtype, shape, data } = await file.read(key)
      expect({ dtype, shape }).toEqual({ dtype: file.info(key).dtype, shape: file.info(key).shape })
      expect(data.byteLength).toBe(file.info(key).bytes)
    }
    const dtypeOf = Object.fromEntries(file.keys().map(key => [key, file.info(key).dtype]))
    expect(dtypeOf).toMatchObject({
      f64: 'f64',
      f8_e4m3: 'f8e4m3',
      i16: 'i16',
      bool: 'bool',
      scalar: 'f32',
      'größe.π': 'f32',
    })
  })

  it('returns the values as stored', async () => {
    await using file = await readSafetensors(fixture('dtypes.safetensors'))
    const read = async (key: string) => (await file.read(key)).data
    expect(await read('f64')).toEqual(Float64Array.from(values))
    expect(await read('f32')).toEqual(Float32Array.from(values))
    expect(await read('bf16')).toEqual(Uint16Array.of(0, 0x8000, 0x3f80, 0xc020, 0x4049, 0x43e0))
    expect(await read('f16')).toEqual(Uint16Array.of(0, 0x8000, 0x3c00, 0xc100, 0x4248, 0x5f00))
    expect(await read('f8_e4m3')).toEqual(Uint8Array.of(0, 0x80, 0x38, 0xc2, 0x45, 0x7e))
    expect(await read('i64')).toEqual(BigInt64Array.of(-(2n ** 53n), -1n, 0n, 2n ** 62n))
    expect(await read('i32')).toEqual(Int32Array.of(-(2 ** 31), -1, 0, 2 ** 31 - 1))
    expect(await read('i16')).toEqual(Int16Array.of(-5, 5))
    expect(await read('i8')).toEqual(Int8Array.of(-128, 127))
    expect(await read('u8')).toEqual(Uint8Array.of(0, 255))
    expect(await read('bool')).toEqual(Uint8Array.of(1, 0, 1))
    expect(await read('scalar')).toEqual(Float32Array.of(7.5))
    expect(await read('empty')).toEqual(new Float32Array(0))
    expect(await read('größe.π')).toEqual(Float32Array.of(1, 2))
  })

  it.each(['bf16', 'f16', 'f8_e4m3'])('widens %s exactly, subnormals, infinities and NaN included', async key => {
    await using file = await readSafetensors(fixture('half-values.safetensors'))
    const { data } = await readF32(file, key)
    const expected = (await file.read(`${key}.f32`)).data as Float32Array
    expect(data.length).toBe(expected.length)
    const different = [...data.keys()].filter(i => !Object.is(data[i], expected[i]))
    expect(different.map(i => [i, data[i], expected[i]])).toEqual([])
  })

  it('converts integers and f64 to f32', async () => {
    await using file = await readSafetensors(fixture('dtypes.safetensors'))
    expect((await readF32(file, 'f64')).data).toEqual(Float32Array.from(values))
    expect((await readF32(file, 'i64')).data).toEqual(Float32Array.of(-(2 ** 53), -1, 0, 2 ** 62))
    expect((await readF32(file, 'i8')).data).toEqual(Float32Array.of(-128, 127))
    expect((await readF32(file, 'bool')).data).toEqual(Float32Array.of(1, 0, 1))
  })
})

describe('toF32', () => {
  it('reads f8e5m2 as the upper byte of f16, and f8e8m0 as powers of two', () => {
    expect(toF32('f8e5m2', Uint8Array.of(0x3c, 0xc0, 0x7b, 0x7c, 0x01))).toEqual(
      Float32Array.of(1, -2, 57344, Number.POSITIVE_INFINITY, 2 ** -16),
    )
    expect(toF32('f8e8m0', Uint8Array.of(127, 130, 0, 254, 255))).toEqual(
      Float32Array.of(1, 8, 2 ** -127, 2 ** 127, Number.NaN),
    )
  })

  it('reads 8-bit floats without infinities, whose code of -0 is NaN', () => {
    expect(toF32('f8e4m3fnuz', Uint8Array.of(0, 1, 7, 8, 0x40, 0xc4, 0x7f, 0xff, 0x80))).toEqual(
      Float32Array.of(0, 2 ** -10, 7 * 2 ** -10, 2 ** -7, 1, -1.5, 240, -240, Number.NaN),
    )
    expect(toF32('f8e5m2fnuz', Uint8Array.of(0, 1, 3, 4, 0x40, 0xc2, 0x7f, 0xff, 0x80))).toEqual(
      Float32Array.of(0, 2 ** -17, 3 * 2 ** -17, 2 ** -15, 1, -1.5, 57344, -57344, Number.NaN),
    )
  })

  it('does not convert packed and complex numbers to f32', async () => {
    expect(toF32('f4', Uint8Array.of(1))).toBeUndefined()
    const path = await temporaryFile(rawFile({ a: { dtype: 'C64', shape: [1], data_offsets: [0, 8] } }, 8))
    await using file = await readSafetensors(path)
    expect((await file.read('a')).data).toEqual(new Uint8Array(8))
    await expect(readF32(file, 'a')).rejects.toThrow(/tensor "a" has dtype c64; use read\(\)/)
  })
})

describe('an open file', () => {
  it('returns independent copies', async () => {
    await using file = await readSafetensors(fixture('dtypes.safetensors'))
    const first = await file.read('u8')
    first.data[0] = 9
    expect((await file.read('u8')).data).toEqual(Uint8Array.of(0, 255))
  })

  it('suggests similar names for a missing tensor', async () => {
    await using file = await readSafetensors(fixture('sharded/model-00001-of-00003.safetensors'))
    expect(file.has('model.norm.weight')).toBe(true)
    expect(() => file.info('norm.weight')).toThrow(/no tensor "norm.weight"; similar names: "model.norm.weight"/)
    await expect(file.read('x')).rejects.toThrow(/no tensor "x"; call keys\(\)/)
  })

  it('rejects reads after it is closed, and can be closed twice', async () => {
    const file = await readSafetensors(fixture('dtypes.safetensors'))
    await file.close()
    await file.close()
    await expect(file.read('u8')).rejects.toThrow(/is closed/)
  })

  it('reports that the file was truncated', async () => {
    const path = join(await temporaryFolder(), 'a.safetensors')
    await copyFile(fixture('dtypes.safetensors'), path)
    await using file = await readSafetensors(path)
    const last = file.keys().at(-1)!
    await truncate(path, 1000)
    await expect(file.read(last)).rejects.toThrow(/it was truncated after it was opened/)
  })

  it('rejects a header above maxHeaderBytes', async () => {
    const header = `{${' '.repeat(1000)}}`
    const path = await temporaryFile(rawFile(header, 0))
    await expect(readSafetensors(path, { maxHeaderBytes: 500 })).rejects.toThrow(
      /claims 1002 bytes, more than the limit of 500/,
    )
    await expect(readSafetensors(path, { maxHeaderBytes: Number.NaN })).rejects.toThrow(/more than the limit of NaN/)
    for (const maxHeaderBytes of [1002, 1002.5, Number.POSITIVE_INFINITY]) {
      await using file = await readSafetensors(path, { maxHeaderBytes })
      expect(file.keys()).toEqual([])
    }
  })
})

describe('if the system transfers fewer bytes than requested', () => {
  const content = Uint8Array.from({ length: 20 }, (_, i) => i)

  it('readRange continues until all bytes are read', async () => {
    const read = async (out: Uint8Array, offset: number, length: number, position: number) => {
      const bytes = Math.min(length, 3)
      out.set(content.subarray(position, position + bytes), offset)
      return bytes
    }
    const file = { path: 'x', bytes: content.length, read, close: async () => {} }
    expect(await readRange(file, 4, 11)).toEqual(content.slice(4, 15))
  })

  it('writeAll continues until all bytes are written', async () => {
    const written: number[] = []
    const write = async (bytes: Uint8Array, offset: number, length: number) => {
      const bytesWritten = Math.min(length, 3)
      written.push(...bytes.subarray(offset, offset + bytesWritten))
      return { bytesWritten, buffer: bytes }
    }
    await writeAll({ write } as never, 'x', content)
    expect(written).toEqual([...content])
  })
})
