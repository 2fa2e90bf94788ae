import { beforeEach, describe, expect, test } from 'vitest'
import type { Backend } from '../backend.ts'
import { full, randn, tensor, zeros } from '../create.ts'
import { setDefaultBackend } from '../default-backend.ts'
import { type DType, encodeHost } from '../dtype.ts'
import { isMoeError } from '../errors.ts'
import { Parameter } from '../parameter.ts'
import { Random } from '../random.ts'
import { referenceBackend } from '../reference/index.ts'
import { sizeOf } from '../shape.ts'
import { Linear, RmsNorm } from './layers.ts'
import { Module, namedParameters } from './module.ts'
import { entriesSource, loadStateDict, type StateEntry, type StateSource, stateDict } from './state-dict.ts'

let backend: Backend
beforeEach(() => {
  backend = referenceBackend()
  setDefaultBackend(backend)
})

class Experts extends Module {
  up_proj: Parameter
  down_proj: Parameter
  override readonly stacked = {
    up_proj: (i: number) => `${i}.up_proj.weight`,
    down_proj: (i: number) => `${i}.down_proj.weight`,
  }
  constructor(random: Random) {
    super()
    this.up_proj = new Parameter(randn([3, 4, 2], random))
    this.down_proj = new Parameter(randn([3, 2, 4], random))
  }
}

class Model extends Module {
  norm = new RmsNorm(2)
  experts: Experts
  head: Linear
  counts = new Parameter(tensor(Int32Array.of(1, 2, 3)), { trainable: false })
  constructor(seed: number) {
    super()
    const random = new Random(seed)
    this.experts = new Experts(random)
    this.head = new Linear(2, 5, { random })
  }
}

const keys = [
  'norm.weight',
  'counts',
  ...[0, 1, 2].map(i => `experts.${i}.up_proj.weight`),
  ...[0, 1, 2].map(i => `experts.${i}.down_proj.weight`),
  'head.weight',
]
const entry = (name: string, shape: number[], values: number[], dtype: DType = 'f32'): StateEntry => ({
  name,
  shape,
  dtype,
  data: async () => encodeHost(dtype, values),
})
const snapshot = (model: Module) =>
  Promise.all(namedParameters(model).map(async ({ name, parameter }) => [name, Array.from(await parameter.values())]))

describe('stateDict', () => {
  test('names every stored tensor, stacked ones as their slices', () => {
    const entries = stateDict(new Model(1))
    expect(entries.map(({ name }) => name).toSorted()).toEqual(keys.toSorted())
    const shapes = Object.fromEntries(entries.map(({ name, shape, dtype }) => [name, [dtype, ...shape]]))
    expect(shapes['experts.1.up_proj.weight']).toEqual(['f32', 4, 2])
    expect(shapes['counts']).toEqual(['i32', 3])
  })

  test('slices are the parts of the whole, read in any order and any number of times', async () => {
    const model = new Model(1)
    const whole = await model.experts.up_proj.values()
    const byName = new Map(stateDict(model).map(item => [item.name, item]))
    for (const i of [2, 0, 1, 1, 2, 0]) {
      const slice = await (byName.get(`experts.${i}.up_proj.weight`) as StateEntry).data()
      expect(slice).toEqual(whole.slice(i * 8, (i + 1) * 8))
    }
  })

  test('each entry downloads its own elements only', async () => {
    const downloads: number[] = []
    const counting: Backend = {
      ...backend,
      download: value => {
        downloads.push(sizeOf(value.shape))
        return backend.download(value)
      },
    }
    setDefaultBackend(counting)
    const entries = stateDict(new Model(1))
    const { handles } = backend.stats()
    for (const item of entries) await item.data()
    expect(downloads).toEqual(entries.map(({ shape }) => sizeOf(shape)))
    expect(backend.stats().handles).toBe(handles)
  })
})

describe('loadStateDict', () => {
  test('restores the values of another model', async () => {
    const [from, to] = [new Model(1), new Model(2)]
    const handles = backend.stats().handles
    expect(await snapshot(to)).not.toEqual(await snapshot(from))
    await loadStateDict(to, entriesSource(stateDict(from)))
    expect(await snapshot(to)).toEqual(await snapshot(from))
    expect(backend.stats().handles).toBe(handles)
  })

  test('keeps gradients', async () => {
    const model = new Linear(2, 3)
    model.weight.grad = full([3, 2], 1)
    await loadStateDict(model, entriesSource(stateDict(new Linear(2, 3))))
    expect(await model.weight.grad?.values()).toEqual(new Float32Array(6).fill(1))
  })

  test('reads one tensor at a time, including the slices of a stack', async () => {
    const stored = entriesSource(stateDict(new Model(1)))
    let open = 0
    const read = async (name: string) => {
      expect(open++).toBe(0)
      const data = await stored.read(name)
      open--
      return data
    }
    await loadStateDict(new Model(2), { ...stored, read })
  })

  test('lists every missing, unexpected and mis-shaped key at once, and changes nothing', async () => {
    const model = new Model(1)
    const before = await snapshot(model)
    const stored = stateDict(new Model(2))
      .filter(({ name }) => name !== 'counts' && name !== 'experts.1.down_proj.weight')
      .map(item => (item.name === 'head.weight' ? entry('head.weight', [5, 3], new Array(15).fill(0)) : item))
    stored.push(entry('experts.3.up_proj.weight', [4, 2], new Array(8).fill(0)), entry('bias', [1], [0]))
    const error = await loadStateDict(model, entriesSource(stored)).then(
      () => null,
      (reason: unknown) => reason,
    )
    if (!isMoeError(error, 'E_STATE_DICT')) throw error
    expect(error.details).toEqual({
      missing: expect.arrayContaining(['counts', 'experts.1.down_proj.weight']),
      unexpected: ['experts.3.up_proj.weight', 'bias'],
      misshaped: ['head.weight: stored [5,3], model [5,2]'],
    })
    expect((error.details['missing'] as string[]).length).toBe(2)
    for (const key of ['counts', 'experts.1.down_proj.weight', 'experts.3.up_proj.weight', 'bias', 'head.weight']) {
      expect(error.message).toContain(key)
    }
    expect(error.message).toMatch(
      /2 missing[\s\S]*2 unexpected[\s\S]*1 with another shape[\s\S]*\nbuild the model with/,
    )
    expect(await snapshot(model)).toEqual(before)
  })

  test('shows some of many keys, and lists all in details', async () => {
    class Many extends Module {
      readonly layers = Array.from({ length: 50 }, () => new RmsNorm(2))
    }
    const error = await loadStateDict(new Many(), entriesSource([])).catch((e: unknown) => e)
    if (!isMoeError(error, 'E_STATE_DICT')) throw error
    expect(error.message).toMatch(
      /50 missing:[\s\S]*layers\.19\.weight\n +and 30 more: all are in the error's details\n/,
    )
    expect(error.details['missing']).toHaveLength(50)
  })

  test('names a slice of another shape by its own key', async () => {
    const stored = stateDict(new Model(2)).map(item =>
      item.name === 'experts.2.up_proj.weight' ? entry(item.name, [2, 4], new Array(8).fill(0)) : item,
    )
    await expect(loadStateDict(new Model(1), entriesSource(stored))).rejects.toThrow(
      /experts\.2\.up_proj\.weight: stored \[2,4\], model \[4,2\]/,
    )
  })

  test('ignores keys and leaves parameters unchanged if requested', async () => {
    const model = new Model(1)
    const before = await model.head.weight.values()
    const stored = stateDict(new Model(2)).filter(({ name }) => name !== 'head.weight')
    stored.push(entry('rotary.inv_freq', [1], [0]))
    await loadStateDict(model, entriesSource(stored), {
      ignore: key => key.startsWith('rotary.'),
      optional: key => key === 'head.weight',
    })
    expect(await model.head.weight.values()).toEqual(before)
  })

  test('converts between float dtypes', async () => {
    class Half extends Module {
      weight = new Parameter(zeros([3], { dtype: 'bf16' }))
    }
    class Single extends Module {
      weight = new Parameter(zeros([3]))
    }
    const values = [1, -2.5, 0.375]
    for (const dtype of ['f32', 'bf16', 'f16', 'f8e4m3'] as const) {
      for (const model of [new Half(), new Single()]) {
        const own = model.weight.dtype
        await loadStateDict(model, entriesSource([entry('weight', [3], values, dtype)]))
        expect(model.weight.dtype).toBe(own)
        expect(Array.from(await model.weight.values())).toEqual(values)
      }
    }
  })

  test('rejects a source that reads too few elements', async () => {
    for (const short of ['head.weight', 'experts.1.up_proj.weight']) {
      const model = new Model(1)
      const before = await snapshot(model)
      const whole = entriesSource(stateDict(new Model(2)))
      const source = { ...whole, read: async (key: string) => (await whole.read(key)).subarray(key === short ? 1 : 0) }
      await expect(loadStateDict(model, source)).rejects.toMatchObject({
        code: 'E_SHAPE',
        problem: expect.stringMatching(`${short} has shape .*, but read\\(\\) returned \\d+ elements`),
      })
      // The weight that could not be read keeps its elements.
      const name = short.replace('.1', '').replace('.weight', short.startsWith('head') ? '.weight' : '')
      const values = (list: typeof before) => list.find(([own]) => own === name)
      expect(values(await snapshot(model))).toEqual(values(before))
    }
  })

  test('needs no memory besides the weights and what the source reads', async () => {
    const [model, other] = [new Model(1), new Model(2)]
    const entries: StateEntry[] = []
    for (const one of stateDict(other)) {
      const data = await one.data()
      entries.push({ ...one, data: async () => data })
    }
    const { bytes, peakBytes } = backend.stats()
    // With this tensor, the present number of bytes is the highest so far. The backend stores f64.
    using _ = zeros([(peakBytes - bytes) / 8])
    await loadStateDict(model, entriesSource(entries))
    expect(backend.stats().peakBytes).toBe(peakBytes)
    expect(await model.experts.down_proj.values()).toEqual(await other.experts.down_proj.values())
    expect(await model.experts.up_proj.values()).toEqual(await other.experts.up_proj.values())
  })
})

test('loadStateDict rejects a value that is not a source, and suggests how to create one', async () => {
  const model = new Model(1)
  const checkpoint = {
    keys: () => ['weight'],
    info: () => ({ dtype: 'f32', shape: [1, 1] }),
    read: async () => ({ data: [1] }),
  }
  for (const [none, what] of [
    [undefined, 'undefined'],
    ['model', 'the string "model"'],
    [stateDict(model), 'an array'],
    [checkpoint, 'one whose read() does not return an array'],
  ]) {
    const message = expect.stringContaining(`the source is ${what}`)
    const loading = loadStateDict(new Linear(1, 1), none as unknown as StateSource)
    await expect(loading).rejects.toMatchObject({ code: 'E_ATTR', message })
    await expect(loading).rejects.toThrow(
      /pass entriesSource\(stateDict\(other\)\), or stateSource\(await openCheckpoint/,
    )
  }
})
