import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { addAdapters, MoeError, namedAdapters, setDefaultBackend } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { DeepSeek } from '@moe/deepseek'
import { modelFolder, TokenDataset, train } from '@moe/trainer'
import { describe, expect, onTestFinished, test } from 'vitest'
import { openFolder } from './open-folder.ts'
import { config, tokenizer } from './test-server.ts'

describe('openFolder rejects folders', () => {
  async function folderOf(files: Readonly<Record<string, string>>): Promise<string> {
    const folder = await mkdtemp(join(tmpdir(), 'moe-folder-'))
    onTestFinished(() => rm(folder, { recursive: true }))
    for (const [name, text] of Object.entries(files)) await writeFile(join(folder, name), text)
    return folder
  }
  const tokenizerFile = JSON.stringify(tokenizer)
  const errorOf = async (folder: string, options = {}) => {
    const error = await openFolder(folder, options).then(
      () => expect.fail('no error'),
      (error: Error) => error,
    )
    expect(['MoeError', 'TokenizerError']).toContain(error.name)
    return error.message
  }

  test('that are neither a model nor a training run', async () => {
    const folder = await folderOf({ 'a.txt': 'text' })
    await mkdir(join(folder, 'checkpoints', 'step-000001'), { recursive: true })
    for (const path of [folder, join(folder, 'missing'), join(folder, 'a.txt'), '']) {
      expect(() => modelFolder(path)).toThrow(MoeError)
      expect(await errorOf(path)).toMatch(path === '' ? /./ : `${path} has neither a config.json nor checkpoints`)
    }
  })

  test('with a missing or corrupt tokenizer', async () => {
    const model = { 'config.json': JSON.stringify(config) }
    expect(await errorOf(await folderOf(model))).toContain('tokenizer.json')
    for (const text of ['', '{', 'null', '[]', '{}', '{"model":{}}'])
      expect(await errorOf(await folderOf({ ...model, 'tokenizer.json': text })), text).toMatch(/tokenizer/i)
  })

  test('without weights, or with a corrupt config', async () => {
    const files = { 'tokenizer.json': tokenizerFile }
    expect(await errorOf(await folderOf({ ...files, 'config.json': JSON.stringify(config) }))).toContain('safetensors')
    for (const text of ['', '{', 'null', '[]', '{}', '"text"', '{"model_type":"llama"}'])
      expect(await errorOf(await folderOf({ ...files, 'config.json': text })), text).toMatch(/config/)
  })

  test('with a missing or corrupt template', async () => {
    const files = { 'config.json': JSON.stringify(config), 'tokenizer.json': tokenizerFile }
    const folder = await folderOf(files)
    expect(await errorOf(folder, { chatTemplate: join(folder, 'none.jinja') })).toContain('none.jinja')
    for (const text of ['', '{', 'null', '[]', '1', '"text"'])
      expect(await errorOf(await folderOf({ ...files, 'tokenizer_config.json': text }))).toMatch(
        /tokenizer_config.json.*JSON/,
      )
    for (const text of [
      '{"chat_template":1}',
      '{"chat_template":[]}',
      '{"chat_template":[1]}',
      '{"chat_template":"{% for %}"}',
    ])
      expect(await errorOf(await folderOf({ ...files, 'tokenizer_config.json': text })), text).toMatch(/template/)
    expect(await errorOf(folder, { chatTemplate: folder })).toContain('cannot read the file')
    expect(await errorOf(await folderOf({ ...files, 'chat_template.jinja': '{% if %}' }))).toMatch(/template/)
  })
})

test('texts start with the begin token if tokenizer_config.json says so, once', async () => {
  setDefaultBackend(referenceBackend())
  const folder = await mkdtemp(join(tmpdir(), 'moe-folder-'))
  onTestFinished(() => rm(folder, { recursive: true }))
  const saved = new DeepSeek(config, { seed: 1 })
  await saved.save(folder)
  saved.dispose()
  const files = async (tokenizerFile: object, settings: object) => {
    await writeFile(join(folder, 'tokenizer.json'), JSON.stringify(tokenizerFile))
    await writeFile(join(folder, 'tokenizer_config.json'), JSON.stringify(settings))
    const { model, tokenizer } = await openFolder(folder)
    model.dispose()
    return tokenizer
  }
  const begin = tokenizer.tokenToId('<|begin|>') as number
  const plain = [...tokenizer.encode('the people')]
  const settings = { add_bos_token: true, bos_token: { content: '<|begin|>' } }
  const own = await files(tokenizer.toJSON(), settings)
  expect([...own.encode('the people')]).toEqual([begin, ...plain])
  expect([...own.encode('the people', { addSpecialTokens: false })]).toEqual(plain)
  expect([...(await files(own.toJSON(), settings)).encode('the people')]).toEqual([begin, ...plain])
  for (const other of [{}, { ...settings, add_bos_token: false }, { add_bos_token: true }])
    expect([...(await files(tokenizer.toJSON(), other)).encode('the people')]).toEqual(plain)
})

test('a training run with adapters opens with its base model, also quantized, and generates the same text as the trained model', async () => {
  setDefaultBackend(referenceBackend())
  const folder = await mkdtemp(join(tmpdir(), 'moe-folder-'))
  onTestFinished(() => rm(folder, { recursive: true }))
  const [base, out] = [join(folder, 'base'), join(folder, 'run')]
  const baseModel = new DeepSeek(config, { seed: 1 })
  await baseModel.save(base)
  baseModel.dispose()
  const model = await DeepSeek.fromPretrained(base)
  addAdapters(model, { rank: 4 })
  const training = TokenDataset.fromTexts(['the better angels of our nature', 'für alle, the people'], tokenizer)
  const quiet = { progress: false, handleSignals: false } as const
  await train(model, {
    data: { training },
    tokenizer,
    steps: 6,
    batchSize: 2,
    sequenceLength: 8,
    lr: 1e-2,
    out,
    ...quiet,
  })
  const expected = await textOf(model)
  model.dispose()
  for (const weights of [undefined, 'int8'] as const) {
    const opened = await openFolder(out, { weights })
    const engine = opened.model.continuousBatch({ maxTexts: 2, precision: 'f32' })
    let text = ''
    const prompt = tokenizer.encode('the')
    for await (const part of engine.generate(prompt, { tokenizer, maxTokens: 12 })) text += part
    if (weights === undefined) expect(text).toBe(expected)
    expect(namedAdapters(opened.model).length).toBeGreaterThan(0)
    engine.dispose()
    opened.model.dispose()
  }
})

async function textOf(model: DeepSeek): Promise<string> {
  let text = ''
  const prompt = tokenizer.encode('the')
  for await (const part of model.generate(prompt, { tokenizer, maxTokens: 12, precision: 'f32' })) text += part
  return text
}
