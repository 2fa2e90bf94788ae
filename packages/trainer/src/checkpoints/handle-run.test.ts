import { addAdapters, disposeModule, setDefaultBackend, stateDict } from '@moe/core'
import { beforeAll, expect, test } from 'vitest'
import { TestDirectory } from '../../../../scripts/test-directory.ts'
import type { TrainOptions } from '../options.ts'
import { BigramModel, letterData, letters, roundingBackend } from '../test-model.ts'
import { train } from '../train.ts'
import { modelFolder } from './model-folder.ts'

const backend = roundingBackend()
beforeAll(() => setDefaultBackend(backend))

const settings = { data: letterData(), steps: 12, batchSize: 3, sequenceLength: 8, lr: 0.05, seed: 7, progress: false }

/** Trains a new model. Returns the result, the losses by step and the weights. */
async function run(options: Partial<TrainOptions> & { stopAfter?: number }) {
  const { stopAfter, ...rest } = options
  const model = new BigramModel()
  const controller = new AbortController()
  const losses: Record<number, number> = {}
  try {
    const result = await train(model, {
      ...settings,
      ...rest,
      signal: controller.signal,
      onEvent(event) {
        if (event.type !== 'step') return
        losses[event.step] = event.loss
        if (event.step === stopAfter) controller.abort()
      },
    })
    const weights = await Promise.all(
      stateDict(model).map(async ({ name, data }) => [name, Array.from(await data())] as const),
    )
    return { result, losses, weights }
  } finally {
    disposeModule(model)
  }
}

const folderAt = (folder: TestDirectory, ...path: string[]) =>
  path.reduce((at, name) => at.entries.get(name) as TestDirectory, folder)
const checkpointsOf = (folder: TestDirectory) => [...folderAt(folder, 'checkpoints').entries.keys()].sort()
const write = async (folder: TestDirectory, name: string, text: string) => {
  const file = await (await folder.getFileHandle(name, { create: true })).createWritable()
  await file.write(new TextEncoder().encode(text))
  await file.close()
}

test('a stopped run resumes bit for bit, and the last checkpoints are kept', async () => {
  const [whole, out] = [new TestDirectory('whole'), new TestDirectory('run')]
  const expected = await run({ out: whole, checkpointEvery: 3 })
  expect(checkpointsOf(whole)).toEqual(['latest', 'step-000009', 'step-000012'])
  expect(expected.result.checkpoint).toBe('whole/checkpoints/step-000012')
  const first = await run({ out, stopAfter: 5 })
  expect(first.result).toMatchObject({ interrupted: true, checkpoint: 'run/checkpoints/step-000005' })
  const second = await run({ out, resume: true })
  expect({ ...first.losses, ...second.losses }).toEqual(expected.losses)
  expect(second.weights).toEqual(expected.weights)
  expect([...out.entries.keys()].sort()).toEqual(['checkpoints', 'summary.json'])
})

test('a checkpoint contains the same as one on disk', async () => {
  const out = new TestDirectory('run')
  const tokenizer = { ...letters, idToToken: (id: number) => `<${id}>`, toJSON: () => ({ version: '1.0' }) }
  await run({ out, steps: 2, tokenizer })
  const checkpoint = folderAt(out, 'checkpoints', 'step-000002')
  expect([...checkpoint.entries.keys()].sort()).toEqual(['model', 'optimizer.safetensors', 'trainer.json'])
  const files = ['model.safetensors', 'tokenizer.json', 'tokenizer_config.json']
  expect([...folderAt(checkpoint, 'model').entries.keys()].sort()).toEqual(files)
})

test('modelFolder returns the model of a checkpoint or of the latest one of a run, or the given folder of a model', async () => {
  const out = new TestDirectory('run')
  await expect(modelFolder(out)).rejects.toMatchObject({ code: 'E_CHECKPOINT', op: 'modelFolder' })
  await run({ out, checkpointEvery: 5, steps: 6 })
  const found = await modelFolder(out)
  expect(found).toBe(folderAt(out, 'checkpoints', 'step-000006', 'model'))
  const earlier = folderAt(out, 'checkpoints', 'step-000005')
  expect(await modelFolder(earlier)).toBe(folderAt(earlier, 'model'))
  await expect(modelFolder(out, { ema: true })).rejects.toThrow('run/checkpoints/step-000006 has no averaged weights')
  await write(found as TestDirectory, 'config.json', '{}')
  expect(await modelFolder(found)).toBe(found)
})

test('the EMA of the weights is saved as a second model, and resumed', async () => {
  const [whole, out] = [new TestDirectory('whole'), new TestDirectory('run')]
  const { result } = await run({ out: whole, ema: 0.9 })
  await run({ out, ema: 0.9, stopAfter: 5 })
  expect((await run({ out, ema: 0.9, resume: true })).result.ema?.loss).toBe(result.ema?.loss)
  expect(await modelFolder(out, { ema: true })).toBe(folderAt(out, 'checkpoints', 'step-000012', 'ema'))
})

test('an incomplete checkpoint is ignored, and removed later', async () => {
  const out = new TestDirectory('run')
  await run({ out, stopAfter: 4 })
  const half = await folderAt(out, 'checkpoints').getDirectoryHandle('step-000005', { create: true })
  await half.getFileHandle('trainer.json', { create: true })
  await write(folderAt(out, 'checkpoints'), 'latest', 'step-000005\n')
  const { losses } = await run({ out, resume: true, keepCheckpoints: 1 })
  expect(Object.keys(losses)[0]).toBe('5')
  expect(checkpointsOf(out)).toEqual(['latest', 'step-000012'])
})

test('a full storage is an error that names the previous checkpoint, which stays', async () => {
  const out = new TestDirectory('run')
  await run({ out, stopAfter: 4 })
  out.quota.bytes = 500
  await expect(run({ out, resume: true })).rejects.toMatchObject({
    code: 'E_CHECKPOINT',
    op: 'run/checkpoints/step-000012',
    message: expect.stringContaining('run/checkpoints/step-000004 is intact'),
  })
  expect(checkpointsOf(out)).toEqual(['latest', 'step-000004'])
})

test('the error of a corrupt checkpoint names an intact one, which can be resumed by name', async () => {
  const out = new TestDirectory('run')
  await run({ out, checkpointEvery: 4 })
  await write(folderAt(out, 'checkpoints', 'step-000012'), 'optimizer.safetensors', 'nothing of the kind')
  const whole = 'run/checkpoints/step-000008'
  await expect(run({ out, resume: true })).rejects.toMatchObject({ code: 'E_CHECKPOINT', details: { whole } })
  await expect(run({ out, resume: 'run/checkpoints/step-000009' })).rejects.toMatchObject({
    code: 'E_CHECKPOINT',
    message: expect.stringContaining(`pass one of ${whole}, run/checkpoints/step-000012`),
  })
  const { losses, result } = await run({ out, resume: whole })
  expect(Object.keys(losses)).toEqual(['9', '10', '11', '12'])
  expect(result.checkpoint).toBe('run/checkpoints/step-000012')
})

test('rejects a finished run without overwrite', async () => {
  const out = new TestDirectory('run')
  await run({ out })
  await expect(run({ out })).rejects.toMatchObject({ code: 'E_CONFIG', message: expect.stringContaining('overwrite') })
  await run({ out, steps: 2, overwrite: true })
  expect(checkpointsOf(out)).toEqual(['latest', 'step-000002'])
})

test('saving adapters is not supported', async () => {
  const model = new BigramModel()
  addAdapters(model, { rank: 2 })
  await expect(train(model, { ...settings, out: new TestDirectory('run') })).rejects.toMatchObject({
    code: 'E_UNSUPPORTED',
  })
  disposeModule(model)
})
