import { beforeEach, describe, expect, test } from 'vitest'
import type { Backend } from '../backend.ts'
import { zeros } from '../create.ts'
import { setDefaultBackend } from '../default-backend.ts'
import { Parameter } from '../parameter.ts'
import { Random } from '../random.ts'
import { referenceBackend } from '../reference/index.ts'
import { createModule, deferWeights, drawnRows, materialize } from './defer-weights.ts'
import { Embedding, type InitOptions, Linear, RmsNorm, seedDefaultRandom } from './layers.ts'
import { Module, namedParameters } from './module.ts'
import { quantizeWeights } from './quantized.ts'
import { entriesSource, loadStateDict, stateDict } from './state-dict.ts'

let backend: Backend
beforeEach(() => {
  backend = referenceBackend()
  setDefaultBackend(backend)
})

class Model extends Module {
  embed: Embedding
  norm = new RmsNorm(48)
  layer: Linear
  head: Linear

  constructor(init: InitOptions = {}, rows = 300) {
    super()
    this.embed = new Embedding(rows, 48, init)
    this.layer = new Linear(48, 5, { ...init, std: 1 })
    this.head = new Linear(48, rows, init)
    this.head.weight.dispose()
    this.head.weight = this.embed.weight
  }
}

const numbers = (model: Module) =>
  Promise.all(stateDict(model).map(async ({ name, data }) => [name, Buffer.from((await data()).buffer)]))

/** The number of event loop turns until `promise` settles. */
async function turnsUntil(promise: Promise<unknown>): Promise<number> {
  let turns = 0
  let timer = setImmediate(function count() {
    turns++
    timer = setImmediate(count)
  })
  await promise.finally(() => clearImmediate(timer))
  return turns
}

describe('createModule', () => {
  test.each([undefined, 'bf16', 'int8'] as const)(
    'draws the same numbers as a constructor: weights %s',
    async weights => {
      const make = (rows: number) => () => new Model({ random: new Random(7), weights }, rows)
      for (const rows of [300, 3000]) {
        const [later, now] = [await createModule(make(rows)), make(rows)()]
        expect(later.layer.weight.trainable).toBe(now.layer.weight.trainable)
        expect(await numbers(later)).toEqual(await numbers(now))
      }
    },
  )

  test('uses the same default random streams as a constructor', async () => {
    seedDefaultRandom(3)
    const now = await numbers(new Model())
    seedDefaultRandom(3)
    expect(await numbers(await createModule(() => new Model()))).toEqual(now)
    // Modules that are created afterwards are initialized immediately again.
    const after = await new Linear(2, 2).weight.values()
    expect(after.some(x => x !== 0)).toBe(true)
  })

  test('lets the event loop run while weights are drawn and quantized', async () => {
    const made = createModule(() => new Model({}, 40_000))
    expect(await turnsUntil(made)).toBeGreaterThan(0)
    expect(await turnsUntil(quantizeWeights(await made, 'int8'))).toBeGreaterThan(0)
  })

  test('leaves nothing on the device if it fails at any point', async () => {
    for (let uploads = 0, done = false; !done; uploads++) {
      let left = uploads
      const full = (use: () => unknown) => {
        if (left-- === 0) throw new Error('full')
        return use()
      }
      const { upload, primitives } = backend
      const fill: typeof primitives.fill = (...all) => full(() => primitives.fill(...all)) as never[]
      const small: Backend = {
        ...backend,
        primitives: { ...primitives, fill },
        upload: (...all) => full(() => upload(...all)),
      }
      done = await createModule(() => new Model({ backend: small })).then(
        () => true,
        error => {
          expect(error.message).toBe('full')
          expect(backend.stats().handles).toBe(0)
          return false
        },
      )
      expect(done).toBe(uploads === 2)
    }
  })

  test('rejects an asynchronous function', async () => {
    const make = (async () => new Model()) as unknown as () => Model
    await expect(createModule(make)).rejects.toMatchObject({ code: 'E_ATTR' })
  })
})

describe('deferWeights', () => {
  const make = (seed: number) => () => new Model({ random: new Random(seed), weights: undefined })

  test('leaves weights without memory until they are materialized, with the numbers of a constructor', async () => {
    const now = make(7)()
    const later = deferWeights(make(7))
    const weights = [later.embed.weight, later.layer.weight]
    for (const weight of weights) {
      expect(weight.handle).toBe(null)
      expect(() => weight.neg()).toThrow(/its weights are deferred: call await materialize/)
    }
    // A state dict reads them without allocating them.
    expect(await numbers(later)).toEqual(await numbers(now))
    expect(weights.map(({ handle }) => handle)).toEqual([null, null])
    await materialize(namedParameters(later))
    expect(await numbers(later)).toEqual(await numbers(now))
    later.layer.weight.assign(zeros([5, 48]))
    await materialize(namedParameters(later))
    expect((await later.layer.weight.values()).every(x => x === 0)).toBe(true)
    later.embed.weight.dispose()
    expect(() => later.embed.weight.neg()).toThrow(/was freed with its model/)
  })

  test.each(['bf16', 'fp8', 'int8', 'int4'] as const)('leaves weights in %s without memory, too', async weights => {
    const make = () => new Model({ random: new Random(7), weights })
    const [now, later, loaded] = [make(), deferWeights(make), deferWeights(make)]
    expect([later.embed.weight.handle, later.layer.weight.handle]).toEqual([null, null])
    expect(await numbers(later)).toEqual(await numbers(now))
    await materialize(namedParameters(later))
    await loadStateDict(loaded, entriesSource(stateDict(now)))
    for (const module of [later, loaded]) expect(await numbers(module)).toEqual(await numbers(now))
  })

  test('loads weights in place of the initial ones, and only those that are asked for', async () => {
    const [stored, later] = [make(1)(), deferWeights(make(2))]
    const own = namedParameters(later).filter(({ name }) => name !== 'layer.weight')
    await loadStateDict(later, entriesSource(stateDict(stored)), { parameters: own })
    expect(await later.embed.weight.data()).toEqual(await stored.embed.weight.data())
    expect(later.layer.weight.handle).toBe(null)
    const others = { parameters: [{ name: 'layer.weight', parameter: new Parameter(zeros([2, 48])), firstRow: 3 }] }
    await loadStateDict(later, entriesSource(stateDict(stored)), others)
    expect(await others.parameters[0].parameter.data()).toEqual((await stored.layer.weight.data()).slice(3 * 48))
    await materialize(namedParameters(later))
    expect(await later.layer.weight.data()).toEqual(await make(2)().layer.weight.data())
    // All keys are checked, also of parameters that are not loaded.
    const entries = stateDict(stored).filter(({ name }) => name !== 'layer.weight')
    await expect(loadStateDict(later, entriesSource(entries), { parameters: own })).rejects.toThrow(/layer\.weight/)
  })

  test('draws any rows as the whole', async () => {
    // Rows are not aligned with the blocks of the generator, and do not fit into one step.
    for (const shape of [[40, 7], [9, 5, 2], [30_000, 3], [11], []]) {
      const [rows = 1] = shape
      const size = shape.reduce((product, n) => product * n, 1)
      const random = new Random(3).fork('weight')
      const all = random.fork('x').normal(size, 0.5)
      const read = drawnRows(shape, random.fork('x'), 0.5)
      for (const [from, to] of [
        [0, rows],
        [Math.floor(rows / 3), rows],
        [Math.floor(rows / 2), Math.ceil((2 * rows) / 3)],
      ])
        expect(await read(from, to)).toEqual(all.subarray((from * size) / rows, (to * size) / rows))
    }
  })

  test('frees everything if the constructor fails', () => {
    const failing = () => {
      new Model()
      throw new Error('on purpose')
    }
    expect(() => deferWeights(failing)).toThrow('on purpose')
    expect(backend.stats().handles).toBe(0)
    expect(new Linear(2, 2).weight.handle).not.toBe(null)
  })
})
