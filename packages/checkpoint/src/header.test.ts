import { mkdir } from 'node:fs/promises'
import { isMoeError } from '@moe/core'
import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { encodeHeader, headerLength, parseHeader } from './header.ts'
import { readSafetensors } from './read-safetensors.ts'
import { dtypeOfName, type StoredDType, storedBits, storedBytes, storedName, storedNames } from './stored-dtype.ts'
import { rawFile, temporaryFile, temporaryFolder } from './test-files.ts'

const f32 = (shape: unknown, ...offsets: unknown[]) => ({ dtype: 'F32', shape, data_offsets: offsets })

/** Opens a file with these bytes and returns the expected error. */
async function rejection(bytes: Uint8Array): Promise<Error> {
  const path = await temporaryFile(bytes)
  const error = await readSafetensors(path).then(
    file => file.close().then(() => undefined),
    (e: unknown) => e,
  )
  if (!isMoeError(error, 'E_CHECKPOINT')) throw new Error(`expected E_CHECKPOINT, got ${error}`)
  expect(error.message.startsWith(path), 'the message starts with the file').toBe(true)
  expect(error.details['file']).toBe(path)
  return error
}

describe('a malicious file', () => {
  it.each<[string, Uint8Array, RegExp]>([
    ['empty', new Uint8Array(0), /0 bytes are too few/],
    ['shorter than its length field', new Uint8Array(7), /7 bytes are too few/],
    ['header longer than the file', rawFile({}, 0, 3n), /claims 3 bytes, but the file has only 10/],
    ['header of 2^64 - 1 bytes', rawFile({}, 0, 2n ** 64n - 1n), /claims 18446744073709551615 bytes, more than/],
    ['header of 2^53 + 1 bytes', rawFile({}, 0, 2n ** 53n + 1n), /claims 9007199254740993 bytes, more than/],
    ['header of no bytes', rawFile('', 0), /header has only 0 bytes/],
    ['header of 100 MB', rawFile(`{${' '.repeat(1e8)}}`, 0), /claims 100000002 bytes, more than the limit of 33554432/],
    ['header that is not an object', rawFile([], 0), /does not start with/],
    ['header after a byte order mark', rawFile('\ufeff{}', 0), /does not start with/],
    ['header cut off', rawFile('{"a":', 0), /header is invalid/],
    ['header with text after it', rawFile('{} x', 0), /header is invalid/],
    ['header that is not UTF-8', rawFile({}, 0).with(9, 0xff), /not valid UTF-8/],
    ['header of nested brackets', rawFile(`{"a":${'['.repeat(1e6)}`, 0), /nested deeper/],
    [
      'duplicate tensor',
      rawFile('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', 1),
      /duplicate key "a"/,
    ],
    [
      'duplicate field of a tensor',
      rawFile('{"a":{"dtype":"U8","shape":[1],"shape":[9],"data_offsets":[0,1]}}', 1),
      /duplicate key "shape"/,
    ],
    ['tensor that is not an object', rawFile({ a: 3 }, 0), /tensor "a" is described by (3|null), expected an object/],
    ['tensor that is null', rawFile({ a: null }, 0), /tensor "a" is described by (3|null), expected an object/],
    [
      'unknown dtype',
      rawFile({ a: { ...f32([1], 0, 4), dtype: 'F33' } }, 4),
      /unknown dtype "F33"; known are F64, F32/,
    ],
    ['dtype of another type', rawFile({ a: { ...f32([1], 0, 4), dtype: ['F32'] } }, 4), /unknown dtype \["F32"\]/],
    [
      'dtype that is a property of every object',
      rawFile({ a: { ...f32([1], 0, 4), dtype: 'constructor' } }, 4),
      /unknown dtype/,
    ],
    ['no shape', rawFile({ a: { dtype: 'F32', data_offsets: [0, 4] } }, 4), /shape undefined/],
    ['negative size', rawFile({ a: f32([-1], 0, 4) }, 4), /shape \[-1\]/],
    ['fractional size', rawFile({ a: f32([0.5, 2], 0, 4) }, 4), /shape \[0.5,2\]/],
    ['size beyond 2^53', rawFile({ a: f32([2 ** 60], 0, 4) }, 4), /shape \[1152921504606847000\]/],
    [
      'sizes whose product overflows',
      rawFile({ a: f32([2 ** 40, 2 ** 40], 0, 4) }, 4),
      /is too large or not a whole number of bytes/,
    ],
    [
      'sizes whose product wraps to 0 in 64 bits',
      rawFile({ a: f32([2 ** 32, 2 ** 32], 0, 0) }, 0),
      /is too large or not a whole number of bytes/,
    ],
    ['one offset', rawFile({ a: f32([1], 0) }, 4), /data_offsets \[0\]/],
    ['offsets as text', rawFile({ a: f32([1], '0', '4') }, 4), /data_offsets/],
    ['negative offset', rawFile({ a: f32([1], -4, 0) }, 4), /data_offsets \[-4,0\]/],
    ['begin after end', rawFile({ a: f32([1], 4, 0) }, 4), /begins at 4, after its end at 0/],
    ['end beyond the file', rawFile({ a: f32([2], 0, 8) }, 4), /ends at byte 8 of 4 bytes of data/],
    ['begin beyond the file', rawFile({ a: f32([0], 1e15, 1e15) }, 4), /ends at byte 1000000000000000/],
    ['too few bytes for the dtype', rawFile({ a: f32([2], 0, 4) }, 4), /has 4 bytes, but F32 \[2\] needs 8/],
    [
      'a packed dtype that ends inside a byte',
      rawFile({ a: { ...f32([3], 0, 1), dtype: 'F4' } }, 1),
      /is too large or not a whole number of bytes/,
    ],
    ['overlap', rawFile({ a: f32([2], 0, 8), b: f32([1], 4, 8) }, 8), /tensor "b" overlaps tensor "a"/],
    ['the same bytes twice', rawFile({ a: f32([1], 0, 4), b: f32([1], 0, 4) }, 4), /tensor "b" overlaps tensor "a"/],
    ['gap before the first tensor', rawFile({ a: f32([1], 4, 8) }, 8), /4 bytes between the header and tensor "a"/],
    [
      'gap between tensors',
      rawFile({ a: f32([1], 0, 4), b: f32([1], 8, 12) }, 12),
      /4 bytes between tensor "a" and tensor "b"/,
    ],
    ['bytes at the end', rawFile({ a: f32([1], 0, 4) }, 9), /5 bytes after tensor "a"/],
    ['data without a tensor', rawFile({}, 1), /1 bytes after the header/],
    ['metadata that is not an object', rawFile({ __metadata__: 'x' }, 0), /__metadata__ is not an object of strings/],
    ['metadata with numbers', rawFile({ __metadata__: { a: 1 } }, 0), /__metadata__ is not an object of strings/],
  ])('is rejected: %s', async (_, bytes, fault) => {
    expect((await rejection(bytes)).message).toMatch(fault)
  })

  it('gets an error message of limited length', async () => {
    const name = 'n'.repeat(1e6)
    const error = await rejection(rawFile({ [name]: f32(Array(1e5).fill(-1), 0, 4) }, 4))
    expect(error.message.length).toBeLessThan(1000)
  })

  it('is rejected if it is a folder, a device, or missing', async () => {
    const folder = await temporaryFolder()
    await mkdir(`${folder}/model.safetensors`)
    await expect(readSafetensors(`${folder}/model.safetensors`)).rejects.toThrow(/expected a file, got a folder/)
    await expect(readSafetensors(`${folder}/none.safetensors`)).rejects.toThrow(
      /none.safetensors: opening failed: no such/,
    )
    if (process.platform !== 'win32') {
      await expect(readSafetensors('/dev/zero')).rejects.toThrow(/not a regular file/)
    }
  })

  it('with any bytes changed gives E_CHECKPOINT, or tensors inside the file', () => {
    const good = rawFile({ a: f32([2], 0, 8), b: { dtype: 'BF16', shape: [1, 3], data_offsets: [8, 14] } }, 14)
    const edits = fc.array(fc.tuple(fc.nat(good.length - 1), fc.nat(255)), { minLength: 1, maxLength: 4 })
    fc.assert(
      fc.property(edits, fc.option(fc.nat(good.length)), (changes, cut) => {
        const bytes = good.slice(0, cut ?? good.length)
        for (const [at, value] of changes) if (at < bytes.length) bytes[at] = value
        expectValidOrRejected(bytes)
      }),
      { numRuns: 2000 },
    )
  })

  it('with any JSON values as fields gives E_CHECKPOINT, or tensors inside the file', () => {
    const size = fc.oneof(fc.nat(20), fc.constantFrom(-1, 0.5, 2 ** 53, 1e300, null, '4'))
    const entry = fc.record(
      {
        dtype: fc.oneof(fc.constantFrom('F32', 'U8', 'F4', 'BF16', 'toString'), fc.jsonValue()),
        shape: fc.oneof(fc.array(size, { maxLength: 3 }), fc.jsonValue()),
        data_offsets: fc.oneof(fc.tuple(size, size), fc.jsonValue()),
      },
      { requiredKeys: [] },
    )
    const header = fc.dictionary(
      fc.oneof(fc.string(), fc.constantFrom('__proto__', '__metadata__')),
      fc.oneof(entry, fc.jsonValue()),
    )
    fc.assert(
      fc.property(header, fc.nat(20), (value, data) => expectValidOrRejected(rawFile(value, data))),
      { numRuns: 2000 },
    )
  })
})

/** Expects either E_CHECKPOINT or tensors that cover the data without overlap. */
function expectValidOrRejected(bytes: Uint8Array): void {
  try {
    const length = headerLength('x', bytes.subarray(0, 8), bytes.length, 1 << 20)
    const { entries } = parseHeader('x', bytes.subarray(8, 8 + length), bytes.length)
    let covered = 8 + length
    for (const { begin, bytes: size, dtype, shape } of entries.values()) {
      expect(begin).toBeGreaterThanOrEqual(8 + length)
      expect(begin + size).toBeLessThanOrEqual(bytes.length)
      expect(size).toBe(storedBytes(dtype, shape))
      covered += size
    }
    expect(covered).toBe(bytes.length)
  } catch (error) {
    if (!isMoeError(error, 'E_CHECKPOINT')) throw error
  }
}

describe('an unusual but valid header', () => {
  it('may end with the file', async () => {
    await using file = await readSafetensors(await temporaryFile(rawFile({}, 0)))
    expect(file.keys()).toEqual([])
  })

  it.each(storedNames())('may contain %s, whose name is that of its size', name => {
    const dtype = dtypeOfName(name) as StoredDType
    const bits = Number(/\d+/.exec(name)?.[0] ?? 8) // BOOL has 8.
    expect([storedName(dtype), storedBits(dtype), storedBytes(dtype, [3, 8])]).toEqual([name, bits, 3 * bits])
  })

  it('may list tensors in any order, share an offset with an empty tensor, and contain unknown fields', () => {
    const bytes = rawFile(
      { b: f32([1], 8, 12), a: { ...f32([2], 0, 8), note: 'x' }, none: f32([0, 3], 0, 0), last: f32([0], 12, 12) },
      12,
    )
    const { entries } = parseHeader('x', bytes.subarray(8, bytes.length - 12), bytes.length)
    expect([...entries.keys()]).toEqual(['none', 'a', 'b', 'last'])
  })
})

describe('encodeHeader', () => {
  it('returns a header that parses to the same entries and ends at a multiple of 8 bytes', () => {
    const dtype = fc.constantFrom<StoredDType>('f64', 'f32', 'bf16', 'f16', 'f8e4m3', 'i64', 'u8', 'bool')
    const entry = fc.record({ name: fc.string({ unit: 'grapheme', minLength: 1 }), dtype, shape: fc.array(fc.nat(9)) })
    const entries = fc.uniqueArray(entry, { selector: e => e.name })
    const metadata = fc.dictionary(fc.string(), fc.string())
    fc.assert(
      fc.property(entries, metadata, (list, text) => {
        const planned = list
          .filter(({ name }) => name !== '__metadata__')
          .map(e => ({ ...e, bytes: storedBytes(e.dtype, e.shape) }))
        const data = planned.reduce((sum, e) => sum + e.bytes, 0)
        const bytes = encodeHeader(planned, text)
        expect(bytes.length % 8).toBe(0)
        const header = parseHeader('x', bytes.subarray(8), bytes.length + data)
        expect(header.metadata).toEqual(text)
        expect(header.entries.size).toBe(planned.length)
        for (const { name, dtype: wanted, shape } of planned) {
          expect(header.entries.get(name)).toMatchObject({ dtype: wanted, shape })
        }
      }),
    )
  })
})
