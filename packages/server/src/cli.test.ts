/** @file The command `moe-serve`, as a process. */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { setDefaultBackend } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { DeepSeek } from '@moe/deepseek'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { readArguments, UsageError } from './arguments.ts'
import { config, post, tokenizer } from './test-server.ts'

const cli = fileURLToPath(new URL('cli.ts', import.meta.url))
const folder = mkdtempSync(join(tmpdir(), 'moe-serve-cli-'))

beforeAll(async () => {
  setDefaultBackend(referenceBackend())
  const model = new DeepSeek(config, { seed: 1 })
  await model.save(join(folder, 'model'))
  model.dispose()
  await tokenizer.save(join(folder, 'model', 'tokenizer.json'))
})
afterAll(() => rmSync(folder, { recursive: true }))

function run(...args: string[]) {
  const { status, stdout, stderr } = spawnSync(process.execPath, [cli, ...args], { encoding: 'utf8', cwd: folder })
  return { status, stdout, stderr }
}

test('exits with 1 for failures and 2 for usage errors', { timeout: 240_000 }, () => {
  expect(run('--help')).toMatchObject({ status: 0, stdout: expect.stringMatching(/^Usage: moe-serve/), stderr: '' })
  expect(run('--version')).toMatchObject({ status: 0, stdout: expect.stringMatching(/^\d+\.\d+\.\d+\n$/), stderr: '' })
  expect(run('missing')).toMatchObject({
    status: 1,
    stdout: '',
    stderr: expect.stringContaining('missing has neither a config.json nor checkpoints'),
  })
  expect(run()).toEqual({ status: 2, stdout: '', stderr: 'moe-serve: missing FOLDER\nSee moe-serve --help.\n' })
  const { status, stdout, stderr } = run('model', '--ports', '1', '--json')
  const error = { code: 'E_USAGE', message: 'unknown option --ports' }
  expect([status, JSON.parse(stdout), stderr]).toEqual([2, { error }, ''])
})

test('of several processes, the first one reports usage errors', () => {
  const env = { ...process.env, OMPI_COMM_WORLD_RANK: '1' }
  const { status, stdout, stderr } = spawnSync(process.execPath, [cli, '--ranks'], { encoding: 'utf8', env })
  expect({ status, stdout, stderr }).toEqual({ status: 0, stdout: '', stderr: '' })
})

test.each([
  ['expected one FOLDER, got 2', 'model', 'other'],
  ['--port is "65536", expected an integer from 0 to 65535', '--port', '65536'],
  ['--port is "", expected an integer', '--port', ''],
  ['--port is "1.5", expected an integer', '--port', '1.5'],
  ['--body-limit is "0", expected a number from 0.001 to 1024', '--body-limit', '0'],
  ['--max-texts is "0", expected an integer from 1 to 1024', '--max-texts', '0'],
  ['--weights is "int2", expected one of bf16, fp8, int8, int4', '--weights', 'int2'],
])('usage error: %s', (message, ...args) => {
  expect(() => readArguments(args)).toThrow(UsageError)
  expect(() => readArguments(args)).toThrow(message)
})

test('numbers at the limits of options are accepted', () => {
  const most = ['--port', '65535', '--body-limit', '1024', '--max-texts', '1024', '--threads', '256']
  expect(readArguments(most)).toMatchObject({ port: 65535, bodyLimit: 2 ** 30, maxTexts: 1024, threads: 256 })
  expect(readArguments(['--port', '0', '--body-limit', '0.5'])).toMatchObject({ port: 0, bodyLimit: 2 ** 19 })
})

async function untilOutput(child: ChildProcess, pattern: RegExp): Promise<RegExpExecArray> {
  let text = ''
  for await (const part of child.stdout ?? []) {
    text += part
    const found = pattern.exec(text)
    if (found) return found
  }
  throw new Error(`the process ended after: ${text}`)
}

test.skipIf(process.platform === 'win32' /* no signals */)('serves a folder until it is interrupted', async () => {
  const child = spawn(process.execPath, [cli, 'model', '--port', '0', '--json', '--quiet'], { cwd: folder })
  const exit = new Promise(resolve => child.once('exit', resolve))
  try {
    const [, url] = await untilOutput(child, /"url":"(.*?)"/)
    const response = await fetch(`${url}/v1/completions`, post({ prompt: 'the', max_tokens: 3, temperature: 0 }))
    expect(await response.json()).toMatchObject({ model: 'model', usage: { completion_tokens: 3 } })
  } finally {
    child.kill('SIGINT')
  }
  expect(await exit).toBe(0)
})

test('--chat answers a message from a pipe, and needs a chat template', () => {
  writeFileSync(join(folder, 'chat.jinja'), '{% for m in messages %}{{ m.content }}{% endfor %}')
  const ask = (...args: string[]) =>
    spawnSync(process.execPath, [cli, 'model', '--chat', ...args], { encoding: 'utf8', cwd: folder, input: 'the\n' })
  const { status, stdout } = ask('--chat-template', 'chat.jinja', '--json')
  expect(JSON.parse(stdout)).toMatchObject({ role: 'assistant', usage: { prompt_tokens: 1 } })
  expect(status).toBe(0)
  expect(ask()).toMatchObject({ status: 2, stdout: '', stderr: expect.stringContaining('model has no chat template') })
})

const launcher = ['mpirun.openmpi', 'mpirun'].find(name => spawnSync(name, ['--version']).status === 0)

test.skipIf(launcher === undefined)(
  '--ranks serves with the experts of two processes, as one process does',
  async () => {
    const texts: unknown[] = []
    for (const start of [
      [launcher as string, '--oversubscribe', '-np', '2', process.execPath, cli, '--ranks', '--weights', 'int8'],
      [process.execPath, cli, '--weights', 'int8'],
    ]) {
      const [command, ...args] = [...start, 'model', '--port', '0', '--json', '--quiet', '--speculative']
      const env = { ...process.env, OMPI_ALLOW_RUN_AS_ROOT: '1', OMPI_ALLOW_RUN_AS_ROOT_CONFIRM: '1' }
      const child = spawn(command, args, { cwd: folder, env })
      const exit = new Promise(resolve => child.once('exit', resolve))
      try {
        const [, url] = await untilOutput(child, /"url":"(.*?)"/)
        const ask = async (prompt: string) => {
          const response = await fetch(`${url}/v1/completions`, post({ prompt, max_tokens: 12, temperature: 0 }))
          return ((await response.json()) as { choices: [{ text: string }] }).choices[0].text
        }
        texts.push(await Promise.all(['the', 'angels of', 'people'].map(ask)))
      } finally {
        child.kill('SIGTERM')
      }
      await exit
    }
    expect(texts[0]).toEqual(texts[1])
  },
)
