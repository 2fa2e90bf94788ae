import { spawn, spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { setDefaultBackend } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { DeepSeek, presets } from '@moe/deepseek'
import { trainBpe } from '@moe/tokenizer-bpe'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { isFirstProcess, readArguments, requestOf, UsageError } from './arguments.ts'
import { evaluateTask, tasks } from './index.ts'

setDefaultBackend(referenceBackend())
const folder = await mkdtemp(join(tmpdir(), 'moe-evaluate-'))
afterAll(() => rm(folder, { recursive: true }))

const cli = fileURLToPath(new URL('cli.ts', import.meta.url))
function run(...args: string[]) {
  const { status, stdout, stderr } = spawnSync(process.execPath, [cli, ...args], { encoding: 'utf8', cwd: folder })
  return { status, stdout, stderr }
}

const tokenizer = trainBpe(['the better angels of our nature'], {
  vocabSize: 280,
  specialTokens: ['<|end|>', '<|begin|>'],
  minFrequency: 1,
})
const bos = tokenizer.tokenToId('<|begin|>') as number
const lines = Array.from({ length: 12 }, (_, i) => ({
  goal: `the ${i}`,
  sol1: 'angels',
  sol2: `nature ${i}`,
  label: i % 2,
}))
const model = new DeepSeek(
  {
    ...presets.tiny,
    vocab_size: 300,
    hidden_size: 32,
    num_hidden_layers: 2,
    num_attention_heads: 2,
    max_position_embeddings: 48,
  },
  { seed: 3 },
)

beforeAll(async () => {
  await model.save(join(folder, 'model'))
  await tokenizer.save(join(folder, 'model', 'tokenizer.json'))
  const config = { add_bos_token: true, bos_token: { content: '<|begin|>' }, eos_token: '<|end|>' }
  writeFileSync(join(folder, 'model', 'tokenizer_config.json'), JSON.stringify(config))
  writeFileSync(join(folder, 'piqa.jsonl'), lines.map(line => `${JSON.stringify(line)}\n`).join(''))
  writeFileSync(join(folder, 'text.txt'), 'the angels of our better nature\n'.repeat(3))
  writeFileSync(
    join(folder, 'own.json'),
    JSON.stringify({ name: 'own', kind: 'continuation', context: 'goal', answer: 'sol1' }),
  )
})
afterAll(() => model.dispose())

test('prints a table of metrics', () => {
  const { status, stdout, stderr } = run(
    'model',
    '--task',
    'piqa=piqa.jsonl',
    '--task',
    'text=text.txt',
    '--shots',
    '0',
  )
  expect({ status, stderr }).toEqual({ status: 0, stderr: '' })
  expect(stdout.split('\n').map(line => line.replace(/[\d.]+/g, 'N').replace(/ +/g, ' '))).toEqual([
    'task metric value items shots items/s',
    'piqa acc N ± N N N N',
    'piqa acc_norm N ± N N N N',
    'piqa acc_bytes N ± N N N N',
    'text word_perplexity N N N N',
    'text byte_perplexity N N N N',
    'text bits_per_byte N N N N',
    '',
  ])
})

test('patterns that the shell left as they are stand for all files that match', () => {
  mkdirSync(join(folder, 'parts', 'more'), { recursive: true })
  const texts = { 'b.txt': 'the nature of angels\n', 'a.txt': 'the better angels\n', 'more/c.txt': 'our nature\n' }
  for (const [name, text] of Object.entries(texts)) writeFileSync(join(folder, 'parts', name), text)
  const { stdout, status } = run(
    ...['model', '--task', 'text=parts/**/*.txt', '--task', 'piqa=piq?.jsonl', '--examples', 'piqa=*.jsonl', '--json'],
    ...['--items', 'of-patterns.jsonl', '--shots', '0'],
  )
  expect(status).toBe(0)
  const [text, piqa] = JSON.parse(stdout).results
  expect(text.items).toBe(3)
  expect(text.file.map(({ path }: { path: string }) => path)).toEqual(
    ['a.txt', 'b.txt', 'more/c.txt'].map(name => join('parts', name)),
  )
  expect([piqa.items, piqa.file.path]).toEqual([12, 'piqa.jsonl'])
  const [first] = readFileSync(join(folder, 'of-patterns.jsonl'), 'utf8').split('\n')
  expect(JSON.parse(first)).toMatchObject({ task: 'text', location: join('parts', 'a.txt') })
})

test('--json prints everything needed to reproduce the results, --items writes the result of each item', async () => {
  const { status, stdout } = run(
    ...[
      'model',
      '--task',
      'piqa=piqa.jsonl',
      '--task',
      'own.json=piqa.jsonl',
      '--limit',
      '8',
      '--shots',
      '2',
      '--seed',
      '5',
      '--json',
    ],
    ...['--items', 'items.jsonl', '--weights', 'bf16', '--precision', 'f32'],
  )
  expect(status).toBe(0)
  const output = JSON.parse(stdout)
  const sha256 = createHash('sha256')
    .update(readFileSync(join(folder, 'piqa.jsonl')))
    .digest('hex')
  expect(output).toMatchObject({
    package: { name: '@moe/evaluation' },
    model: { folder: 'model', weights: 'bf16', precision: 'f32', bos, prefix: bos },
    results: [
      { task: 'piqa', items: 8, limit: 8, shots: 2, draw: 'each', seed: 5, file: { path: 'piqa.jsonl', sha256 } },
      { task: 'own', items: 8, definition: { kind: 'continuation' } },
    ],
  })
  expect(output.results[0]).not.toHaveProperty('definition')
  const items = readFileSync(join(folder, 'items.jsonl'), 'utf8')
    .trim()
    .split('\n')
    .map(line => JSON.parse(line))
  expect(items).toHaveLength(16)
  expect(items[3]).toMatchObject({ task: 'piqa', item: 3, location: 'piqa.jsonl:4', answer: 1 })
  expect(items[11]).toMatchObject({ task: 'own', item: 3, answer: 'angels' })
  // The same metrics as evaluateTask.
  const options = { tokenizer, bos, shots: 2, seed: 5, limit: 8 }
  const expected = await evaluateTask(model, tasks.piqa, lines, options)
  expect(output.results[0].metrics.acc_norm.value).toBeCloseTo(expected.metrics.acc_norm.value, 12)
  const { stdout: without } = run(
    'model',
    '--task',
    'own.json=piqa.jsonl',
    '--bos',
    'none',
    '--json',
    '--draw',
    'once',
    '--shots',
    '1',
  )
  expect(JSON.parse(without)).toMatchObject({ model: { bos: null }, results: [{ draw: 'once' }] })
})

test('exits with 1 for failures and 2 for usage errors', { timeout: 240_000 }, () => {
  expect(run('--help')).toMatchObject({ status: 0, stdout: expect.stringContaining('gsm8k') })
  expect(run('--version')).toMatchObject({ status: 0, stdout: expect.stringMatching(/^\d+\.\d+\.\d+\n$/) })
  expect(run('model', '--tasks', 'piqa=piqa.jsonl')).toEqual({
    status: 2,
    stdout: '',
    stderr: 'moe-evaluate: unknown option --tasks\nSee moe-evaluate --help.\n',
  })
  expect(run('model', '--task', 'piqa=piqa.jsonl', '--bos', '<s>')).toMatchObject({
    status: 1,
    stdout: '',
    stderr: expect.stringContaining('the tokenizer has no token <s>'),
  })
  for (const [args, expected, code] of [
    [[], 2, 'E_USAGE'],
    [['model', '--task', 'piqa=missing.jsonl'], 1, 'E_DATA'],
  ] as const) {
    const { status, stdout, stderr } = run(...args, '--json')
    expect([status, JSON.parse(stdout).error.code, stderr]).toEqual([expected, code, ''])
  }
})

test('of several processes, the first one reports usage errors', () => {
  const env = { ...process.env, OMPI_COMM_WORLD_RANK: '1' }
  const { status, stdout, stderr } = spawnSync(process.execPath, [cli, '--ranks'], { encoding: 'utf8', env })
  expect({ status, stdout, stderr }).toEqual({ status: 0, stdout: '', stderr: '' })
  expect(isFirstProcess({ PMI_RANK: '0', SLURM_PROCID: '2' })).toBe(true)
  expect(isFirstProcess({ SLURM_PROCID: '2' })).toBe(false)
  expect(isFirstProcess({})).toBe(true)
})

const file = (name: string) => join(folder, name)

test.each([
  ['missing FOLDER'],
  ['missing --task', 'model'],
  ['--task is "piqa", expected NAME=FILE', 'model', '--task', 'piqa'],
  ['--task is "=a", expected NAME=FILE', 'model', '--task', '=a'],
  ['--task is "piqa=", expected NAME=FILE', 'model', '--task', 'piqa='],
  ['unknown task quiz', 'model', '--task', 'quiz=piqa.jsonl'],
  ['expected one FOLDER, got 2', 'model', 'other', '--task', 'piqa=piqa.jsonl'],
  ['--limit is "x", expected an integer of at least 1', 'model', '--limit', 'x'],
  ['--limit is "0", expected an integer of at least 1', 'model', '--limit', '0'],
  ['--draw is "last", expected one of each, once, first', 'model', '--draw', 'last'],
  ['--examples own: no --task has this name', 'model', '--task', 'piqa=a', '--examples', 'own=a'],
  ['--examples piqa is given twice', 'model', '--task', 'piqa=a', '--examples', 'piqa=a', '--examples', 'piqa=b'],
  [
    '--shots: text is a text task, which has no examples',
    ...['model', '--task', `piqa=${file('piqa.jsonl')}`, '--task', `text=${file('text.txt')}`, '--shots', '1'],
  ],
])('usage error: %s', async (message, ...args) => {
  const request = async () => requestOf(readArguments(args))
  await expect(request).rejects.toThrow(UsageError)
  await expect(request).rejects.toThrow(message)
})

test.each([
  ['--task piqa: no file matches missing.jsonl in', 'piqa=missing.jsonl'],
  ['--task text: no file matches parts/*.md in', 'text=parts/*.md'],
  [`${file('model')} is a folder; pass a pattern`, `text=${file('model')}`],
])('missing files are an error: %s', async (message, task) => {
  await expect(requestOf(readArguments(['model', '--task', task]))).rejects.toMatchObject({ code: 'E_DATA' })
  await expect(requestOf(readArguments(['model', '--task', task]))).rejects.toThrow(message)
})

test('prints the results of the tasks before one that fails', () => {
  const args = ['model', '--task', 'text=text.txt', '--task', 'lambada=piqa.jsonl']
  const { status, stdout, stderr } = run(...args)
  expect({ status, stderr }).toMatchObject({ status: 1, stderr: expect.stringContaining('the field text is missing') })
  expect(stdout).toMatch(/^text +bits_per_byte +\d/m)
  const json = run(...args, '--json')
  expect({ status: json.status, stderr: json.stderr }).toEqual({ status: 1, stderr: '' })
  expect(JSON.parse(json.stdout)).toMatchObject({ results: [{ task: 'text' }], error: { code: 'E_DATA' } })
})

test('exits with 130 if interrupted', async () => {
  writeFileSync(
    join(folder, 'many.jsonl'),
    Array.from({ length: 20_000 }, (_, i) => `${JSON.stringify(lines[i % 12])}\n`).join(''),
  )
  const child = spawn(process.execPath, [cli, 'model', '--task', 'piqa=many.jsonl', '--items', 'many-items.jsonl'], {
    cwd: folder,
  })
  const code = new Promise(resolve => child.once('exit', resolve))
  // The evaluation is in progress once the first items are written.
  const started = performance.now()
  const size = () => {
    try {
      return readFileSync(join(folder, 'many-items.jsonl')).length
    } catch {
      return 0
    }
  }
  while (size() === 0 && performance.now() - started < 30_000) await new Promise(resolve => setTimeout(resolve, 20))
  child.kill('SIGINT')
  expect(await code).toBe(130)
})

const launcher = ['mpirun.openmpi', 'mpirun'].find(name => spawnSync(name, ['--version']).status === 0)

// Reason to skip: no MPI is installed here.
test.skipIf(launcher === undefined)(
  '--ranks evaluates with the experts of two processes, and the first one reports',
  { timeout: 240_000 },
  () => {
    const onRanks = (...args: string[]) => {
      const start = ['--allow-run-as-root', '--oversubscribe', '-np', '2', process.execPath, cli, '--ranks', ...args]
      return spawnSync(launcher as string, start, { encoding: 'utf8', cwd: folder })
    }
    const args = ['model', '--task', 'piqa=piqa.jsonl', '--shots', '0', '--threads', '1', '--json']
    const found = onRanks(...args, '--items', 'of-ranks.jsonl')
    expect({ status: found.status, stderr: found.stderr }).toEqual({ status: 0, stderr: '' })
    const expected = JSON.parse(run(...args, '--items', 'of-one.jsonl').stdout)
    const { results, model } = JSON.parse(found.stdout)
    expect(model).toEqual({ ...expected.model, processes: 2 })
    expect(results[0].metrics).toEqual(expected.results[0].metrics)
    const scores = (file: string) =>
      readFileSync(join(folder, file), 'utf8')
        .match(/-?\d+\.\d+/g)
        ?.map(Number) ?? []
    expect(scores('of-ranks.jsonl').length).toBeGreaterThan(20)
    expect(scores('of-ranks.jsonl')).toEqual(scores('of-one.jsonl').map(score => expect.closeTo(score, 3)))

    const failed = onRanks('model', '--task', 'lambada=piqa.jsonl')
    expect(failed).toMatchObject({
      status: 1,
      stderr: expect.stringMatching(/moe-evaluate: .*the field text is missing/),
    })
    expect(failed.stderr.match(/moe-evaluate:/g)).toHaveLength(1)
    // Every process fails to open it.
    expect(onRanks('nowhere', '--task', 'piqa=piqa.jsonl')).toMatchObject({
      status: 1,
      stderr: expect.stringContaining('nowhere'),
    })
  },
)
