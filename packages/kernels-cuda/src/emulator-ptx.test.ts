/**
 * @file Runs kernels written in PTX on the emulator: compares the instructions that are not C++ operators, as translated by scripts/ptx/, with their
 * definition in "Parallel Thread Execution ISA".
 */
import { fromF8e4m3, fromF16, toF8e4m3 } from '@moe/core'
import { afterEach, describe, expect, test } from 'vitest'
import { openEmulator, unbuilt } from './test-emulator.ts'

const bitsOf = (x: number) => new Int32Array(Float32Array.of(x).buffer)[0]!
const floatOf = (word: number) => new Float32Array(Int32Array.of(word).buffer)[0]!

describe.skipIf(unbuilt)('translated PTX', () => {
  const device = openEmulator()
  afterEach(() => device.reset())

  /** Runs one block and returns the 32-bit words of each thread. */
  const run = (
    name: string,
    threads: number,
    signature: string,
    args: (out: number) => ReadonlyArray<number | Uint8Array>,
    words: number,
    shared = 0,
  ) => {
    const out = device.allocate(threads * words * 4)
    const launched = device.launch(name, 1, threads, signature, args(out), { shared })
    expect({ status: launched || device.synchronize(), report: device.report() }).toEqual({ status: 0, report: '' })
    const values = device.download(out, Int32Array, threads * words)
    return Array.from({ length: threads }, (_, i) => Array.from(values.subarray(i * words, (i + 1) * words)))
  }

  test('computes integer bit instructions as defined', () => {
    const words = [0, 1, -1, 7, 0x12345678, -0x80000000, 0x7fffffff, -123456789]
    const lines = words.flatMap((a, i) =>
      [0, 5, 31, 32, 40].map((n, j) => [a, words[(i + j) % words.length]!, n] as const),
    )
    const upload = device.upload(Int32Array.from(lines.flat()))
    const got = run('moe_test_ptx_bits', lines.length, 'p p', out => [upload, out], 16)
    for (const [i, [a, b, n]] of lines.entries()) {
      const wide = (x: number) => BigInt.asUintN(32, BigInt(x))
      const word = (x: bigint) => Number(BigInt.asIntN(32, x))
      const bit = (x: number, at: number) => (at > 31 ? 0n : (wide(x) >> BigInt(at)) & 1n)
      const field = (signed: boolean) => {
        // 9 bits from n on; bits beyond the register are zero, or the sign.
        const sign = signed ? bit(a, Math.min(n + 8, 31)) : 0n
        let value = 0n
        for (let k = 0; k < 32; k++) value |= (k < 9 && n + k <= 31 ? bit(a, n + k) : sign) << BigInt(k)
        return word(value)
      }
      let inserted = wide(b)
      for (let k = 0; k < 7 && n + k < 32; k++)
        inserted = (inserted & ~(1n << BigInt(n + k))) | (bit(a, k) << BigInt(n + k))
      // 29779 is 0x7453: bytes 3, 5, 4 and 7 of the eight.
      const bytes = Array.from({ length: 8 }, (_, k) => Number((((wide(b) << 32n) | wide(a)) >> BigInt(8 * k)) & 255n))
      const leading = Math.clz32(a)
      const product = BigInt.asUintN(64, wide(a) * wide(b) - 1n)
      expect(got[i], `${a} ${b} ${n}`).toEqual([
        n > 31 ? 0 : a << n,
        word(inserted),
        n > 31 ? 0 : (a >>> n) | 0,
        a >> Math.min(n, 31),
        field(false),
        field(true),
        bytes[3]! | (bytes[5]! << 8) | (bytes[4]! << 16) | (bytes[7]! << 24),
        word(BigInt(`0b${wide(a).toString(2).padStart(32, '0').split('').reverse().join('')}`)),
        a === 0 ? -1 : leading,
        leading,
        wide(a).toString(2).replaceAll('0', '').length,
        word((BigInt(a) * BigInt(b)) >> 32n),
        word((wide(a) * wide(b)) >> 32n),
        word(product),
        word(product >> 32n),
        Math.min(a, b),
      ])
    }
  })

  test('computes floating-point instructions as defined', () => {
    const values = [
      0,
      -0,
      1,
      -1,
      0.5,
      2.5,
      -2.5,
      0.3,
      1e-40,
      3e9,
      -3e9,
      7.25,
      200.1,
      Number.NaN,
      Number.POSITIVE_INFINITY,
      Number.NEGATIVE_INFINITY,
    ]
    const lines = values.flatMap((a, i) => [0, 1, 3].map(j => [a, values[(i + j) % values.length]!] as const))
    const upload = device.upload(Float32Array.from(lines.flat()))
    const got = run('moe_test_ptx_floats', lines.length, 'p p', out => [upload, out], 16)
    const integer = (x: number) => (Number.isNaN(x) ? 0 : Math.max(-(2 ** 31), Math.min(2 ** 31 - 1, x)))
    const even = (x: number) => {
      const low = Math.floor(x)
      return x - low > 0.5 || (x - low === 0.5 && low % 2 !== 0) ? low + 1 : low
    }
    const down = (exact: number) => {
      const near = Math.fround(exact)
      return near > exact ? floatOf(bitsOf(near) - 1) : near
    }
    const smaller = (a: number, b: number) => (Number.isNaN(a) ? b : Number.isNaN(b) ? a : Math.min(a, b))
    const bf16 = (x: number) => {
      if (Number.isNaN(x)) return 0x7fff
      const word = bitsOf(x) >>> 0
      return Math.floor((word + 0x7fff + ((word >>> 16) & 1)) / 65536) & 0xffff
    }
    for (const [i, [x, y]] of lines.entries()) {
      const [a, b] = [Math.fround(x), Math.fround(y)]
      const [word] = [got[i]!]
      const label = `${a} ${b}`
      const isNan = Number.isNaN(a) || Number.isNaN(b)
      expect(word.slice(0, 2), label).toEqual([integer(Math.trunc(a)) | 0, integer(even(a)) | 0])
      expect(floatOf(word[2]!), label).toBe(Math.floor(a))
      expect(floatOf(word[3]!), label).toBe(a > 0 ? Math.min(a, 1) : 0)
      expect(floatOf(word[4]!), label).toBe(smaller(a, b))
      expect(floatOf(word[5]!), label).toBe(-smaller(-a, -b))
      expect(word[6]! & 0x7fffffff, label).toBe(bitsOf(b) & 0x7fffffff)
      if (!Number.isNaN(a)) expect(word[6]! < 0, label).toBe(a < 0 || Object.is(a, -0))
      // Products of these numbers and the sum are exact in f64 if they are below 2^53.
      if (Math.abs(a * b) < 2 ** 25) expect(floatOf(word[7]!), label).toBe(down(a * b + 12582913))
      const [ordered, unordered] = [a < b, isNan || a < b]
      expect(word[8], label).toBe((ordered ? 1 : 0) + (unordered ? 10 : 0) + (!isNan && a !== b ? 0 : 100))
      expect(word[9], label).toBe(unordered ? 1 : 0)
      const differ = isNan || a !== b
      expect(word[10], label).toBe(
        (differ && isNan ? 1 : 0) | (differ || isNan ? 2 : 0) | (differ !== isNan ? 4 : 0) | (differ ? 0 : 8),
      )
      expect(floatOf(word[11]!), label).toBe(Math.max(a, b))
      // The first operand is the upper half.
      const pair = bf16(b) | (bf16(a) << 16)
      expect(word[12], label).toBe(pair)
      if (!Number.isNaN(a)) expect(floatOf(word[13]!), label).toBe(Math.f16round(a))
      expect(word[14], label).toBe((pair >>> 16) | (pair << 16))
      expect(floatOf(word[15]!), label).toBe(-Math.abs(a))
    }
  })

  test('converts to and from f8e4m3 as defined', () => {
    // Every value, the middles between neighbours, and numbers just beside those.
    const codes = Array.from({ length: 127 }, (_, code) => fromF8e4m3(code))
    const middles = codes
      .slice(1)
      .flatMap((x, i) => [-1, 0, 1].map(step => floatOf(bitsOf((x + codes[i]!) / 2) + step)))
    const magnitudes = [...codes, ...middles, 463, 464, 465, 1e30, 1e-40, Number.POSITIVE_INFINITY, Number.NaN]
    const values = magnitudes.flatMap(x => [x, -x])
    for (let first = 0; first < values.length; first += 128) {
      const pairs = values.slice(first, first + 128)
      const threads = pairs.length / 2
      const got = run('moe_test_ptx_fp8', threads, 'p p', out => [device.upload(Float32Array.from(pairs)), out], 2)
      for (const [i, words] of got.entries()) {
        const [a, b] = [pairs[2 * i]!, pairs[2 * i + 1]!]
        // The first operand is the upper byte. NaN has no sign.
        const code = (x: number) => (Number.isNaN(x) ? 0x7f : toF8e4m3(x))
        expect(words[0], `${a} ${b}`).toBe((code(a) << 8) | code(b))
        const [high, low] = [fromF16(words[1]! >>> 16), fromF16(words[1]! & 0xffff)]
        expect([high, low], `${a} ${b}`).toEqual([fromF8e4m3(code(a)), fromF8e4m3(code(b))])
      }
    }
  })

  test('computes warp-wide instructions as defined', () => {
    const input = Int32Array.from({ length: 32 }, (_, i) => i * 37 + 1)
    const upload = device.upload(input)
    const got = run('moe_test_ptx_lanes', 32, 'p p', out => [upload, out], 12)
    const large = input.filter(x => x > 100).length
    let ballot = 0
    for (const [i, x] of input.entries()) if (x > 100) ballot |= 1 << i
    for (let lane = 0; lane < 32; lane++) {
      // Segments of 8 lanes for up, down and idx.
      const first = lane & 24
      const up = lane - 3 >= first
      const down = lane + 3 <= first + 7
      expect(got[lane], `lane ${lane}`).toEqual([
        input[up ? lane - 3 : lane],
        input[down ? lane + 3 : lane],
        input[lane ^ 5],
        input[first + 1],
        (up ? 1 : 0) | (down ? 2 : 0) | 4 | 8,
        ballot,
        1 | 4,
        large,
        1,
        up ? 1 : 0,
        (Math.max(lane, 1) * (Math.max(lane, 1) - 1)) / 2,
        lane,
      ])
    }
  })

  test('reports a read-only load of memory that the launch has written', () => {
    const out = device.upload(new Int32Array(1))
    expect(device.launch('moe_test_ptx_constant', 1, 1, 'p', [out]) || device.synchronize()).toBe(719)
    expect(device.report()).toContain('which this launch has written: __restrict__ is wrong')
  })

  test('accesses state spaces and parameters', () => {
    const block = new Uint8Array(128)
    block.set(new Uint8Array(Int32Array.of(11, 22, 33, 44).buffer))
    const [word] = run('moe_test_ptx_memory', 1, 'p b f', out => [out, block, 1.5], 12, 64)
    expect(word).toEqual([33 - 3, 22, bitsOf(1.5), 5, 77, 22, 33, 77, 0x7fffffff, -1, -1, 33])
  })
})
