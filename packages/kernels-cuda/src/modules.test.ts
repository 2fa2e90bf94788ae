/** @file How kernels are loaded and their arguments packed, on a driver that keeps books. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeEach, describe, expect, test } from 'vitest'
import type { Device } from './driver/device.ts'
import { type Launch, Modules } from './modules.ts'
import { FakeDriver } from './test-driver.ts'

const folder = mkdtempSync(join(tmpdir(), 'moe-modules-'))
afterAll(() => rmSync(folder, { recursive: true }))
for (const name of ['fill', 'one', 'two']) writeFileSync(join(folder, `${name}.fatbin`), name)

const device = { name: 'GPU', capability: 86, driverVersion: 12040 } as Device

describe('modules', () => {
  let fake: FakeDriver
  let modules: Modules
  let launches: Launch[]
  const launch = (one: Launch) => launches.push(one)
  beforeEach(() => {
    fake = new FakeDriver()
    modules = new Modules(fake.driver, device, folder)
    launches = []
  })

  /** Packs these arguments and returns each parameter's memory, according to the list of addresses. */
  function packed(signature: string, ...args: ReadonlyArray<number | readonly number[] | Uint32Array>): DataView[] {
    modules.kernel('one', 'kernel', signature, launch)({ grid: 1, block: 32 }, ...args)
    const list = fake.buffers.get(launches.at(-1)?.arguments as number) as ArrayBufferLike
    return [...new BigUint64Array(list)].map(address => {
      const [start, buffer] = [...fake.buffers].findLast(([base]) => base <= Number(address)) as [number, ArrayBuffer]
      return new DataView(buffer, Number(address) - start)
    })
  }

  test('arguments are laid out one after another, each aligned to its size', () => {
    const map = Uint32Array.from({ length: 32 }, (_, i) => i + 1)
    const [a, b, c, d, e, f, g, h] = packed('i p f l i[3] l[2] t f', 7, 2 ** 46 + 5, 0.5, -3, [1, -2], [-1], map, 1.5)
    const places = [a, b, c, d, e, f, g, h].map(view => view.byteOffset)
    expect(places).toEqual([0, 8, 16, 24, 32, 48, 128, 256])
    expect(a.getInt32(0, true)).toBe(7)
    expect(b.getBigUint64(0, true)).toBe(2n ** 46n + 5n)
    expect(c.getFloat32(0, true)).toBe(0.5)
    expect(d.getBigInt64(0, true)).toBe(-3n)
    expect([0, 4, 8].map(at => e.getInt32(at, true))).toEqual([1, -2, 0])
    expect([0, 8].map(at => f.getBigInt64(at, true))).toEqual([-1n, 0n])
    expect(new Uint32Array(g.buffer, g.byteOffset, 32)).toEqual(map)
    expect(h.getFloat32(0, true)).toBe(1.5)
  })

  test.each([0, -1, 1, 2 ** 31, 2 ** 32 - 1, 2 ** 32, -(2 ** 32), -(2 ** 32) - 1, 2 ** 53 - 1, -(2 ** 53) + 1])(
    'the int64 %d is passed exactly',
    value => {
      expect(packed('l', value)[0].getBigInt64(0, true)).toBe(BigInt(value))
    },
  )

  test('an array that ends before a former one is padded with zeros up to its own end', () => {
    packed('i[4] i', [1, 2, 3, 4], 5)
    const [list, next] = packed('i[4] i', [6], 7)
    expect([0, 4, 8, 12].map(at => list.getInt32(at, true))).toEqual([6, 0, 0, 0])
    expect(next.getInt32(0, true)).toBe(7)
    expect([0, 8].map(at => packed('l[2]', [-1, -2])[0].getBigInt64(at, true))).toEqual([-1n, -2n])
    expect([0, 8].map(at => packed('l[2] i', [1], 5)[0].getBigInt64(at, true))).toEqual([1n, 0n])
    const [, after] = packed('p i[2] i', 1, [1], 5)
    expect([0, 4].map(at => after.getInt32(at, true))).toEqual([1, 0])
    expect(() => packed('i[2]', [1, 2, 3])).toThrow(/3 elements for an array parameter of 2/)
  })

  test.each([2 ** 31, -(2 ** 31) - 1, 0.5, Number.NaN])('the int %d is refused', value => {
    expect(() => packed('i', value)).toThrow(expect.objectContaining({ code: 'E_UNSUPPORTED' }))
    expect(packed('i', Math.trunc(2 ** 31 - 1))[0].getInt32(0, true)).toBe(2 ** 31 - 1)
  })

  test('parameters take at most 4096 bytes', () => {
    expect(packed('i[1023] i', [], 9)[1].byteOffset).toBe(4092)
    expect(() => packed('i[1024] i', [], 9)).toThrow(/take 4100 bytes/)
    expect(() => packed('i[1024]x', [])).toThrow(/invalid parameter/)
    expect(() => packed('i i', 1)).toThrow(/expected 2 arguments, got 1/)
  })

  test('grids are up to the limits of CUDA, and empty ones are not launched', () => {
    const kernel = modules.kernel('one', 'kernel', '', launch)
    const mostBlocks = [2_147_483_647, 65_535, 65_535]
    const grids = [[5], [5, 6], [...mostBlocks], [0], [1, 0], [1, 1, 0]]
    for (const grid of grids) kernel({ grid, block: 64 })
    kernel({ grid: 7, block: 64, shared: 10 })
    kernel({ grid: 0, block: 64 })
    const launched = launches.map(({ grid, block, shared }) => [...grid, block, shared])
    expect(launched).toEqual([
      [5, 1, 1, 64, 0],
      [5, 6, 1, 64, 0],
      [...mostBlocks, 64, 0],
      [7, 1, 1, 64, 10],
    ])
    for (const axis of [0, 1, 2]) {
      const grid = [1, 1, 1].map((one, i) => (i === axis ? mostBlocks[i] + 1 : one))
      expect(() => kernel({ grid, block: 1 })).toThrow(expect.objectContaining({ code: 'E_UNSUPPORTED' }))
    }
  })

  test('a kernel is loaded once, when it is first launched, and asks for shared memory only if it needs more', () => {
    const [first, second, other] = [
      modules.kernel('one', 'first', '', launch),
      modules.kernel('one', 'second', '', launch),
      modules.kernel('two', 'other', '', launch),
    ]
    first({ grid: 0, block: 1 })
    expect(fake.log).toEqual([])
    first({ grid: 1, block: 1 })
    for (const shared of [100, 50, 100, 101]) first({ grid: 1, block: 1, shared })
    second({ grid: 1, block: 1, shared: 100 })
    other({ grid: 1, block: 1 })
    expect(fake.log).toEqual([
      'load one',
      'get first',
      'first attribute 8 = 100',
      'first attribute 8 = 101',
      'get second',
      'second attribute 8 = 100',
      'load two',
      'get other',
    ])
    expect(launches.map(({ kernel }) => kernel)).toEqual([...Array(5).fill('first'), 'second', 'other'])
    expect(new Set(launches.map(one => one.function)).size).toBe(3)
    modules.dispose()
    modules.dispose()
    expect(fake.log.slice(8)).toEqual(['unload one', 'unload two'])
  })

  test('loadAll loads all kernels, and later ones at once', () => {
    modules.kernel('one', 'first', '', launch)
    modules.loadAll()
    modules.kernel('two', 'second', '', launch)
    modules.loadAll()
    expect(fake.log).toEqual(['load one', 'get first', 'load two', 'get second'])
  })

  test('a launch that fails to get its shared memory asks again', () => {
    const kernel = modules.kernel('one', 'first', '', launch)
    fake.failures.set('cuFuncSetAttribute', 1)
    expect(() => kernel({ grid: 1, block: 1, shared: 2 ** 20 })).toThrow(/asking for 1048576 bytes of shared memory/)
    kernel({ grid: 1, block: 1, shared: 100 })
    expect(fake.log.at(-1)).toBe('first attribute 8 = 100')
  })

  test.each([
    ['{ "driver": "12.4" }', undefined],
    ['{ "cuda": "12.9" }', undefined],
    ['{ "cuda": "13.0", "driver": "12.4" }', undefined],
    ['{ "driver": "12.5" }', /supports CUDA 12\.4, but the kernels need a driver for CUDA 12\.5 or later;/],
    ['{ "driver": "13.0" }', /supports CUDA 12\.4, but the kernels need a driver for CUDA 13\.0 or later \(580\)/],
    ['{ "cuda": "13.1" }', /a driver for CUDA 13\.0 or later \(580\)/],
    ['{ "driver": "x12.4" }', /contains no CUDA version/],
    ['{ "driver": "12.4-x" }', /contains no CUDA version/],
  ])('the manifest %s is checked against the driver', (manifest, message) => {
    writeFileSync(join(folder, 'manifest.json'), manifest)
    if (message === undefined) modules.probe()
    else
      expect(() => modules.probe()).toThrow(
        expect.objectContaining({ code: 'E_NO_BACKEND', message: expect.stringMatching(message) }),
      )
  })

  test.each([
    ['a corrupt file', () => fake.failures.set('cuModuleLoadData', 200), /fill\.fatbin.*corrupt/s],
    ['a missing file', () => rmSync(join(folder, 'fill.fatbin')), /cannot read .*fill\.fatbin/],
  ])('%s is reported with its path', (_, damage, message) => {
    writeFileSync(join(folder, 'manifest.json'), '{ "driver": "12.4" }')
    damage()
    expect(() => modules.probe()).toThrow(
      expect.objectContaining({ code: 'E_NO_BACKEND', message: expect.stringMatching(message) }),
    )
    writeFileSync(join(folder, 'fill.fatbin'), 'fill')
  })

  test('kernels for other devices are reported with the device', () => {
    writeFileSync(join(folder, 'manifest.json'), '{ "driver": "12.4" }')
    fake.failures.set('cuModuleLoadData', 209)
    const message = expect.stringMatching(
      /fill\.fatbin: nothing in it runs on GPU \(compute capability 8\.6\).*build-fatbins/s,
    )
    expect(() => modules.probe()).toThrow(expect.objectContaining({ code: 'E_NO_BACKEND', message }))
  })
})
