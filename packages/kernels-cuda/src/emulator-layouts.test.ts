/**
 * @file Compares the layouts of elements in registers and shared memory with an independent source: layouts, descriptors and offsets as CuTe (CUTLASS 4.7)
 * prints them for the same instructions and tiles.
 */
import koffi from 'koffi'
import { afterEach, describe, expect, test } from 'vitest'
import { openEmulator, unbuilt } from './test-emulator.ts'

type Tree = number | readonly Tree[]
const sizeOf = (shape: Tree): number =>
  typeof shape === 'number' ? shape : shape.reduce<number>((n, s) => n * sizeOf(s), 1)
const offsetOf = (shape: Tree, stride: Tree, index: number): number => {
  if (typeof shape === 'number') return index * (stride as number)
  let rest = index
  return shape.reduce<number>((sum, inner, i) => {
    const at = rest % sizeOf(inner)
    rest = Math.floor(rest / sizeOf(inner))
    return sum + offsetOf(inner, (stride as readonly Tree[])[i], at)
  }, 0)
}
/** Parses CuTe's notation of a layout, shape:stride, to a function of two coordinates. */
function layout(text: string) {
  const [shape, stride] = text
    .split(':')
    .map(part => JSON.parse(part.replaceAll('(', '[').replaceAll(')', ']')) as Tree[])
  return (i: number, j: number) => offsetOf(shape[0], stride[0], i) + offsetOf(shape[1], stride[1], j)
}
/** Sw<3,4,3> on the byte address of a 2-byte element. */
const swizzled = (element: number) => (element * 2) ^ ((((element * 2) >> 7) & 7) << 4)

/** Tiles of 64 k, by outer index and k. CuTe's names: Layout_K_SW128_Atom, Layout_MN_SW128_Atom; [outer, k, byte] are single elements. */
const tiles = {
  along64: {
    at: layout('((8,8),(64,1)):((64,512),(1,0))'),
    elements: [
      [0, 8, 16],
      [1, 0, 144],
      [1, 9, 130],
      [3, 20, 408],
      [7, 63, 910],
      [8, 0, 1024],
      [13, 37, 1690],
      [42, 5, 5418],
      [63, 63, 8078],
    ],
  },
  along128: {
    at: layout('((8,16),(64,1)):((64,512),(1,0))'),
    elements: [
      [1, 9, 130],
      [8, 0, 1024],
      [13, 37, 1690],
      [63, 63, 8078],
      [100, 50, 12836],
      [127, 33, 16306],
    ],
  },
  across64: {
    at: layout('((64,1),(8,8)):((1,0),(64,512))'),
    elements: [
      [0, 8, 1024],
      [1, 0, 2],
      [1, 9, 1170],
      [3, 20, 2630],
      [7, 63, 8190],
      [8, 0, 16],
      [13, 37, 4810],
      [42, 5, 644],
      [63, 63, 8078],
    ],
  },
  across128: {
    at: layout('((64,2),(8,8)):((1,4096),(64,512))'),
    elements: [
      [1, 9, 1170],
      [13, 37, 4810],
      [63, 63, 8078],
      [100, 50, 14696],
      [127, 33, 12526],
    ],
  },
} as const
type Tile = keyof typeof tiles
const byteOf = (tile: Tile, outer: number, k: number) => swizzled(tiles[tile].at(outer, k))

/** Small integers, which all formats represent exactly. */
const a = (row: number, k: number) => ((row * 7 + k * 3) % 11) - 5
const b = (row: number, k: number) => ((row * 5 + k * 2) % 13) - 6
const product = (row: number, column: number, from: number, depth: number) => {
  let sum = 0
  for (let k = from; k < from + depth; k++) sum += a(row, k) * b(column, k)
  return sum
}
const word = new Uint32Array(1)
const float32 = (x: number) => {
  new Float32Array(word.buffer)[0] = x
  return word[0]
}
const bf16 = (x: number) => float32(x) >>> 16

describe.skipIf(unbuilt)('layouts match those of CuTe', () => {
  const device = openEmulator()
  device.set('capability', 90)
  afterEach(() => device.reset())

  const launch = (
    name: string,
    threads: number,
    signature: string,
    args: ReadonlyArray<number | Uint8Array>,
    shared = 0,
  ) => {
    const launched = device.launch(name, 1, threads, signature, args, { shared })
    expect({ status: launched || device.synchronize(), report: device.report() }).toEqual({ status: 0, report: '' })
  }
  const uploadHalves = (halves: Uint16Array) => device.upload(new Int32Array(halves.buffer))
  const imageOf = (tile: Tile, outer: number, f: (outer: number, k: number) => number) => {
    const image = new Uint16Array(outer * 64)
    for (let o = 0; o < outer; o++) for (let k = 0; k < 64; k++) image[byteOf(tile, o, k) / 2] = bf16(f(o, k))
    return image
  }

  test.each(Object.keys(tiles) as Tile[])('the parsed layout of the tile %s has the listed elements', tile => {
    for (const [outer, k, byte] of tiles[tile].elements) expect(byteOf(tile, outer, k)).toBe(byte)
  })

  // A box of 64 columns: the columns are k if K-major, and outer indices if MN-major.
  test.each<[Tile, number]>([
    ['along64', 64],
    ['along128', 128],
    ['across64', 64],
  ])('a box that is copied with a swizzle of 128 bytes is the tile %s', (tile, rows) => {
    const across = tile === 'across64'
    const matrix = Uint16Array.from({ length: rows * 64 }, (_, i) => i)
    const room = new ArrayBuffer(256)
    const address = Number(koffi.address(room as never))
    const map = new Uint8Array(room, -address & 127, 128)
    const arrays = [
      BigUint64Array.of(64n, BigInt(rows), 1n),
      BigUint64Array.of(128n, BigInt(rows * 128)),
      Uint32Array.of(64, rows, 1),
      Uint32Array.of(1, 1, 1),
    ]
    const pointers = arrays.map(array => Number(koffi.address(array as never)))
    const bfloat16 = 9
    expect(
      device.call(
        'cuTensorMapEncodeTiled',
        address + map.byteOffset,
        bfloat16,
        3,
        uploadHalves(matrix),
        ...pointers,
        0,
        3,
        3,
        0,
      ),
    ).toBe(0)
    const image = device.allocate(rows * 128)
    launch('moe_test_box_image', 32, 'p t i', [image, map.slice(), rows * 128], rows * 128 + 1024)
    const found = new Uint16Array(device.download(image, Int32Array, rows * 32).buffer)
    const expected = new Uint16Array(rows * 64)
    for (let row = 0; row < rows; row++)
      for (let column = 0; column < 64; column++)
        expected[byteOf(tile, across ? column : row, across ? row : column) / 2] = matrix[row * 64 + column]
    expect(found).toEqual(expected)
  })

  const descriptors = (rows: number, row: number, k: number) => {
    const [along, across] = [device.allocate(8), device.allocate(8)]
    launch('moe_test_descriptors', 1, 'p p i i i', [along, across, rows, row, k], 1024 + 128)
    return [along, across].map(at => new BigUint64Array(device.download(at, Int32Array, 2).buffer)[0])
  }
  /** make_gmma_desc<Major::K> at address 0, for the tile with that many rows, by first row and k. */
  test.each([
    [256, 0, 0, 0x4000004000010000n],
    [256, 0, 48, 0x4000004000010006n],
    [128, 64, 16, 0x4000004000010202n],
    [128, 0, 64, 0x4000004000010400n],
    [128, 0, 176, 0x4000004000010806n],
    [128, 64, 112, 0x4000004000010606n],
    [64, 0, 64, 0x4000004000010200n],
    [64, 0, 368, 0x4000004000010a06n],
    [64, 0, 560, 0x4000004000011006n],
  ])('descriptors of K-major tiles: %i rows, from (%i, %i) on', (rows, row, k, descriptor) => {
    expect(descriptors(rows, row, k)[0]).toBe(descriptor)
  })
  /** make_gmma_desc<Major::MN> for the tile with that many k, by first column and k. (With only 64 columns, CuTe sets no stride to the next 64.) */
  test.each([
    [64, 0, 0, 0x4000004002000000n],
    [64, 0, 48, 0x4000004002000180n],
    [64, 256, 16, 0x4000004002000880n],
    [128, 0, 112, 0x4000004004000380n],
  ])('descriptors of MN-major tiles: %i of k, from column %i, k %i on', (rows, column, k, descriptor) => {
    expect(descriptors(rows, column, k)[1]).toBe(descriptor)
  })

  /** CLayout of SM90_64x128x16_F32BF16BF16: the position row + 64 column of a thread's accumulators; and ALayout_64x16 of the A operand in registers. */
  const sumsOfGroup = layout('((4,8,4),(2,2,16)):((128,1,16),(64,8,512))')
  const leftOfGroup = layout('((4,8,4),(2,2,2)):((128,1,16),(64,8,512))')
  test.each([
    ['along', 0x10000, 2, 0x10000, 2, 'shared memory'],
    ['across', 0, 0x80, 0x2000000, 0x80, 'shared memory'],
    ['along', 0, 0, 0x10000, 2, 'registers'],
    ['across', 0, 0, 0x2000000, 0x80, 'registers'],
  ])('products of a warpgroup, k %s memory (%#)', (form, left, leftStep, right, rightStep, where) => {
    const high = 0x40000040
    const images = [imageOf(`${form}64` as Tile, 64, a), imageOf(`${form}128` as Tile, 128, b)].map(uploadHalves)
    const d = device.allocate(128 * 64 * 4)
    for (let step = 0; step < 4; step++) {
      const k = step * 16
      if (where === 'registers') {
        const registers = new Uint16Array(128 * 8)
        for (let t = 0; t < 128; t++)
          for (let v = 0; v < 8; v++)
            registers[t * 8 + v] = bf16(a(leftOfGroup(t, v) % 64, k + Math.floor(leftOfGroup(t, v) / 64)))
        images[0] = uploadHalves(registers)
      }
      const args = [
        d,
        ...images,
        left + step * leftStep,
        high,
        right + step * rightStep,
        high,
        Number(where === 'registers'),
      ]
      launch(`moe_test_operand_images_${form}`, 128, 'p p p i i i i i', args, 8192 + 16384 + 1024)
      const found = device.download(d, Float32Array, 128 * 64)
      const expected = Float32Array.from({ length: 128 * 64 }, (_, i) => {
        const place = sumsOfGroup(Math.floor(i / 64), i % 64)
        return product(place % 64, Math.floor(place / 64), k, 16)
      })
      expect(found).toEqual(expected)
    }
  })

  /** A, B and C of SM80_16x8x16_F32BF16BF16F32_TN and SM80_16x8x8_F32TF32TF32F32_TN: row + 16 k, column + 8 k, row + 16 column. */
  test.each([
    ['bf16', 16, '((4,8),(2,2,2)):((32,1),(16,8,128))', '((4,8),(2,2)):((16,1),(8,64))'],
    ['tf32', 8, '((4,8),(2,2)):((16,1),(8,64))', '((4,8),(2,1)):((8,1),(32,0))'],
  ])('products of a warp in %s', (type, depth, left, right) => {
    const registers = (text: string, rows: number, values: number, f: typeof a) => {
      const at = layout(text)
      const list = Array.from({ length: 32 * values }, (_, i) => {
        const place = at(Math.floor(i / values), i % values)
        return f(place % rows, Math.floor(place / rows))
      })
      if (type === 'bf16') return uploadHalves(Uint16Array.from(list, bf16))
      return device.upload(Int32Array.from(list, float32))
    }
    const perWord = type === 'bf16' ? 2 : 1
    const d = device.allocate(32 * 4 * 4)
    const args = [d, registers(left, 16, 4 * perWord, a), registers(right, 8, 2 * perWord, b), Number(type === 'tf32')]
    launch('moe_test_fragments', 32, 'p p p i', args)
    const sums = layout('((4,8),(2,2)):((32,1),(16,8))')
    const expected = Float32Array.from({ length: 128 }, (_, i) => {
      const place = sums(Math.floor(i / 4), i % 4)
      return product(place % 16, Math.floor(place / 16), 0, depth)
    })
    expect(device.download(d, Float32Array, 128)).toEqual(expected)
  })

  /** DstLayout of SM75_U32x4_LDSM_N and SM75_U16x8_LDSM_T, in bits of the rows that the lanes pass, 128 each. */
  test.each([
    [0, '(32,(32,4)):(32,(1,1024))'],
    [1, '((4,8),(16,2,4)):((256,16),(1,128,1024))'],
  ])('loaded matrices (transposed: %i)', (transposed, text) => {
    const at = layout(text)
    const elements = Uint16Array.from({ length: 32 * 8 }, (_, i) => i)
    const y = device.allocate(32 * 4 * 4)
    launch('moe_test_matrices', 32, 'p p i', [y, uploadHalves(elements), transposed])
    const found = new Uint16Array(device.download(y, Int32Array, 128).buffer)
    expect(found).toEqual(Uint16Array.from({ length: 32 * 8 }, (_, i) => at(Math.floor(i / 8), (i % 8) * 16) / 16))
  })
})
