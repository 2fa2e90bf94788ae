import { readdir, readFile, truncate, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { GGMLQuantizationType, gguf as parseWithHuggingFace } from '@huggingface/gguf'
import { isMoeError } from '@moe/core'
import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { fixture, temporaryFile, temporaryFolder } from '../test-files.ts'
import { decodeGguf, encodeGguf } from './blocks.ts'
import { readGguf } from './read-gguf.ts'
import type { GgufEncoding, GgufTensorType } from './tensor-type.ts'
import type { GgufValue } from './value.ts'
import { type GgufTensor, writeGguf } from './write-gguf.ts'

const encodings: readonly GgufEncoding[] = ['f32', 'f16', 'bf16', 'q8_0', 'q4_0']

describe("a file of llama.cpp's Python package", () => {
  it('is read with metadata of every type', async () => {
    await using file = await readGguf(fixture('python.gguf'))
    const values = Object.fromEntries(
      [...file.metadata].filter(([key]) => key.startsWith('test.')).map(([key, { value }]) => [key.slice(5), value]),
    )
    expect(values).toEqual({
      u8: 255,
      i8: -128,
      u16: 65535,
      i16: -32768,
      u32: 2 ** 32 - 1,
      i32: -(2 ** 31),
      f32: Math.fround(0.1),
      u64: 2n ** 64n - 1n,
      i64: -(2n ** 63n),
      f64: 0.1,
      bool: true,
      string: 'größe π 🐳',
      strings: ['a', '', 'Ġb'],
      numbers: [1, -2, 3],
      floats: [0.5, -0.25],
      booleans: [true, false],
    })
    expect(file.tensors.get('values')).toMatchObject({ type: 'f32', shape: [40, 64], bytes: 10240 })
    expect(file.tensors.get('q4_0')).toMatchObject({ type: 'q4_0', shape: [40, 64], bytes: 80 * 18 })
  })

  it.each(encodings.slice(1))('contains the bytes that encodeGguf produces for %s', async type => {
    await using file = await readGguf(fixture('python.gguf'))
    const values = await file.readF32('values')
    const stored = await file.read(type)
    expect(Buffer.compare(encodeGguf(type, values), stored)).toBe(0)
    const step = { f16: 2 ** -11, bf16: 2 ** -8, q8_0: 1 / 127, q4_0: 1 / 8 }[type as 'f16']
    const decoded = await file.readF32(type)
    for (let block = 0; block < values.length; block += 32) {
      const largest = Math.max(...values.subarray(block, block + 32).map(Math.abs))
      for (let i = block; i < block + 32; i++) {
        expect(Math.abs(decoded[i] - values[i])).toBeLessThanOrEqual(1.01 * largest * step + 4e-6)
      }
    }
  })
})

describe('a written GGUF file', () => {
  const metadata: Record<string, GgufValue> = {
    'general.architecture': { type: 'string', value: 'llama' },
    'llama.block_count': { type: 'u32', value: 3 },
    'llama.rope.freq_base': { type: 'f32', value: 10000 },
    'a.bools': { type: 'array', of: 'bool', value: [true, false] },
    'a.big': { type: 'u64', value: 2n ** 60n },
    'a.small': { type: 'i64', value: -7 },
    'a.double': { type: 'f64', value: 0.1 },
    'a.texts': { type: 'array', of: 'string', value: ['Ġthe', '', '🐳'] },
    'a.types': { type: 'array', of: 'i32', value: Int32Array.of(1, 3, 1) },
    'a.nested': {
      type: 'array',
      of: 'array',
      value: [
        { type: 'array', of: 'u8', value: [1, 2] },
        { type: 'array', of: 'string', value: ['x'] },
      ],
    },
    'a.empty': { type: 'array', of: 'f32', value: [] },
  }
  const values = Float32Array.from({ length: 3 * 2 * 64 }, (_, i) => Math.sin(i))
  const tensors = (): GgufTensor[] => [
    { name: 'odd', type: 'f32', shape: [3], values: Float32Array.of(1, -2, 0.5) },
    ...encodings.map(type => ({ name: `t.${type}`, type, shape: [3, 2, 64], values })),
    { name: 'last', type: 'bf16', shape: [1], values: () => Float32Array.of(1) },
  ]

  it("is read by Hugging Face's parser", async () => {
    const path = join(await temporaryFolder(), 'a.gguf')
    const bytes = await writeGguf(path, { metadata, tensors: tensors() })
    const file = await readFile(path)
    expect(file.length).toBe(bytes)
    const parsed = await parseWithHuggingFace(path, { allowLocalFile: true })
    expect(parsed.metadata).toMatchObject({
      version: 3,
      tensor_count: 7n,
      kv_count: 11n,
      'llama.block_count': 3,
      'a.big': 2n ** 60n,
      'a.small': -7n,
      'a.double': 0.1,
      'a.bools': [true, false],
      'a.texts': ['Ġthe', '', '🐳'],
      'a.types': [1, 3, 1],
      'a.nested': [[1, 2], ['x']],
      'a.empty': [],
    })
    expect(parsed.tensorInfos.map(({ name, shape }) => [name, shape])).toEqual([
      ['odd', [3n]],
      ...encodings.map(type => [`t.${type}`, [64n, 2n, 3n]]),
      ['last', [1n]],
    ])
    const start = Number(parsed.tensorDataOffset)
    expect(start % 32).toBe(0)
    for (const { name, offset, dtype } of parsed.tensorInfos) {
      expect(Number(offset) % 32).toBe(0)
      const type = { 0: 'f32', 1: 'f16', 2: 'q4_0', 8: 'q8_0', 30: 'bf16' }[dtype as number] as GgufEncoding
      if (!name.startsWith('t.')) continue
      expect(name).toBe(`t.${type}`)
      const expected = encodeGguf(type, values)
      const begin = start + Number(offset)
      expect(Buffer.compare(file.subarray(begin, begin + expected.length), expected)).toBe(0)
    }
  })

  it('is aligned as its metadata say', async () => {
    const path = join(await temporaryFolder(), 'a.gguf')
    const aligned: Record<string, GgufValue> = { ...metadata, 'general.alignment': { type: 'u32', value: 256 } }
    expect(await writeGguf(path, { metadata: aligned, tensors: tensors() })).toBe((await readFile(path)).length)
    const parsed = await parseWithHuggingFace(path, { allowLocalFile: true })
    await using file = await readGguf(path)
    for (const { name, offset } of parsed.tensorInfos)
      expect(file.tensors.get(name)?.begin).toBe(Number(parsed.tensorDataOffset + offset))
    expect(await file.readF32('t.f32')).toEqual(values)
    const odd: Record<string, GgufValue> = { 'general.alignment': { type: 'u32', value: 12 } }
    await expect(writeGguf(path, { metadata: odd, tensors: [] })).rejects.toThrow(/general.alignment is "12"/)
  })

  it('is read back with the same metadata and values', async () => {
    const path = join(await temporaryFolder(), 'a.gguf')
    await writeGguf(path, { metadata, tensors: tensors() })
    await using file = await readGguf(path)
    const plain = (value: GgufValue) => ({ ...value, value: Array.from(value.value as number[]) })
    expect(file.metadata.get('a.types')).toEqual(plain(metadata['a.types']))
    for (const key of ['a.nested', 'a.texts', 'a.bools', 'a.double', 'general.architecture']) {
      expect(file.metadata.get(key)).toEqual(metadata[key])
    }
    expect(await file.readF32('odd')).toEqual(Float32Array.of(1, -2, 0.5))
    expect(await file.readF32('t.f32')).toEqual(values)
    for (const type of encodings) {
      expect(await file.readF32(`t.${type}`)).toEqual(decodeGguf(type, encodeGguf(type, values)))
    }
  })

  it('is the same if a tensor is given in parts of whole rows; progress is reported', async () => {
    const folder = await temporaryFolder()
    const steps: number[] = []
    async function* parts() {
      for (let row = 0; row < 6; row += 2) yield values.subarray(row * 64, (row + 2) * 64)
    }
    const tensor: GgufTensor = { name: 'x', type: 'q8_0', shape: [6, 64], values: parts }
    const onProgress = ({ bytes }: { bytes: number }) => steps.push(bytes)
    await writeGguf(join(folder, 'parts.gguf'), { metadata, tensors: [tensor] }, { onProgress })
    await writeGguf(join(folder, 'whole.gguf'), { metadata, tensors: [{ ...tensor, values }] })
    expect(steps).toEqual([4 * 34, 8 * 34, 12 * 34])
    expect(await readFile(join(folder, 'parts.gguf'))).toEqual(await readFile(join(folder, 'whole.gguf')))
  })

  it.each<[string, Partial<GgufTensor>, RegExp]>([
    ['a name that is too long', { name: 'x'.repeat(64) }, /1 to 63 bytes/],
    ['five dimensions', { shape: [1, 1, 1, 1, 384] }, /use 1 to 4 positive integers/],
    ['no dimensions', { shape: [] }, /use 1 to 4 positive integers/],
    ['a dimension of 0', { shape: [0, 4] }, /positive integers/],
    ['rows that are not whole blocks', { type: 'q8_0', shape: [8, 48] }, /multiple of 32 elements; use f16/],
    ['an unknown type', { type: 'q5_k' as 'f32' }, /q8_0 or q4_0/],
    ['too few values', { shape: [7, 64] }, /needs 448 elements, got 384/],
    ['too many values', { shape: [5, 64] }, /needs 320 elements, got more/],
    ['a partial row', { shape: [3, 256] }, /a row has 256/],
    ['infinities in blocks', { type: 'q4_0', values: new Float32Array(384).fill(-Infinity) }, /not finite.*bf16/],
    ['a NaN in q4_0', { type: 'q4_0', values: values.map((x, i) => (i === 3 ? NaN : x)) }, /not finite/],
    ['a NaN in q8_0', { type: 'q8_0', values: values.map((x, i) => (i === 3 ? NaN : x)) }, /not finite/],
    [
      'values beyond the range of f16',
      { type: 'f16', values: new Float32Array(384).fill(7e4) },
      /does not fit into f16/,
    ],
  ])('is rejected with %s, and the existing file stays', async (_, change, message) => {
    const folder = await temporaryFolder()
    await writeFile(join(folder, 'a.gguf'), 'before')
    const tensor: GgufTensor = { name: 'x', type: 'f32', shape: [6, 64], values, ...change }
    const failure = await writeGguf(join(folder, 'a.gguf'), { metadata, tensors: [tensor] }).catch(error => error)
    expect(isMoeError(failure, 'E_CHECKPOINT')).toBe(true)
    expect(failure.message).toMatch(message)
    expect(await readFile(join(folder, 'a.gguf'), 'utf8')).toBe('before')
    expect(await readdir(folder)).toEqual(['a.gguf'])
  })

  it.each<[string, GgufValue, RegExp]>([
    ['a number out of range', { type: 'u8', value: 256 }, /is 256, expected u8/],
    ['a fraction', { type: 'i32', value: 0.5 }, /is 0.5, expected i32/],
    ['a lone surrogate', { type: 'string', value: '\ud83d' }, /expected string/],
    [
      'a number in an array of strings',
      { type: 'array', of: 'string', value: [1] as unknown as string[] },
      /is "1", expected string/,
    ],
    ['an unknown type', { type: 'f16', value: 1 } as unknown as GgufValue, /unknown type "f16"/],
  ])('is rejected with metadata that contains %s', async (_, value, message) => {
    const path = join(await temporaryFolder(), 'a.gguf')
    await expect(writeGguf(path, { metadata: { key: value }, tensors: [] })).rejects.toThrow(message)
  })

  it('is not written if names are duplicate or the signal is aborted', async () => {
    const folder = await temporaryFolder()
    const tensor: GgufTensor = { name: 'x', type: 'f32', shape: [6, 64], values }
    const path = join(folder, 'a.gguf')
    await expect(writeGguf(path, { metadata, tensors: [tensor, tensor] })).rejects.toThrow(/occurs twice/)
    const signal = AbortSignal.abort('enough')
    const failure = await writeGguf(path, { metadata, tensors: [tensor] }, { signal }).catch(error => error)
    expect(isMoeError(failure, 'E_ABORTED')).toBe(true)
    expect(await readdir(folder)).toEqual([])
  })
})

describe('GGUF files of given bytes', () => {
  /** Encodes numbers as u32, bigints as u64, and strings with their length; copies bytes. */
  const raw = (...parts: Array<number | bigint | string | Uint8Array>): Uint8Array =>
    Buffer.concat(
      parts.map(part => {
        if (part instanceof Uint8Array) return part
        const bytes = Buffer.alloc(8)
        if (typeof part === 'number') return bytes.subarray(0, bytes.writeUInt32LE(part))
        if (typeof part === 'bigint') {
          bytes.writeBigUInt64LE(part)
          return bytes
        }
        bytes.writeBigUInt64LE(BigInt(Buffer.byteLength(part)))
        return Buffer.concat([bytes, Buffer.from(part)])
      }),
    )
  const magic = Buffer.from('GGUF')
  const data = new Uint8Array(4096)
  const entry = ['k', 4, 7] as const
  const f32 = (name: string, offset: bigint) => [name, 1, 4n, 0, offset] as const

  // Scales, minimums and codes of a block, as in ggml-common.h.
  it.each<[GgufTensorType, number, number]>([
    ['f32', 1, 4],
    ['f16', 1, 2],
    ['bf16', 1, 2],
    ['f64', 1, 8],
    ['i8', 1, 1],
    ['i16', 1, 2],
    ['i32', 1, 4],
    ['i64', 1, 8],
    ['q4_0', 32, 2 + 16],
    ['q4_1', 32, 4 + 16],
    ['q5_0', 32, 2 + 4 + 16],
    ['q5_1', 32, 4 + 4 + 16],
    ['q8_0', 32, 2 + 32],
    ['q2_k', 256, 4 + 16 + 64],
    ['q3_k', 256, 2 + 12 + 32 + 64],
    ['q4_k', 256, 4 + 12 + 128],
    ['q5_k', 256, 4 + 12 + 32 + 128],
    ['q6_k', 256, 2 + 16 + 64 + 128],
  ])('contain %s in blocks of %i elements and %i bytes', async (type, block, bytes) => {
    const id = GGMLQuantizationType[type.toUpperCase() as keyof typeof GGMLQuantizationType]
    const header = raw(magic, 3, 1n, 0n, 'a', 2, BigInt(3 * block), 2n, id, 0n, data)
    await using file = await readGguf(await temporaryFile(header, 'a.gguf'))
    expect(file.tensors.get('a')).toMatchObject({ type, shape: [2, 3 * block], bytes: 6 * bytes })
    if (block === 1) return
    const partial = raw(magic, 3, 1n, 0n, 'a', 1, BigInt(block + block / 2), id, 0n, data)
    await expect(readGguf(await temporaryFile(partial, 'a.gguf'))).rejects.toThrow(/invalid shape/)
  })

  it.each<[string, Uint8Array, Partial<GgufValue>]>([
    ['a number', raw(4, 7), { type: 'u32', value: 7 }],
    ['text', raw(8, 'text'), { type: 'string', value: 'text' }],
    ['an array of numbers', raw(9, 4, 2n, 7, 8), { type: 'array', of: 'u32', value: [7, 8] }],
    ['an array of empty texts', raw(9, 8, 2n, '', ''), { type: 'array', of: 'string', value: ['', ''] }],
    ['an array of empty arrays', raw(9, 9, 1n, 4, 0n), { value: [{ type: 'array', of: 'u32', value: [] }] }],
    ['a boolean', raw(9, 7, 1n, Uint8Array.of(1)), { type: 'array', of: 'bool', value: [true] }],
  ])('may end with %s of the header', async (_, value, expected) => {
    await using file = await readGguf(await temporaryFile(raw(magic, 3, 0n, 1n, 'k', value), 'a.gguf'))
    expect(file.metadata.get('k')).toMatchObject(expected)
  })

  it.each<[string, Uint8Array, RegExp]>([
    ['an empty file', new Uint8Array(0), /0 bytes are too few/],
    ['another format', raw(Buffer.from('PK\x03\x04'), data), /does not start with "GGUF"/],
    ['version 1', raw(magic, 1, data), /version 1.*versions 2 and 3/],
    ['big-endian numbers', raw(magic, 0x03000000, data), /big-endian/],
    ['more tensors than bytes', raw(magic, 3, 2n ** 62n, 0n, data), /claims 4611686018427387904 tensors/],
    ['more entries than bytes', raw(magic, 3, 0n, 2n ** 40n, data), /claims 1099511627776 metadata entries/],
    ['a string longer than the file', raw(magic, 3, 0n, 1n, 2n ** 50n, data), /bytes of text, more than/],
    ['an array longer than the file', raw(magic, 3, 0n, 1n, 'k', 9, 4, 2n ** 61n, data), /elements of u32/],
    [
      'deeply nested arrays',
      raw(magic, 3, 0n, 1n, 'k', 9, ...Array(20).fill([9, 1n]).flat(), data),
      /nested deeper than 8/,
    ],
    ['an unknown value type', raw(magic, 3, 0n, 1n, 'k', 13, data), /unknown type 13 at byte 33/],
    ['a boolean of 2', raw(magic, 3, 0n, 1n, 'k', 7, 2, data), /boolean 2/],
    ['text that is not UTF-8', raw(magic, 3, 0n, 1n, 1n, Uint8Array.of(0xff), 4, 7, data), /not valid UTF-8/],
    ['a duplicate key', raw(magic, 3, 0n, 2n, ...entry, ...entry, data), /duplicate metadata key "k"/],
    ['a duplicate tensor', raw(magic, 3, 2n, 0n, ...f32('a', 0n), ...f32('a', 32n), data), /duplicate tensor "a"/],
    ['overlapping tensors', raw(magic, 3, 2n, 0n, 'b', 1, 9n, 0, 0n, ...f32('a', 32n), data), /"b" and "a" overlap/],
    ['a misaligned tensor', raw(magic, 3, 1n, 0n, ...f32('a', 4n), data), /offset 4, not a multiple of 32/],
    ['a tensor beyond the end', raw(magic, 3, 1n, 0n, ...f32('a', 2n ** 40n), data), /but the file has/],
    [
      'an offset beyond 2^53',
      raw(magic, 3, 1n, 0n, ...f32('a', 2n ** 60n), data),
      /invalid offset 1152921504606846976/,
    ],
    ['sizes beyond 2^53', raw(magic, 3, 1n, 0n, 'a', 2, 2n ** 40n, 2n ** 40n, 0, 0n, data), /invalid shape/],
    ['too many dimensions', raw(magic, 3, 1n, 0n, 'a', 400, 1n, data), /400 dimensions/],
    ['a partial block', raw(magic, 3, 1n, 0n, 'a', 1, 33n, 8, 0n, data), /q8_0 has the invalid shape \[33\]/],
    ['an unknown element type', raw(magic, 3, 1n, 0n, 'a', 1, 32n, 99, 0n, data), /element type 99/],
    ['a long name', raw(magic, 3, 1n, 0n, 'x'.repeat(90), 1, 4n, 0, 0n, data), /name of more than 63 bytes/],
    ['an alignment of 3', raw(magic, 3, 0n, 1n, 'general.alignment', 4, 3, data), /multiple of 8/],
  ])('are rejected with %s', async (_, bytes, message) => {
    const failure = await readGguf(await temporaryFile(bytes, 'a.gguf')).catch(error => error)
    expect(isMoeError(failure, 'E_CHECKPOINT')).toBe(true)
    expect(failure.message).toMatch(message)
    expect(failure.message.length).toBeLessThan(400)
  })

  it('are rejected if the header exceeds 64 MiB, before it is parsed', async () => {
    const path = await temporaryFile(raw(magic, 3, 0n, 1n, 'k', 8, 2n ** 26n, data), 'a.gguf')
    await truncate(path, 2 ** 27)
    await expect(readGguf(path)).rejects.toThrow(/exceeds the limit of 67108864 bytes/)
  })

  it('are rejected if the header exceeds the size limit; smaller headers are read in steps', async () => {
    const value: GgufValue = {
      type: 'array',
      of: 'string',
      value: Array.from({ length: 150_000 }, (_, i) => `token ${i}`),
    }
    const path = join(await temporaryFolder(), 'a.gguf')
    await writeGguf(path, { metadata: { tokens: value }, tensors: [] })
    await expect(readGguf(path, { maxHeaderBytes: 2 ** 21 })).rejects.toThrow(/exceeds the limit of 2097152 bytes/)
    await using file = await readGguf(path)
    expect(file.metadata.get('tokens')).toEqual(value)
  })

  it('are read or rejected with E_CHECKPOINT after any changed byte or truncation', async () => {
    const path = join(await temporaryFolder(), 'a.gguf')
    const good = await readFile(fixture('python.gguf'))
    const header = 1400
    await fc.assert(
      fc.asyncProperty(fc.nat(header), fc.nat(255), fc.boolean(), async (at, byte, cut) => {
        const bytes = Buffer.from(cut ? good.subarray(0, at) : good)
        if (!cut) bytes[at] = byte
        await writeFile(path, bytes)
        const result = await readGguf(path).catch(error => error)
        if (result instanceof Error) expect(isMoeError(result, 'E_CHECKPOINT')).toBe(true)
        else await result.close()
      }),
      { numRuns: 300 },
    )
  })
})
