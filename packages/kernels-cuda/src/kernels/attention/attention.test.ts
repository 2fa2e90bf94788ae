import { Random, type WidePrecision } from '@moe/core'
import { afterEach, describe, expect, test } from 'vitest'
import { assertNear, exact, integers, onCpu, onCuda, output } from '../../test-against-cpu.ts'
import {
  emulatorFunction,
  onDevice,
  productVariants,
  reverseOrder,
  testBackend,
  translated,
  unavailable,
  wgmmaVariants,
} from '../../test-backend.ts'
import { schedule } from '../attention-sm90a/forward.ts'

interface Size {
  readonly name: string
  readonly B: number
  readonly T: number
  readonly S: number
  readonly H: number
  readonly G: number
  readonly Dk: number
  readonly Dv: number
  readonly causal: boolean
  /** Defaults to Dk ** -0.5. */
  readonly scale?: number
  readonly lengths?: readonly number[]
  /** The first key that query t of sequence b attends to. */
  readonly starts?: (t: number, b: number) => number
}

/** Returns the last of these positions that is not after t. */
const lastOf = (t: number, ...begins: number[]) => begins.findLast(begin => begin <= t) ?? 0

/** Returns a pseudo-random number from 0 to n - 1. */
const anyOf = (n: number, t: number, b: number) => ((t * 7919 + b * 104_729) % 65_537) % n

// Several tiles of queries and keys in every engine, with heads that fill its tiles or only a part of them.
const sizes: readonly Size[] = [
  { name: 'MLA heads', B: 1, T: 150, S: 150, H: 2, G: 2, Dk: 192, Dv: 128, causal: true },
  { name: 'MLA heads, shared', B: 1, T: 70, S: 330, H: 2, G: 1, Dk: 192, Dv: 128, causal: true, lengths: [300] },
  { name: 'MLA heads, stages reused', B: 1, T: 140, S: 660, H: 1, G: 1, Dk: 192, Dv: 128, causal: true },
  {
    name: 'a first query that attends to all but one key of a tile',
    B: 1,
    T: 10,
    S: 136,
    H: 1,
    G: 1,
    Dk: 64,
    Dv: 64,
    causal: true,
  },
  { name: 'a scale below zero', B: 1, T: 70, S: 150, H: 1, G: 1, Dk: 64, Dv: 64, causal: true, scale: -0.1 },
  { name: 'a scale of zero', B: 1, T: 70, S: 150, H: 1, G: 1, Dk: 64, Dv: 64, causal: true, scale: 0 },
  { name: 'shared key heads', B: 1, T: 70, S: 150, H: 4, G: 2, Dk: 100, Dv: 128, causal: true },
  { name: 'lengths', B: 3, T: 70, S: 100, H: 1, G: 1, Dk: 64, Dv: 50, causal: true, lengths: [100, 33, 0] },
  { name: 'lengths, not causal', B: 2, T: 3, S: 100, H: 1, G: 1, Dk: 21, Dv: 64, causal: false, lengths: [64, 97] },
  { name: 'heads that nearly fill a tile', B: 1, T: 70, S: 70, H: 2, G: 2, Dk: 60, Dv: 60, causal: true },
  { name: 'the widest heads', B: 1, T: 150, S: 150, H: 2, G: 2, Dk: 256, Dv: 256, causal: true },
  {
    name: 'the widest heads, shared, stages reused',
    B: 1,
    T: 140,
    S: 420,
    H: 2,
    G: 1,
    Dk: 256,
    Dv: 256,
    causal: true,
    lengths: [390],
  },
  { name: 'nearly the widest heads', B: 1, T: 40, S: 40, H: 1, G: 1, Dk: 200, Dv: 250, causal: true },
  { name: 'narrow values', B: 1, T: 40, S: 90, H: 1, G: 1, Dk: 256, Dv: 30, causal: true },
  { name: 'narrow keys', B: 2, T: 40, S: 90, H: 2, G: 1, Dk: 64, Dv: 200, causal: false, lengths: [90, 17] },
  { name: 'several tiles of keys', B: 1, T: 200, S: 400, H: 2, G: 1, Dk: 64, Dv: 64, causal: true, lengths: [390] },
  { name: 'many more queries than keys', B: 1, T: 140, S: 6, H: 1, G: 1, Dk: 16, Dv: 16, causal: true },
  {
    name: 'packed texts',
    B: 2,
    T: 330,
    S: 330,
    H: 2,
    G: 1,
    Dk: 192,
    Dv: 128,
    causal: true,
    starts: (t, b) => (b === 0 ? lastOf(t, 40, 127, 129, 256) : lastOf(t, 200)),
  },
  {
    name: 'packed texts of whole tiles',
    B: 1,
    T: 384,
    S: 384,
    H: 1,
    G: 1,
    Dk: 64,
    Dv: 64,
    causal: true,
    starts: t => lastOf(t, 128, 192, 224, 256),
  },
  {
    name: 'packed texts, only the last queries',
    B: 1,
    T: 150,
    S: 400,
    H: 2,
    G: 2,
    Dk: 100,
    Dv: 128,
    causal: true,
    starts: t => lastOf(t + 250, 3, 270, 390),
  },
  {
    name: 'unordered starts, some after the query',
    B: 3,
    T: 200,
    S: 230,
    H: 2,
    G: 1,
    Dk: 64,
    Dv: 50,
    causal: true,
    lengths: [230, 150, 0],
    starts: (t, b) => anyOf(260, t, b),
  },
  {
    name: 'unordered starts, not causal',
    B: 2,
    T: 140,
    S: 200,
    H: 1,
    G: 1,
    Dk: 192,
    Dv: 100,
    causal: false,
    lengths: [129, 200],
    starts: (t, b) => anyOf(210, t, b),
  },
  {
    name: 'decreasing starts',
    B: 1,
    T: 260,
    S: 260,
    H: 1,
    G: 1,
    Dk: 128,
    Dv: 128,
    causal: true,
    starts: t => 259 - t,
  },
  {
    name: 'blocks of queries without keys, and a last one with all keys',
    B: 1,
    T: 300,
    S: 300,
    H: 1,
    G: 1,
    Dk: 64,
    Dv: 64,
    causal: true,
    starts: t => (t < 140 ? 2 ** 31 - 1 : t < 299 ? t - 1 : -(2 ** 31)),
  },
  {
    name: 'the widest heads, packed texts',
    B: 2,
    T: 200,
    S: 200,
    H: 1,
    G: 1,
    Dk: 256,
    Dv: 256,
    causal: true,
    starts: (t, b) => (b === 0 ? lastOf(t, 31, 33, 128) : lastOf(t, 79, 80)),
  },
  {
    name: 'nearly the widest heads, unordered starts',
    B: 1,
    T: 140,
    S: 170,
    H: 2,
    G: 1,
    Dk: 200,
    Dv: 250,
    causal: false,
    lengths: [150],
    starts: (t, b) => anyOf(180, t, b),
  },
]

/** `i32 [B, T]`. */
const perQuery = (B: number, T: number, f: (t: number, b: number) => number) => ({
  ...integers(...Array.from({ length: B * T }, (_, i) => f(i % T, Math.floor(i / T)))),
  shape: [B, T],
})

const tolerance: { readonly [P in WidePrecision]: number } = { f32: 5e-6, bf16: 2e-2 }

/** Tiles of 256 features in f32 need this much shared memory, which not every device has. */
const widestF32 = 137_600
let sharedMemory = 0
if (!unavailable) {
  const backend = await testBackend()
  sharedMemory = backend.properties.sharedMemory
  backend.dispose()
}

afterEach(() => {
  if (!unavailable) reverseOrder(false)
})

describe.skipIf(unavailable || !wgmmaVariants.includes(true))('pingpong scheduling', () => {
  afterEach(() => {
    schedule.pingpong = false
  })
  test.each(sizes.filter(({ starts }) => starts === undefined))(
    'does not change the result: $name',
    async ({ B, T, S, H, G, Dk, Dv, causal, lengths }) => {
      const random = new Random(T)
      const inputs = [exact(random, B, T, H, Dk), exact(random, B, S, G, Dk), exact(random, B, S, G, Dv)]
      if (lengths) inputs.push(integers(...lengths))
      const attrs = { causal, scale: Dk ** -0.5, precision: 'bf16' } as const
      const run = () => onCuda('attention', inputs, attrs, [output(B, T, H, Dv), output(B, H, T)], { wgmma: true })
      const expected = await run()
      schedule.pingpong = true
      expect(await run()).toEqual(expected)
      reverseOrder(true)
      expect(await run()).toEqual(expected)
    },
  )

  // In translated kernels, wgmmas are computed when they are issued.
  test.skipIf(onDevice || translated).each([false, true])(
    'the products of the two warpgroups alternate, threads reversed: %s',
    async reversed => {
      const random = new Random(1)
      const [B, T, S, H, Dk, Dv] = [1, 128, 640, 1, 192, 128]
      const inputs = [exact(random, B, T, H, Dk), exact(random, B, S, H, Dk), exact(random, B, S, H, Dv)]
      const attrs = { causal: false, scale: 1, precision: 'bf16' } as const
      const run = async () => {
        await onCuda('attention', inputs, attrs, [output(B, T, H, Dv), output(B, H, T)], { wgmma: true })
        return emulatorFunction('const char* moe_emulator_products()')() as string
      }
      // The first tile of keys, the next ones with the previous values, and the last values, for which no warpgroup waits.
      const alternating = /^01(0011){4}(01|10)$/
      reverseOrder(reversed)
      const usual = await run()
      expect(usual).toHaveLength(20)
      expect(usual).not.toMatch(alternating)
      schedule.pingpong = true
      expect(await run()).toMatch(alternating)
    },
  )
})

describe.skipIf(unavailable).each(productVariants)('attention, $precision, wgmma $wgmma', ({ precision, wgmma }) => {
  test.each(sizes)('$name', async ({ B, T, S, H, G, Dk, Dv, causal, scale = Dk ** -0.5, lengths, starts }) => {
    const random = new Random(T)
    const [q, k, v] = [exact(random, B, T, H, Dk), exact(random, B, S, G, Dk), exact(random, B, S, G, Dv)]
    const ranges = lengths || starts ? [integers(...(lengths ?? new Array<number>(B).fill(S)))] : []
    if (starts) ranges.push(perQuery(B, T, starts))
    const attrs = { causal, scale, precision }
    const outputs = [output(B, T, H, Dv), output(B, H, T)]
    if (precision === 'f32' && (Dk > 192 || Dv > 128) && sharedMemory < widestF32) {
      await expect(onCuda('attention', [q, k, v, ...ranges], attrs, outputs, { wgmma })).rejects.toThrow('declined')
      return
    }
    const expected = await onCpu('attention', [q, k, v, ...ranges], attrs, outputs)
    // Keys and values after the end of a sequence must not affect the results.
    lengths?.forEach((length, b) => {
      for (const { data, shape } of [k, v]) {
        const size = shape[1] * shape[2] * shape[3]
        ;(data as Float32Array).fill(Number.NaN, b * size + length * shape[2] * shape[3], (b + 1) * size)
      }
    })
    const got = await onCuda('attention', [q, k, v, ...ranges], attrs, outputs, { wgmma })
    got.forEach((x, i) => {
      assertNear(['out', 'lse'][i], x, expected[i], tolerance[precision], outputs[i].shape)
    })

    const dout = exact(random, B, T, H, Dv)
    const saved = expected.map((x, i) => ({ data: Float32Array.from(x), shape: outputs[i].shape }))
    const gradients = [q, k, v].map(x => output(...x.shape))
    const run = () => onCuda('attentionBackward', [q, k, v, ...saved, dout, ...ranges], attrs, gradients, { wgmma })
    const backward = await run()
    if (wgmma) {
      reverseOrder(true)
      expect(await run()).toEqual(backward)
      reverseOrder(false)
    }
    for (const x of [k, v])
      (x.data as Float32Array).forEach((value, i, all) => {
        if (Number.isNaN(value)) all[i] = 1
      })
    const expectedGradients = await onCpu('attentionBackward', [q, k, v, ...saved, dout, ...ranges], attrs, gradients)
    backward.forEach((x, i) => {
      assertNear(['dq', 'dk', 'dv'][i], x, expectedGradients[i], tolerance[precision], gradients[i].shape)
    })
  })

  test.each([
    { Dk: 64, Dv: 64 },
    { Dk: 192, Dv: 128 },
  ])('packed texts of whole tiles do not affect each other, $Dk and $Dv features', async ({ Dk, Dv }) => {
    const [size, H] = [128, 2]
    const T = 2 * size
    const random = new Random(Dk)
    const q = exact(random, 1, T, H, Dk)
    const inputs = [q, exact(random, 1, T, 1, Dk), exact(random, 1, T, 1, Dv)]
    const dout = exact(random, 1, T, H, Dv)
    const ranges = [integers(T), perQuery(1, T, t => lastOf(t, size))]
    const attrs = { causal: true, scale: Dk ** -0.5, precision }
    const gradients = inputs.map(x => output(...x.shape))
    const run = async (spoiled?: number) => {
      const [x, dx] = [inputs, [dout]].map(all =>
        all.map(({ data, shape }) => {
          const copy = Float32Array.from(data as Float32Array)
          if (spoiled !== undefined)
            copy.fill(Number.NaN, (spoiled * copy.length) / 2, ((spoiled + 1) * copy.length) / 2)
          return { data: copy, shape }
        }),
      )
      const outputs = [output(1, T, H, Dv), output(1, H, T)]
      const saved = (await onCuda('attention', [...x, ...ranges], attrs, outputs, { wgmma })).map((data, i) => ({
        data: data as Float32Array,
        shape: outputs[i].shape,
      }))
      const backward = await onCuda('attentionBackward', [...x, ...saved, ...dx, ...ranges], attrs, gradients, {
        wgmma,
      })
      return [saved[0].data, ...backward].map(all =>
        [0, 1].map(half => [...all.slice((half * all.length) / 2, ((half + 1) * all.length) / 2)]),
      )
    }
    const whole = await run()
    for (const spoiled of [0, 1]) {
      const results = await run(spoiled)
      results.forEach((halves, i) => {
        expect(halves[spoiled].every(Number.isNaN), `output ${i}`).toBe(true)
        expect(halves[1 - spoiled], `output ${i}`).toEqual(whole[i][1 - spoiled])
      })
    }
  })
})
