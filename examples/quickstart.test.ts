/** @file Runs quickstart, generate, chat and rewards as a user would, with few addresses and steps: output files, Ctrl-C, bit-exact --resume. */
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { modelFolder, readMetrics } from '@moe/trainer'
import { afterAll, describe, expect, test } from 'vitest'
import { sendSignal, startProgram } from '../scripts/test-program.ts'

const folder = mkdtempSync(join(tmpdir(), 'moe-quickstart-'))
afterAll(() => rmSync(folder, { recursive: true }))

type Watch = (stderr: string, interrupt: () => void, stdout: string) => void
interface Ended {
  readonly code: number | null
  readonly stdout: string
  readonly stderr: string
}

/** Runs a script. `onOutput` gets all of its output so far. */
function runScript(name: string, args: readonly string[], onOutput: Watch = () => {}, input = ''): Promise<Ended> {
  return new Promise((resolve, reject) => {
    const script = fileURLToPath(new URL(name, import.meta.url))
    const child = startProgram([script, ...args])
    child.stdin.end(input)
    let stdout = ''
    let stderr = ''
    const report = () => onOutput(stderr, () => sendSignal(child, 'SIGINT'), stdout)
    child.stdout.on('data', chunk => {
      stdout += chunk
      report()
    })
    child.stderr.on('data', chunk => {
      stderr += chunk
      report()
    })
    child.on('error', reject)
    child.on('close', code => resolve({ code, stdout, stderr }))
  })
}

const run = (args: readonly string[], onOutput?: Watch) => runScript('quickstart.ts', args, onOutput)

const small = (out: string) => ['--addresses', '4', '--steps', '12', '--batch', '2', '--out', join(folder, out)]
const losses = (out: string) =>
  readMetrics(join(folder, out, 'metrics.jsonl')).map(({ loss, nll, maxVio }) => [loss, nll, maxVio])

test('trains, generates a text and writes a summary', async () => {
  const { code, stdout, stderr } = await run([...small('whole'), '--json'])
  expect(code, stderr).toBe(0)
  const summary = JSON.parse(readFileSync(join(folder, 'whole', 'summary.json'), 'utf8'))
  expect(JSON.parse(stdout)).toMatchObject({ steps: 12 })
  expect(summary).toMatchObject({ steps: 12, interrupted: false })
  for (const number of [
    summary.parameters,
    summary.activeParameters,
    summary.tokensPerSecond,
    summary.trainSeconds,
    summary.validation.bitsPerByte,
    summary.balance.maxVio,
    summary.mtp.acceptance,
    summary.peakMemoryBytes,
  ]) {
    expect(number).toBeGreaterThanOrEqual(0)
  }
  expect(typeof summary.backend).toBe('string')
  expect(losses('whole')).toHaveLength(12)
  expect(existsSync(join(summary.checkpoint, 'model', 'model.safetensors'))).toBe(true)
})

test('Ctrl-C saves and prints how to resume; --resume continues the run bit-exactly', async () => {
  let sent = false
  const first = await run(small('parts'), (text, interrupt) => {
    if (sent || !/step +[3-9]\/12/.test(text)) return
    sent = true
    interrupt()
  })
  expect(first.code, first.stderr).toBe(130)
  expect(first.stderr).toMatch(/Stopped after step \d+ of 12\. Resume with: {2}npm start -- .*--resume/)
  expect(losses('parts').length).toBeLessThan(12)
  const second = await run([...small('parts'), '--resume'])
  expect(second.code, second.stderr).toBe(0)
  expect(losses('parts')).toEqual(losses('whole'))
})

test('invalid options fail with a fix in the message', async () => {
  const { code, stderr } = await run([...small('bad').slice(0, -1), fileURLToPath(import.meta.url)])
  expect(code).toBe(1)
  expect(stderr).toMatch(/the folder .* cannot be used: .*; choose another out/)
  expect(stderr).not.toMatch(/\n +at /)
})

test.each([
  ['--precision', 'f8', 'expected one of f32, bf16, fp8'],
  ['--batch', '0', 'expected an integer of at least 1'],
  ['--steps', '2.5', 'expected an integer of at least 1'],
  ['--addresses', '1', 'expected an integer of at least 2'],
  ['--minutes', '0', 'expected a number above 0'],
])('%s %s is rejected before anything is written', async (option, value, what) => {
  const { code, stderr } = await run([option, value])
  expect([code, stderr]).toEqual([2, `${option} is "${value}", ${what}\nSee npm start -- --help.\n`])
})

test('--help lists the options', async () => {
  const { code, stdout } = await run(['--help'])
  expect(code).toBe(0)
  expect(stdout).toMatch(/--resume/)
})

describe('generate.ts', () => {
  const generate = (args: readonly string[], input?: string, onOutput?: Watch) =>
    runScript('generate.ts', args, onOutput, input)

  test('continues a text with the trained run, reproducibly by seed', async () => {
    const args = [join(folder, 'whole'), 'We are', '--max-tokens', '12', '--seed', '3', '--speculative']
    const { code, stdout, stderr } = await generate(args)
    expect(code, stderr).toBe(0)
    expect(stdout).toMatch(/^We are.+\n$/s)
    expect(stderr).toMatch(/12 tokens after a prompt of \d+, \d+ tokens\/s, \d\.\d\d tokens per pass/)
    expect((await generate(args)).stdout).toBe(stdout)
  })

  test('reads the prompt from standard input, quantizes weights, and prints JSON', async () => {
    const args = [join(folder, 'whole'), '--max-tokens', '5', '--weights', 'int8', '--json', '--quiet']
    const { code, stdout, stderr } = await generate(args, 'We are\n')
    expect(code).toBe(0)
    expect(stderr).toBe('')
    expect(JSON.parse(stdout)).toMatchObject({ prompt: 'We are', text: expect.any(String), tokens: 5, steps: 5 })
  })

  test('Ctrl-C ends the generation', async () => {
    const args = [join(folder, 'whole'), 'We are', '--max-tokens', '1000000', '--temperature', '0']
    let interrupted = false
    const { code, stdout } = await generate(args, '', (_, interrupt, text) => {
      if (interrupted || text.length <= 'We are'.length) return
      interrupted = true
      interrupt()
    })
    expect(code).toBe(130)
    expect(stdout).toMatch(/^We are.*\n$/s)
  })

  test.each([
    [[], 2, /^missing FOLDER\nSee npm run generate -- --help\.\n$/],
    [['nowhere', 'x'], 1, /nowhere has neither a config.json nor checkpoints.*npm start/],
    [['nowhere', 'two', 'words'], 2, /^unexpected argument "words"\nSee /],
    [['nowhere', '--nope'], 2, /^unknown option --nope\nSee /],
    [['nowhere', '--weights', 'int2'], 2, /--weights is "int2", expected one of bf16, fp8, int8, int4/],
    [['nowhere', '--top-p', 'most'], 2, /--top-p is "most", expected a number/],
  ])('%j fails with a message that says what to do', async (args, status, message) => {
    const { code, stderr } = await generate(args)
    expect(code).toBe(status)
    expect(stderr).toMatch(message)
    expect(stderr).not.toMatch(/\n +at /)
  })
})

describe('fine-tuning.ts', () => {
  test('fine-tunes the run and saves the model with its chat template', async () => {
    const out = join(folder, 'chat')
    const { code, stdout, stderr } = await runScript('fine-tuning.ts', [
      '--from',
      join(folder, 'whole'),
      '--out',
      out,
      '--steps',
      '1',
      '--questions',
      '2',
    ])
    expect(code, stderr).toBe(0)
    expect(stdout).toMatch(
      /^evaluated on 2 passages.*\nyear +median error \d+ .*\nspeaker +\d of 2 .*\ntry it +npm run chat -- .*chat\n$/,
    )
    const config = JSON.parse(readFileSync(join(modelFolder(out), 'tokenizer_config.json'), 'utf8'))
    expect(config).toMatchObject({
      eos_token: '<｜end▁of▁sentence｜>',
      chat_template: expect.stringContaining('Assistant: '),
    })
  })

  test('rewards.ts continues from that model', async () => {
    const out = join(folder, 'rewards')
    const from = join(folder, 'chat')
    const args = ['--from', from, '--out', out, '--steps', '1', '--questions', '4']
    const { code, stdout, stderr } = await runScript('rewards.ts', args)
    expect(code, stderr).toBe(0)
    expect(stdout).toMatch(/^evaluated on 4 passages.*\nbefore {2}\d+\.\d % .*\nafter {3}\d+\.\d %\ntry it/)
    expect(existsSync(join(modelFolder(out), 'tokenizer_config.json'))).toBe(true)
  })

  test('without a run, the message says how to create one', async () => {
    const { code, stderr } = await runScript('fine-tuning.ts', ['--from', join(folder, 'nowhere')])
    expect(code).toBe(1)
    expect(stderr).toMatch(/nowhere does not exist: train a model with npm start/)
  })
})
