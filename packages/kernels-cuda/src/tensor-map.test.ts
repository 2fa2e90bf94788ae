import { expect, test } from 'vitest'
import { type BoxedMatrices, mapAlignment, tensorMaps } from './tensor-map.ts'
import { FakeDriver } from './test-driver.ts'

/** The arguments of cuTensorMapEncodeTiled, with arrays as numbers. */
function described(matrices: BoxedMatrices): Array<number | number[]> {
  const fake = new FakeDriver()
  let found: Array<number | number[]> = []
  fake.on('cuTensorMapEncodeTiled', (...args) => {
    found = args.map(arg => (typeof arg === 'number' ? arg : Array.from(arg as Uint32Array | BigUint64Array, Number)))
    return 0
  })
  tensorMaps(fake.driver)(matrices)
  return found
}

const matrices = { pointer: 2 ** 40, columns: 100, rows: 30, matrices: 5, ld: 104, boxRows: 64 }

test.each([
  ['bf16', 2, 9, [208, 30 * 208], [64, 64, 1]],
  ['f8e4m3', 1, 0, [104, 30 * 104], [128, 64, 1]],
] as const)('a tensor map of %s has sizes in elements and strides in bytes', (_, elementBytes, type, strides, box) => {
  const [map, ...rest] = described({ ...matrices, elementBytes })
  expect((map as number) % mapAlignment).toBe(0)
  // No interleave, swizzle of 128 bytes, promotion to 256 bytes, zeros outside.
  expect(rest).toEqual([type, 3, 2 ** 40, [100, 30, 5], [...strides], [...box], [1, 1, 1], 0, 3, 3, 0])
})

test('bf16 is the default, and each map is a copy', () => {
  const fake = new FakeDriver()
  const make = tensorMaps(fake.driver)
  const [start, buffer] = [...fake.buffers][0]
  let types = 0
  fake.on('cuTensorMapEncodeTiled', (map, type) => {
    new Uint32Array(buffer, (map as number) - start, 32).fill(++types)
    expect(type).toBe(9)
    return 0
  })
  const maps = [make(matrices), make(matrices)]
  expect(maps.map(map => [map.length, map[0], map[31]])).toEqual([
    [32, 1, 1],
    [32, 2, 2],
  ])
  fake.on('cuTensorMapEncodeTiled', () => 1)
  expect(() => make(matrices)).toThrow(/matrices 5 x 30 x 100/)
})
