/** @file Training of adapters, recorded and op by op, with f32 and quantized base weights: learning, checkpoints and resumption. */
import { readdir, readFile, stat } from 'node:fs/promises'
import { join } from 'node:path'
import {
  addAdapters,
  mergeAdapters,
  namedAdapters,
  setDefaultBackend,
  stateDict,
  trainable,
  type WeightFormat,
} from '@moe/core'
import { DeepSeek } from '@moe/deepseek'
import { createBackend } from '@moe/kernels-cpu'
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest'
import { modelFolder } from './checkpoints/model-folder.ts'
import { evaluate } from './evaluate.ts'
import type { TrainEvent } from './events.ts'
import type { TrainOptions } from './options.ts'
import { smallConfig, smallData } from './test-deepseek.ts'
import { removeTemporaryFolders, temporaryFolder } from './test-model.ts'
import { train } from './train.ts'

const backend = await createBackend()
setDefaultBackend(backend)
afterAll(() => backend.dispose())

const settings = {
  data: { training: smallData() },
  steps: 8,
  batchSize: 2,
  sequenceLength: 8,
  lr: 5e-3,
  progress: false,
  handleSignals: false,
} as const

let folder: string
let base: string
beforeAll(async () => {
  folder = await temporaryFolder()
  base = join(folder, 'base')
  const model = new DeepSeek(smallConfig, { seed: 1 })
  await model.save(base)
  model.dispose()
  return removeTemporaryFolders
})
afterEach(() => expect(backend.stats().handles).toBe(0))

async function open(weights?: WeightFormat): Promise<DeepSeek> {
  const model = await DeepSeek.fromPretrained(base, { weights })
  addAdapters(model, { rank: 4 })
  return model
}

const valuesOf = (model: DeepSeek) =>
  Promise.all(stateDict(model).map(async ({ name, data }) => [name, Array.from(await data())] as const))
const isAdapter = ([name]: readonly [string, unknown]) => name.includes('.lora_')

async function run(options: Partial<TrainOptions>, weights?: WeightFormat) {
  const model = await open(weights)
  const events: TrainEvent[] = []
  try {
    const before = await valuesOf(model)
    const result = await train(model, { ...settings, ...options, onEvent: event => events.push(event) })
    const losses = events.flatMap(event => (event.type === 'step' ? [event.loss] : []))
    return { result, events, losses, before, after: await valuesOf(model) }
  } finally {
    model.dispose()
  }
}

const mean = (values: readonly number[]) => values.reduce((sum, value) => sum + value, 0) / values.length

const bases = [undefined, 'bf16', 'int8', 'int4'] as const

describe.each(bases)('with base weights in %s', weights => {
  test('adapters learn and the base model stays frozen, recorded as op by op', async () => {
    const { losses, before, after } = await run({ steps: 60 }, weights)
    expect(mean(losses.slice(-12))).toBeLessThan(mean(losses.slice(0, 12)) - 0.3)
    expect(after.filter(one => !isAdapter(one))).toEqual(before.filter(one => !isAdapter(one)))
    for (const [i, [name, values]] of after.entries()) {
      if (isAdapter(after[i])) expect(values, name).not.toEqual(before[i][1])
    }
    const byOp = await run({ steps: 60, record: false }, weights)
    expect(byOp.losses).toEqual(losses)
    expect(byOp.after).toEqual(after)
  })

  test('a stopped run resumes with the same bits', async () => {
    const [whole, cut] = [join(folder, `whole-${weights}`), join(folder, `cut-${weights}`)]
    const uninterrupted = await run({ out: whole }, weights)
    const controller = new AbortController()
    const model = await open(weights)
    await train(model, {
      ...settings,
      out: cut,
      signal: controller.signal,
      onEvent: event => {
        if (event.type === 'step' && event.step === 3) controller.abort()
      },
    })
    model.dispose()
    const rest = await run({ out: cut, resume: true }, weights)
    expect(rest.losses).toEqual(uninterrupted.losses.slice(3))
    expect(rest.after).toEqual(uninterrupted.after)
  })
})

test('a checkpoint contains the adapters and the path of their base model, and opens like a model', async () => {
  const out = join(folder, 'run')
  const { result, after, events } = await run({ out })
  const at = modelFolder(out)
  expect((await readdir(at)).sort()).toEqual(['adapter_config.json', 'adapter_model.safetensors'])
  expect(JSON.parse(await readFile(join(at, 'adapter_config.json'), 'utf8'))).toMatchObject({
    r: 4,
    base_model_name_or_path: base,
  })
  const model = await DeepSeek.fromPretrained(at)
  expect(await valuesOf(model)).toEqual(after)
  expect(modelFolder(at)).toBe(at)
  const numbers = trainable(model).reduce((sum, { size }) => sum + size, 0)
  expect(result.parameters).toBe(numbers)
  const notices = events.flatMap(event => (event.type === 'notice' ? [event.message] : []))
  expect(notices).toEqual([
    expect.stringContaining(`training the adapters of ${namedAdapters(model).length} weights: ${numbers} parameters`),
  ])
  // The optimizer state contains moments of the adapters only.
  const { size } = await stat(join(at, '..', 'optimizer.safetensors'))
  expect(size).toBeLessThan(2 * 4 * numbers + 60_000)
  model.dispose()
})

test('the EMA of adapters is evaluated, saved as adapters, and resumed', async () => {
  const out = join(folder, 'averaged')
  const data = { ...settings.data, validation: settings.data.training }
  const uninterrupted = await run({ data, ema: 0.8 })
  const plain = await run({ data })
  expect(uninterrupted.losses).toEqual(plain.losses)
  await run({ data, ema: 0.8, out, checkpointEvery: 3, keepCheckpoints: 5 })
  const rest = await run({ data, ema: 0.8, out, resume: join(out, 'checkpoints', 'step-000003') })
  expect(rest.losses).toEqual(uninterrupted.losses.slice(3))
  expect(rest.result.ema?.loss).toBe(uninterrupted.result.ema?.loss)
  expect(rest.result.ema?.loss).not.toBe(rest.result.validation.loss)
  const averaged = await DeepSeek.fromPretrained(modelFolder(out, { ema: true }))
  const { loss } = await evaluate(averaged, data.validation, { sequenceLength: 8, batchSize: 2 })
  expect(loss).toBe(rest.result.ema?.loss)
  averaged.dispose()
})

test('after merging, training writes checkpoints of the complete model', async () => {
  const model = await open()
  await train(model, { ...settings, steps: 2 })
  await mergeAdapters(model)
  const out = join(folder, 'merged')
  await train(model, { ...settings, steps: 2, out })
  const again = await DeepSeek.fromPretrained(modelFolder(out))
  expect(await valuesOf(again)).toEqual(await valuesOf(model))
  for (const one of [model, again]) one.dispose()
})

describe('train rejects', () => {
  const failure = async (options: Partial<TrainOptions>, model: DeepSeek) => {
    const before = await valuesOf(model)
    const error = await train(model, { ...settings, ...options }).then(
      () => new Error('no error'),
      (cause: Error) => cause,
    )
    expect(await valuesOf(model)).toEqual(before)
    model.dispose()
    return error.message
  }

  test('trainable parameters besides adapters, which no checkpoint would contain', async () => {
    const model = await open()
    model.model.norm.weight.trainable = true
    expect(await failure({ out: join(folder, 'beside') }, model)).toMatch(/norm.weight is trainable, but/)
  })

  test('a checkpoint of another base model, of other adapters, and any without adapters', async () => {
    const out = join(folder, 'foreign')
    await run({ out })
    const other = await open()
    other.model.norm.weight.assign(other.model.norm.weight.mul(2))
    expect(await failure({ out, resume: true }, other)).toMatch(/a different base model/)
    const louder = await DeepSeek.fromPretrained(base)
    addAdapters(louder, { rank: 4, alpha: 64 })
    expect(await failure({ out, resume: true }, louder)).toMatch(/differ from those of the module/)
    const larger = await DeepSeek.fromPretrained(base)
    addAdapters(larger, { rank: 5 })
    expect(await failure({ out, resume: true }, larger)).toMatch(/parameters/)
    const stored = await open('int8')
    expect(await failure({ out, resume: true }, stored)).toMatch(/parameters/)
    const none = await DeepSeek.fromPretrained(base)
    expect(await failure({ out, resume: true }, none)).toMatch(/parameters/)
  })
})
