import { beforeEach, describe, expect, test } from 'vitest'
import type { Backend } from '../backend.ts'
import { setDefaultBackend } from '../default-backend.ts'
import { Random } from '../random.ts'
import { referenceBackend } from '../reference/index.ts'
import { createModule } from './create-module.ts'
import { Embedding, type InitOptions, Linear, RmsNorm, seedDefaultRandom } from './layers.ts'
import { Module } from './module.ts'
import { quantizeWeights } from './quantized.ts'
import { stateDict } from './state-dict.ts'

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
      expect(done).toBe(uploads === 5)
    }
  })

  test('rejects an asynchronous function', async () => {
    const make = (async () => new Model()) as unknown as () => Model
    await expect(createModule(make)).rejects.toMatchObject({ code: 'E_ATTR' })
  })
})
