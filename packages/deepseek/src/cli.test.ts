import { spawnSync } from 'node:child_process'
import { cpSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { readGguf } from '@moe/checkpoint'
import { setDefaultBackend } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { afterAll, expect, test } from 'vitest'
import { cases } from './gguf/test-cases.ts'
import { modelOf, tokenizerWith } from './gguf/test-model.ts'

setDefaultBackend(referenceBackend())

const folder = mkdtempSync(join(tmpdir(), 'moe-deepseek-cli-'))
afterAll(() => rmSync(folder, { recursive: true }))

const cli = fileURLToPath(new URL('cli.ts', import.meta.url))

function node(...args: string[]) {
  const { status, stdout, stderr } = spawnSync(process.execPath, args, { encoding: 'utf8', cwd: folder })
  return { status, stdout, stderr }
}

const run = (...args: string[]) => node(cli, ...args)

test('export-gguf exports the folder of a model, of a checkpoint or of a training run', async () => {
  const model = modelOf(cases.v3)
  await model.save(join(folder, 'model'))
  model.dispose()
  expect(run('export-gguf', 'model', '--json')).toMatchObject({
    status: 1,
    stdout: expect.stringContaining('model has no tokenizer.json'),
  })
  await tokenizerWith('deepseek-v3').save(join(folder, 'model', 'tokenizer.json'))
  const { stdout, stderr, status } = run('export-gguf', 'model', '--type', 'q4_0')
  expect({ stderr, status }).toEqual({ stderr: '', status: 0 })
  expect(stdout).toMatch(/^model-q4_0.gguf: \d+ tensors, 0.\d MB\nnote: the MTP modules are not exported\n$/)
  const terminal = ['--import', 'data:text/javascript,process.stderr.isTTY=true']
  const seen = node(...terminal, cli, 'export-gguf', 'model', '--type', 'q4_0')
  expect(seen).toMatchObject({ status: 0, stdout, stderr: expect.stringMatching(/\d+%\s+\S/) })
  await using file = await readGguf(join(folder, 'model-q4_0.gguf'))
  expect(file.metadata.get('general.name')?.value).toBe('model')
  // The folder of a training run, and of its checkpoint.
  const checkpoints = join(folder, 'first', 'checkpoints')
  cpSync(join(folder, 'model'), join(checkpoints, 'step-000003', 'model'), { recursive: true })
  writeFileSync(join(checkpoints, 'latest'), 'step-000003\n')
  writeFileSync(join(checkpoints, 'step-000003', 'trainer.json'), '{}')
  for (const [place, name] of [
    ['first', 'first'],
    ['first/checkpoints/step-000003', 'step-000003'],
  ]) {
    const exported = run('export-gguf', place, '--type', 'q4_0')
    expect(exported).toMatchObject({ status: 0, stdout: stdout.replace('model-q4_0', `${name}-q4_0`) })
  }
})

test('exits with 1 for failures and 2 for usage errors', () => {
  expect(run('--help')).toMatchObject({ status: 0 })
  expect(run()).toMatchObject({ status: 2, stdout: '', stderr: expect.stringContaining('missing COMMAND') })
  expect(run('unknown')).toMatchObject({ status: 2, stderr: expect.stringContaining('unknown command unknown') })
  for (const args of [
    ['unknown'],
    ['export-gguf'],
    ['export-gguf', 'a', 'b', 'c'],
    ['export-gguf', 'a', '--nope'],
    [],
  ]) {
    const { status, stdout, stderr } = run(...args, '--json')
    expect([status, JSON.parse(stdout).error.code, stderr]).toEqual([2, 'E_USAGE', ''])
  }
  expect(run('export-gguf', 'model', '--nope')).toMatchObject({
    status: 2,
    stderr: 'moe-deepseek: unknown option --nope\nSee moe-deepseek --help.\n',
  })
  expect(run('export-gguf', 'model', '--type', 'q5_k')).toMatchObject({
    status: 2,
    stderr: expect.stringContaining('--type is "q5_k", expected one of f32'),
  })
  expect(run('export-gguf', 'missing')).toMatchObject({ status: 1, stderr: expect.stringContaining('config.json') })
  expect(run('export-gguf', 'model', '--tokenizer', 'missing.json')).toMatchObject({
    status: 1,
    stderr: expect.stringContaining('missing.json'),
  })
})
