import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { MoeError } from '@moe/core'
import { modelFolder } from '@moe/trainer'
import { describe, expect, onTestFinished, test } from 'vitest'
import { openFolder } from './open-folder.ts'
import { config, tokenizer } from './test-server.ts'

describe('folders that are none', () => {
  async function folderOf(files: Readonly<Record<string, string>>): Promise<string> {
    const folder = await mkdtemp(join(tmpdir(), 'moe-folder-'))
    onTestFinished(() => rm(folder, { recursive: true }))
    for (const [name, text] of Object.entries(files)) await writeFile(join(folder, name), text)
    return folder
  }
  const tokenizerFile = JSON.stringify(tokenizer)
  const wrong = async (folder: string, options = {}) => {
    const error = await openFolder(folder, options).then(
      () => expect.fail('it opened'),
      (error: Error) => error,
    )
    expect(['MoeError', 'TokenizerError']).toContain(error.name)
    return error.message
  }

  test('neither a model nor a run', async () => {
    const folder = await folderOf({ 'a.txt': 'text' })
    await mkdir(join(folder, 'checkpoints', 'step-000001'), { recursive: true })
    for (const path of [folder, join(folder, 'missing'), join(folder, 'a.txt'), '']) {
      expect(() => modelFolder(path)).toThrow(MoeError)
      expect(await wrong(path)).toMatch(path === '' ? /./ : `${path} has neither a config.json nor checkpoints`)
    }
  })

  test('without a tokenizer, or with one that is damaged', async () => {
    const model = { 'config.json': JSON.stringify(config) }
    expect(await wrong(await folderOf(model))).toContain('tokenizer.json')
    for (const text of ['', '{', 'null', '[]', '{}', '{"model":{}}'])
      expect(await wrong(await folderOf({ ...model, 'tokenizer.json': text })), text).toMatch(/tokenizer/i)
  })

  test('without weights, or with a config that is damaged', async () => {
    const files = { 'tokenizer.json': tokenizerFile }
    expect(await wrong(await folderOf({ ...files, 'config.json': JSON.stringify(config) }))).toContain('safetensors')
    for (const text of ['', '{', 'null', '[]', '{}', '"text"', '{"model_type":"llama"}'])
      expect(await wrong(await folderOf({ ...files, 'config.json': text })), text).toMatch(/config/)
  })

  test('with a template that is missing or damaged', async () => {
    const files = { 'config.json': JSON.stringify(config), 'tokenizer.json': tokenizerFile }
    const folder = await folderOf(files)
    expect(await wrong(folder, { chatTemplate: join(folder, 'none.jinja') })).toContain('none.jinja')
    for (const text of ['', '{', 'null', '[]', '1', '"text"'])
      expect(await wrong(await folderOf({ ...files, 'tokenizer_config.json': text }))).toMatch(
        /tokenizer_config.json.*JSON/,
      )
    for (const text of [
      '{"chat_template":1}',
      '{"chat_template":[]}',
      '{"chat_template":[1]}',
      '{"chat_template":"{% for %}"}',
    ])
      expect(await wrong(await folderOf({ ...files, 'tokenizer_config.json': text })), text).toMatch(/template/)
    expect(await wrong(folder, { chatTemplate: folder })).toContain('cannot be read')
    expect(await wrong(await folderOf({ ...files, 'chat_template.jinja': '{% if %}' }))).toMatch(/template/)
  })
})
