import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { unpackInt4 } from './packed-int4.ts'
import { readF32 } from './read-f32.ts'
import { readSafetensors, type TensorSource } from './read-safetensors.ts'
import { fixture, temporaryFolder } from './test-files.ts'
import { type TensorEntry, writeSafetensors } from './write-safetensors.ts'

const cases = [
  ['group', 32, [6, 96]],
  ['group-incomplete-words', 12, [4, 36]],
  ['channel', null, [5, 40]],
] as const

/** One case of the fixture. */
async function open(name: string): Promise<TensorSource> {
  const file = await readSafetensors(fixture('packed-weights.safetensors'))
  const prefix = `${name}.`
  const of = (key: string) => `${prefix}${key}`
  return {
    path: file.path,
    metadata: file.metadata,
    keys: () =>
      file
        .keys()
        .filter(key => key.startsWith(prefix))
        .map(key => key.slice(prefix.length)),
    has: key => file.has(of(key)),
    info: key => file.info(of(key)),
    read: key => file.read(of(key)),
    close: () => file.close(),
    [Symbol.asyncDispose]: () => file.close(),
  }
}

describe('packed 4-bit weights', () => {
  it.each(cases)('have the values of compressed-tensors: %s', async (name, group, shape) => {
    await using stored = await open(name)
    const expected = (await stored.read('expected')).data
    await using source = unpackInt4(stored, group)
    expect(source.keys().sort()).toEqual(['expected', 'weight'])
    expect(source.info('weight')).toMatchObject({ dtype: 'f32', shape, bytes: 4 * shape[0] * shape[1] })
    expect([source.has('weight'), source.has('weight_packed'), source.has('weight_scale')]).toEqual([
      true,
      false,
      false,
    ])
    expect(await readF32(source, 'weight')).toEqual({ shape, data: expected })
    expect(await source.read('expected')).toEqual(await stored.read('expected'))
  })

  it.each(cases)('are read as codes and scales: %s', async (name, group, [rows, columns]) => {
    await using source = unpackInt4(await open(name), group)
    const expected = (await source.read('expected')).data as Float32Array
    const weight = await source.readInt4('weight')
    if (weight === undefined) throw new Error('no codes')
    expect(weight.shape).toEqual([rows, columns])
    const size = group ?? columns
    expect(weight.scale.length).toBe((rows * columns) / size)
    const codes = Array.from(expected, (_, i) => {
      const [row, column] = [Math.floor(i / columns), i % columns]
      const byte = weight.q[row * Math.ceil(columns / 2) + (column >> 1)]
      return (column % 2 === 0 ? byte & 15 : byte >> 4) - 8
    })
    expect([Math.min(...codes), Math.max(...codes)]).toEqual([-8, 7])
    expect(Float32Array.from(codes, (code, i) => code * weight.scale[Math.floor(i / size)])).toEqual(expected)
    expect(await source.readInt4('expected')).toBeUndefined()
  })

  // Those of the fixture are all the same.
  it('have one scale per group', async () => {
    const path = join(await temporaryFolder(), 'a.safetensors')
    await writeSafetensors(path, [
      { name: 'w_packed', dtype: 'i32', shape: [2, 3], data: new Int32Array(6).fill(0x99999999) }, // Ones.
      { name: 'w_scale', dtype: 'f32', shape: [2, 2], data: Float32Array.of(1, 2, 3, 4) },
    ])
    await using source = unpackInt4(await readSafetensors(path), 12)
    const expected = Float32Array.from({ length: 48 }, (_, i) => 1 + Math.floor(i / 12))
    expect(await source.read('w')).toMatchObject({ shape: [2, 24], data: expected })
  })

  const packed = (words: number, scales: number[], more: TensorEntry[] = []): TensorEntry[] => [
    { name: 'w_packed', dtype: 'i32', shape: [2, words], data: new Int32Array(2 * words) },
    { name: 'w_scale', dtype: 'f32', shape: scales, data: new Float32Array(scales.reduce((a, b) => a * b, 1)) },
    ...more,
  ]
  it.each<[string, TensorEntry[], number | null, RegExp]>([
    [
      'fewer scales than groups',
      packed(8, [2, 1]),
      32,
      /shape \[2, 8\] does not fit scales of shape \[2, 1\] with groups of 32/,
    ],
    ['scales of other rows', packed(4, [1, 1]), 32, /does not fit scales of shape \[1, 1\]/],
    ['scales without axes', packed(4, []), 32, /does not fit scales of shape \[\]/],
    ['several scales per row', packed(4, [2, 2]), null, /does not fit scales of shape \[2, 2\] with one scale per row/],
    ['huge groups', packed(4, [2, 1]), Number.MAX_SAFE_INTEGER, /does not fit/],
    ['no scales', packed(4, [2, 1]).slice(0, 1), 32, /"w_packed" has no scales; add the tensor "w_scale"/],
    [
      'codes of another dtype',
      [{ name: 'w_packed', dtype: 'u8', shape: [2, 4], data: new Uint8Array(8) }, ...packed(4, [2, 1]).slice(1)],
      32,
      /of dtype u8/,
    ],
  ])('are rejected with %s', async (_, entries, group, message) => {
    const path = join(await temporaryFolder(), 'a.safetensors')
    await writeSafetensors(path, entries)
    await using file = await readSafetensors(path)
    expect(() => unpackInt4(file, group)).toThrow(
      expect.objectContaining({ code: 'E_CHECKPOINT', message: expect.stringMatching(message) }),
    )
  })

  it('are rejected if they say that they have another shape', async () => {
    const path = join(await temporaryFolder(), 'a.safetensors')
    const shape: TensorEntry = { name: 'w_shape', dtype: 'i64', shape: [2], data: BigInt64Array.of(2n, 31n) }
    await writeSafetensors(path, packed(4, [2, 1], [shape]))
    await using file = await readSafetensors(path)
    await expect(unpackInt4(file, 32).read('w')).rejects.toMatchObject({
      code: 'E_CHECKPOINT',
      message: expect.stringMatching(/"w_shape" is \[2, 31\], but the codes and scales have the shape \[2, 32\]/),
    })
  })
})

it('fp8 weights of compressed-tensors have its values', async () => {
  for (const [name, block] of [
    ['fp8-tensor', null],
    ['fp8-channel', [1, Number.MAX_SAFE_INTEGER]],
    ['fp8-block', [4, 8]],
  ] as const) {
    await using stored = await open(name)
    const source: TensorSource = {
      ...stored,
      has: key => stored.has(key.replace('_scale_inv', '_scale')),
      info: key => stored.info(key.replace('_scale_inv', '_scale')),
      read: key => stored.read(key.replace('_scale_inv', '_scale')),
    }
    const { data } = await readF32(source, 'weight', { block })
    expect([name, data]).toEqual([name, (await stored.read('expected')).data])
  }
})
