import { beforeEach, describe, expect, test } from 'vitest'
import type { Backend } from '../backend.ts'
import { rand, randn, tensor, zeros } from '../create.ts'
import { setDefaultBackend } from '../default-backend.ts'
import { isMoeError } from '../errors.ts'
import { dequantizeWeight, quantizeWeight } from '../fused/quantized-matmul.ts'
import type { WeightFormat } from '../ops.ts'
import { Parameter } from '../parameter.ts'
import { Random } from '../random.ts'
import { referenceBackend } from '../reference/index.ts'
import { scope } from '../scope.ts'
import type { Tensor } from '../tensor.ts'
import { assertClose, tolerances } from '../testing/compare.ts'
import { Embedding, Linear, RmsNorm, weightParameter } from './layers.ts'
import { Module, namedParameters } from './module.ts'
import { groupedLinear, QuantizedParameter, quantizedParameter, quantizeWeights, weightBytes } from './quantized.ts'
import { entriesSource, loadStateDict, type QuantizedLayout, stateDict } from './state-dict.ts'

const formats: readonly WeightFormat[] = ['bf16', 'fp8', 'int8', 'int4']
const bytes = async (tensor: Tensor) => Buffer.from((await tensor.data()).buffer)
let backend: Backend
beforeEach(() => {
  backend = referenceBackend()
  setDefaultBackend(backend)
})

class Experts extends Module {
  up_proj: Parameter
  override readonly quantizable = ['up_proj']
  override readonly stacked = { up_proj: (i: number) => `${i}.up_proj.weight` }
  constructor(experts: number, weights?: WeightFormat) {
    super()
    this.up_proj = weightParameter([experts, 16, 24], 'up_proj', { random: new Random(3), weights })
  }
}

class Model extends Module {
  embed = new Embedding(20, 24, { random: new Random(1), std: 1 })
  norm = new RmsNorm(24)
  experts = new Experts(4)
  head = new Linear(24, 20, { random: new Random(2) })
}

describe('quantizing a weight', () => {
  /** Returns the largest error of each format: half a unit in the last place, or half the step of a block. */
  const bound = (format: WeightFormat, value: number, peak: number): number => {
    if (format === 'bf16') return Math.abs(value) * 2 ** -8
    if (format === 'fp8') return Math.max(Math.abs(value) * 2 ** -4, (peak / 448) * 2 ** -10)
    return peak / (format === 'int8' ? 127 : 7) / 2
  }

  test.each(formats)('%s: errors are within the rounding of the format', async format => {
    const [experts, rows, columns] = [3, 6, 45]
    const block = format === 'fp8' ? ([4, 16] as const) : ([1, 16] as const)
    const x = randn([experts, rows, columns], new Random(5))
    const back = await scope(() => dequantizeWeight(quantizeWeight(x, format, block))).values()
    const values = await x.values()
    const peaks = new Map<string, number>()
    const blockOf = (i: number) => {
      const [e, row, column] = [Math.floor(i / (rows * columns)), Math.floor(i / columns) % rows, i % columns]
      return `${e} ${Math.floor(row / block[0])} ${Math.floor(column / block[1])}`
    }
    for (const [i, value] of values.entries())
      peaks.set(blockOf(i), Math.max(peaks.get(blockOf(i)) ?? 0, Math.abs(value)))
    for (const [i, value] of values.entries()) {
      const allowed = bound(format, value, peaks.get(blockOf(i)) as number) * (1 + 1e-5)
      expect(Math.abs(back[i] - value), `${i}`).toBeLessThanOrEqual(allowed)
    }
  })

  test.each(formats)('%s: zeros stay zeros', async format => {
    const back = await scope(() => dequantizeWeight(quantizeWeight(zeros([3, 7]), format))).values()
    expect([...back]).toEqual(new Array(21).fill(0))
  })

  test.each([
    ['int8', [900, 16]],
    ['fp8', [900, 16]],
    ['fp8', [9, 100, 16]],
  ] as const)('%s %j: quantizing in parts gives the same codes as at once, with less memory', async (format, shape) => {
    const dense = new Parameter(rand(shape, new Random(4), { low: -1 }))
    const live = backend.stats().bytes
    const parts = quantizedParameter(dense, format, 4000)
    const peak = backend.stats().peakBytes - live
    const whole = scope(() => quantizeWeight(dense, format))
    expect(backend.stats().peakBytes - live).toBeGreaterThan(1.8 * peak)
    const { q, scale } = parts.weight
    expect(Buffer.compare(await bytes(q), await bytes(whole.q))).toBe(0)
    expect(Buffer.compare(await bytes(scale as Tensor), await bytes(whole.scale as Tensor))).toBe(0)
    expect(parts.weight).toMatchObject({ shape: whole.shape, block: whole.block })
  })

  test('int4 packs two values into a byte, the even column in the low half', async () => {
    const { q, scale } = quantizeWeight(tensor([7, -7, 1, 0, -3], [1, 5]), 'int4', [1, 2])
    expect([...(await q.values())]).toEqual([15 + 16 * 1, 15 + 16 * 8, 1 + 16 * 8])
    assertClose(
      'scales',
      await (scale as NonNullable<typeof scale>).values(),
      [1, 1 / 7, 3 / 7],
      tolerances.elementwise,
    )
  })
})

describe.each(formats)('a model with weights in %s', format => {
  test('computes the same as its dequantized weights in f32', async () => {
    const model = new Model()
    await quantizeWeights(model, format)
    const dense = new Model()
    await loadStateDict(dense, entriesSource(stateDict(model)))
    const ids = tensor(Int32Array.of(3, 19, 0, 7, 25), [5])
    const offsets = tensor(Int32Array.of(0, 2, 2, 4, 5), [5])
    const run = (m: Model) =>
      scope(() => {
        const x = m.norm.forward(m.embed.forward(ids))
        return [x, m.head.forward(x), groupedLinear(x, m.experts.up_proj, offsets)]
      })
    const [stored, plain] = [run(model), run(dense)]
    for (const [i, output] of stored.entries())
      assertClose(`output ${i}`, await output.values(), await plain[i].values(), tolerances.elementwise)
  })

  test('is the same whether it is quantized afterwards, created quantized or quantized while loading', async () => {
    const afterwards = new Experts(4)
    const entries = stateDict(new Experts(4))
    await quantizeWeights(afterwards, format)
    const start = new Experts(4, format)
    const loaded = new Experts(4, format)
    loaded.up_proj.assign(zeros([4, 16, 24]))
    await loadStateDict(loaded, entriesSource(entries))
    const expected = await (afterwards.up_proj as QuantizedParameter).dequantize().values()
    for (const { up_proj } of [start, loaded])
      expect(await (up_proj as QuantizedParameter).dequantize().values()).toEqual(expected)
  })
})

test('quantizeWeights leaves norms in f32 and tied weights tied, and leaks nothing', async () => {
  const before = backend.stats().handles
  const model = new Model()
  model.head.weight.dispose()
  model.head.weight = model.embed.weight
  await quantizeWeights(model, 'int8')
  expect(model.head.weight).toBe(model.embed.weight)
  const kinds = namedParameters(model).map(({ name, parameter }) => `${name} ${parameter.dtype}`)
  expect(kinds).toEqual(['embed.weight u8', 'norm.weight f32', 'experts.up_proj u8'])
  // 20 x 24 and 4 x 16 x 24 bytes with a scale for each row, and 24 numbers of the norm.
  expect(weightBytes(model)).toEqual({ elements: 480 + 24 + 1536, bytes: 480 + 1536 + 4 * (20 + 64 + 24) })
  for (const { parameter } of namedParameters(model)) parameter.dispose()
  expect(backend.stats().handles).toBe(before)
})

test('an unknown format is rejected with a list of formats', async () => {
  const wrong = 'int6' as WeightFormat
  const unknownFormat = expect.objectContaining({
    code: 'E_ATTR',
    message: expect.stringMatching(/unknown weight format "int6"; choose one of .*int8/),
  })
  expect(() => new Linear(4, 4, { weights: wrong })).toThrow(unknownFormat)
  expect(() => new Linear(4, 4, { weights: wrong, std: 0 })).toThrow(unknownFormat)
  await expect(quantizeWeights(new Linear(4, 4), wrong)).rejects.toThrow(unknownFormat)
})

test('loading into quantized weights quantizes slice by slice', async () => {
  const entries = stateDict(new Experts(32))
  const model = new Experts(32, 'int8')
  const whole = 32 * 16 * 24 * 8
  const before = backend.stats().bytes
  let peak = 0
  const watched = entries.map(entry => ({
    ...entry,
    data: () => {
      peak = Math.max(peak, backend.stats().bytes - before)
      return entry.data()
    },
  }))
  await loadStateDict(model, entriesSource(watched))
  expect(peak).toBeLessThan(whole * 1.2)
})

describe('codes of a source', () => {
  /** A source of matrices [16, 24], of which some also have codes and scales of int4. */
  const sourceOf = (withCodes: (name: string) => boolean, likes: unknown[] = [], experts = 3) => {
    const entries = entriesSource(stateDict(new Experts(experts)))
    return {
      keys: () => entries.keys(),
      info: (name: string) => entries.info(name),
      read: (name: string) => entries.read(name),
      readQuantized: async (name: string, { format, block }: QuantizedLayout) => {
        likes.push([format, block])
        if (!withCodes(name) || format !== 'int4') return undefined
        // All codes, including 0, for -8, which quantization never chooses.
        const q = Uint8Array.from({ length: 16 * 12 }, (_, i) => (i * 37) % 256)
        return { q, scale: Float32Array.from({ length: 16 }, (_, i) => 1 + i / 8) }
      },
    }
  }
  const elementAt = (i: number) => {
    const byte = (Math.floor(i / 2) * 37) % 256
    return ((i % 2 === 0 ? byte & 15 : byte >> 4) - 8) * (1 + Math.floor(i / 24) / 8)
  }

  test('are stored as they are, and other matrices are quantized', async () => {
    const likes: unknown[] = []
    const model = new Experts(3, 'int4')
    const plain = new Experts(3, 'int4')
    await loadStateDict(plain, entriesSource(stateDict(new Experts(3))))
    const source = sourceOf(name => !name.startsWith('1.'), likes)
    const { handles } = backend.stats()
    await loadStateDict(model, source)
    expect(backend.stats().handles).toBe(handles)
    expect(likes).toEqual(Array.from({ length: 3 }, () => ['int4', [1, 32]]))
    const found = await (model.up_proj as QuantizedParameter).dequantize().values()
    const rounded = await (plain.up_proj as QuantizedParameter).dequantize().values()
    const exact = Float32Array.from({ length: 16 * 24 }, (_, i) => elementAt(i))
    for (const expert of [0, 2]) expect(found.subarray(expert * 384, (expert + 1) * 384)).toEqual(exact)
    expect(found.subarray(384, 768)).toEqual(rounded.subarray(384, 768))
  })

  test('fill matrices that are not stacked', async () => {
    const model = new Linear(24, 16, { weights: 'int4' })
    const { readQuantized } = sourceOf(() => true)
    const plain = entriesSource(stateDict(new Linear(24, 16)))
    await loadStateDict(model, { ...plain, readQuantized })
    const found = await (model.weight as QuantizedParameter).dequantize().values()
    expect(found).toEqual(Float32Array.from({ length: 16 * 24 }, (_, i) => elementAt(i)))
  })

  test('are on the device twice at most while they are loaded', async () => {
    const model = new Experts(32, 'int4')
    const source = sourceOf(() => true, [], 32)
    const { bytes, peakBytes } = backend.stats()
    const { q, scale } = (model.up_proj as QuantizedParameter).weight
    using filling = zeros([(peakBytes - bytes) / 8])
    // The backend stores floats as f64.
    const stack = q.size + 8 * (scale as Tensor).size
    await loadStateDict(model, source)
    const more = backend.stats().peakBytes - (bytes + 8 * filling.size)
    expect(more).toBeLessThanOrEqual(stack)
  })

  test('are not asked for if the weight is not quantized', async () => {
    const likes: unknown[] = []
    await loadStateDict(
      new Experts(3),
      sourceOf(() => true, likes),
    )
    expect(likes).toEqual([])
  })

  test('in another format or other blocks are rejected', async () => {
    const { up_proj } = new Experts(1, 'int4')
    const others = [quantizeWeight(zeros([1, 16, 24]), 'int8'), quantizeWeight(zeros([1, 16, 24]), 'int4', [1, 16])]
    for (const part of others) {
      await expect((up_proj as QuantizedParameter).assignParts(1, () => part)).rejects.toMatchObject({ code: 'E_ATTR' })
    }
  })
})

test('a quantized parameter keeps its elements if the new ones are on another backend', async () => {
  const parameter = new QuantizedParameter(quantizeWeight(randn([3, 40], new Random(1)), 'int8'))
  const before = await parameter.data()
  const elsewhere = zeros([3, 40], { backend: referenceBackend() })
  expect(() => parameter.assign(elsewhere)).toThrow(
    expect.objectContaining({ code: 'E_SHAPE', message: expect.stringContaining('copy them with await x.to') }),
  )
  expect(await parameter.data()).toEqual(before)
})

describe('blocks whose rows do not divide 128', () => {
  test('are not split when a large weight is assigned in parts', async () => {
    const dense = rand([3300, 330], new Random(1), { low: -1 })
    const whole = quantizeWeight(dense, 'int8', [100, 110])
    const parameter = new QuantizedParameter(quantizeWeight(zeros([3300, 330]), 'int8', [100, 110]))
    await parameter.assignValues((await dense.values()) as Float32Array)
    expect(Buffer.compare(await bytes(parameter), await bytes(whole.q))).toBe(0)
    expect(await parameter.weight.scale?.data()).toEqual(await whole.scale?.data())
  })

  test('parts that would split them are rejected, and the weight is unchanged', async () => {
    const parameter = new QuantizedParameter(quantizeWeight(rand([6, 8], new Random(1)), 'int8', [4, 8]))
    const before = await parameter.data()
    await expect(parameter.assignParts(2, () => zeros([3, 8]))).rejects.toMatchObject({
      code: 'E_SHAPE',
      message: 'assign: a part of 3 rows ends inside a block of 4 rows; pass parts of a multiple of 4 rows',
    })
    expect(await parameter.data()).toEqual(before)
  })
})

test('a quantized parameter cannot be trained, and accepts only its own shape', () => {
  const { up_proj } = new Experts(2, 'int4')
  expect(up_proj.trainable).toBe(false)
  const error = (fn: () => unknown) => {
    try {
      fn()
    } catch (caught) {
      return caught
    }
    return undefined
  }
  expect(
    isMoeError(
      error(() => (up_proj.trainable = true)),
      'E_NO_GRADIENT',
    ),
  ).toBe(true)
  expect(
    isMoeError(
      error(() => up_proj.assign(zeros([2, 16, 23]))),
      'E_SHAPE',
    ),
  ).toBe(true)
  expect(
    isMoeError(
      error(() => up_proj.assign(zeros([3, 16, 24]))),
      'E_SHAPE',
    ),
  ).toBe(true)
})

test.each(formats)('a weight in %s with deviation 0 equals quantized zeros', async format => {
  for (const shape of [
    [5, 7],
    [2, 3, 130],
    [2, 128, 64],
  ]) {
    const made = weightParameter(shape, 'w', { std: 0, weights: format }) as QuantizedParameter
    const expected = quantizeWeight(zeros(shape), format)
    expect(made.weight).toMatchObject({ shape, format, block: expected.block })
    expect(await made.data()).toEqual(await expected.q.data())
    expect(made.weight.scale?.shape).toEqual(expected.scale?.shape)
    expect(await made.weight.scale?.data()).toEqual(await expected.scale?.data())
  }
})
