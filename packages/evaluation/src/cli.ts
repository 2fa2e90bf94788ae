#!/usr/bin/env node
/** @file The command `moe-evaluate`. Exit codes: 0 success, 1 failure, 2 usage error, 130 interrupted. */
import { createHash } from 'node:crypto'
import { closeSync, openSync, readFileSync, statSync, writeSync } from 'node:fs'
import { relative } from 'node:path'
import { parseArgs } from 'node:util'
import { type Backend, firstAvailable, precisions, setDefaultBackend, type WeightFormat, weightBytes } from '@moe/core'
import type { FromPretrainedOptions } from '@moe/deepseek'
import { findFiles } from '@moe/trainer'
import { evaluateTask } from './evaluate-task.ts'
import { type OpenedModel, openModel } from './open-model.ts'
import { progressLine, resultTable } from './report.ts'
import type { Task } from './task.ts'
import { readTask } from './task-file.ts'
import { tasks } from './tasks.ts'

const HELP = `Usage: moe-evaluate FOLDER --task NAME=FILE [options]

Evaluates a language model on tasks.

  FOLDER              a model (config.json, *.safetensors, tokenizer.json), a training run (its latest checkpoint), or a checkpoint

  --task NAME=FILE    a task and its items; may be repeated. NAME: ${Object.keys(tasks).slice(0, 5).join(', ')},
                      ${Object.keys(tasks).slice(5).join(', ')}, or the path of a .json file that defines a task.
                      FILE: .jsonl with one object per line; for text, any file; or a quoted pattern of files
                      such as 'texts/**/*.txt'
  --examples NAME=FILE  the examples for a task (default: its other items)
  --shots N           number of examples before each item (default: that of the task)
  --draw HOW          how examples are chosen: each (drawn for each item), once (drawn once for all items; faster),
                      or first
  --seed N            seed for drawing examples (default: 0)
  --limit N           evaluate only the first N items
  --weights F         store the weights as bf16, fp8, int8 or int4: faster and smaller, but less exact
  --precision P       arithmetic of matrix products: f32, bf16 or fp8 (default: bf16 with --weights, else f32)
  --bos TOKEN         the token at the start of texts, or none (default: from the tokenizer's files)
  --max-texts N       number of answers generated at the same time (default: 8)
  --threads N         number of CPU threads (default: one per core; with --ranks, one)
  --ranks             shard the experts over the processes that mpirun has started:
                      mpirun -np 4 moe-evaluate FOLDER --task NAME=FILE --ranks
  --items FILE        write the result of each item to FILE, one JSON object per line
  --json              print the results as JSON, with everything needed to reproduce them
  --quiet             show no progress and no notes
  --version           print the version
  -h, --help          print this help
`

class UsageError extends Error {}

type Options = ReturnType<typeof readArguments>

interface RequestedTask {
  readonly name: string
  readonly task: Task
  readonly files: readonly string[]
  readonly examples: readonly string[] | undefined
}

function readArguments() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      task: { type: 'string', multiple: true, default: [] },
      examples: { type: 'string', multiple: true, default: [] },
      shots: { type: 'string' },
      draw: { type: 'string' },
      seed: { type: 'string' },
      limit: { type: 'string' },
      weights: { type: 'string' },
      precision: { type: 'string' },
      bos: { type: 'string' },
      'max-texts': { type: 'string' },
      threads: { type: 'string' },
      ranks: { type: 'boolean', default: false },
      items: { type: 'string' },
      json: { type: 'boolean', default: false },
      quiet: { type: 'boolean', default: false },
      version: { type: 'boolean', default: false },
      help: { type: 'boolean', short: 'h', default: false },
    },
  })
  const number = (name: 'shots' | 'seed' | 'limit' | 'max-texts' | 'threads', least: number) => {
    const text = values[name]
    if (text === undefined) return undefined
    const value = Number(text)
    if (/^\d+$/.test(text) && value >= least && Number.isSafeInteger(value)) return value
    throw new UsageError(`--${name} is "${text}", expected an integer of at least ${least}`)
  }
  const oneOf = <T extends string>(name: 'weights' | 'precision' | 'draw', known: readonly T[]) => {
    const value = known.find(choice => choice === values[name])
    if (values[name] === undefined || value !== undefined) return value
    throw new UsageError(`--${name} is "${values[name]}", expected one of ${known.join(', ')}`)
  }
  return {
    ...values,
    positionals,
    shots: number('shots', 0),
    seed: number('seed', 0),
    limit: number('limit', 1),
    maxTexts: number('max-texts', 1),
    threads: number('threads', 1),
    draw: oneOf('draw', ['each', 'once', 'first'] as const),
    weights: oneOf<WeightFormat>('weights', ['bf16', 'fp8', 'int8', 'int4']),
    precision: oneOf('precision', precisions),
  }
}

/** Parses `NAME=FILE` arguments. */
function pairs(option: string, given: readonly string[]): Array<readonly [name: string, file: string]> {
  return given.map(text => {
    const at = text.indexOf('=')
    if (at > 0 && at < text.length - 1) return [text.slice(0, at), text.slice(at + 1)]
    throw new UsageError(`--${option} is "${text}", expected NAME=FILE`)
  })
}

async function requestedTasks(options: Options): Promise<RequestedTask[]> {
  const given = pairs('task', options.task)
  if (given.length === 0) throw new UsageError('missing --task NAME=FILE')
  const examples = new Map(pairs('examples', options.examples))
  for (const name of examples.keys()) {
    if (!given.some(([known]) => known === name)) throw new UsageError(`--examples ${name}: no --task has this name`)
  }
  const taskNamed = async (name: string): Promise<Task> => {
    if (Object.hasOwn(tasks, name)) return tasks[name as keyof typeof tasks]
    if (name.endsWith('.json')) return readTask(name)
    throw new UsageError(`unknown task ${name}, expected one of ${Object.keys(tasks).join(', ')} or a .json file`)
  }
  return Promise.all(
    given.map(async ([name, file]) => {
      const pattern = examples.get(name)
      return {
        name,
        task: await taskNamed(name),
        files: filesOf(`--task ${name}`, file),
        examples: pattern === undefined ? undefined : filesOf(`--examples ${name}`, pattern),
      }
    }),
  )
}

/** The files of a path or pattern, as paths from the current folder. */
function filesOf(option: string, pattern: string): string[] {
  if (statSync(pattern, { throwIfNoEntry: false })?.isFile()) return [pattern]
  return findFiles(option, pattern, process.cwd()).map(path => relative('', path))
}

const packageFile: { name: string; version: string } = JSON.parse(
  readFileSync(new URL('../package.json', import.meta.url), 'utf8'),
)

async function main(options: Options): Promise<void> {
  const { positionals, weights, bos, ranks } = options
  const [folder, ...more] = positionals
  if (folder === undefined) throw new UsageError('missing FOLDER')
  if (more.length > 0) throw new UsageError(`expected one FOLDER, got ${positionals.length}`)
  const requested = await requestedTasks(options)
  const withoutExamples = requested.find(({ task }) => task.kind === 'text')
  if (options.shots && withoutExamples)
    throw new UsageError(`--shots: ${withoutExamples.name} is a text task, which has no examples`)
  // Report unreadable files before opening the model.
  const digests = new Map(
    requested.flatMap(({ files, examples = [] }) => [...files, ...examples]).map(path => [path, digest(path)]),
  )
  const threads = options.threads ?? (ranks ? 1 : undefined)
  const open = (parameters?: FromPretrainedOptions['parameters']) => openModel(folder, { weights, bos, parameters })
  const evaluateOpened = (opened: OpenedModel, processes?: number) =>
    evaluateModel(opened, requested, digests, { ...options, folder, processes })
  if (!ranks) {
    await useBackend(threads)
    return evaluateOpened(await open())
  }
  const { leadProcesses } = await import('@moe/parallel').catch(error => {
    if (error.code !== 'ERR_MODULE_NOT_FOUND') throw error
    throw new UsageError('--ranks needs another package: npm i @moe/parallel')
  })
  await leadProcesses({
    createBackend: device => useBackend(threads, device),
    open,
    work: evaluateOpened,
    note: text => process.stderr.write(`${text}\n`),
  })
}

/** Creates the backend: a GPU if there is one. @param device index of the GPU */
async function useBackend(threads: number | undefined, device?: number): Promise<Backend> {
  const backend = await firstAvailable([
    async () => {
      const { createBackend } = await import('@moe/kernels-cuda')
      return { createBackend: () => createBackend({ device }) }
    },
    async () => {
      const { createBackend } = await import('@moe/kernels-cpu')
      return { createBackend: () => createBackend({ threads }) }
    },
    () => import('@moe/backend-tfjs'),
  ])
  setDefaultBackend(backend)
  return backend
}

/** Evaluates the tasks and prints the results. */
async function evaluateModel(
  { path, model, tokenizer, bos, prefix }: OpenedModel,
  requested: readonly RequestedTask[],
  digests: ReadonlyMap<string, ReturnType<typeof digest>>,
  options: Options & { readonly folder: string; readonly processes: number | undefined },
): Promise<void> {
  const { json, quiet, shots, draw, seed, limit, maxTexts, weights, precision, folder, processes } = options
  const { backend } = model
  /** One digest, or a list if there are several files. */
  const digestsOf = (paths: readonly string[]) => {
    const all = paths.map(path => digests.get(path))
    return all.length === 1 ? all[0] : all
  }
  const interrupt = new AbortController()
  process.once('SIGINT', () => interrupt.abort())
  const items = options.items === undefined ? null : openSync(options.items, 'w')
  const date = new Date().toISOString()
  const results = []
  let failure: unknown
  try {
    for (const { name, task, files, examples } of requested) {
      const started = performance.now()
      const result = await evaluateTask(model, task, files, {
        ...{ tokenizer, bos, prefix, examples, shots, draw, seed, limit, maxTexts, precision },
        signal: interrupt.signal,
        onProgress: done => {
          if (!quiet) showProgress(progressLine(task.name, done, (performance.now() - started) / 1000))
        },
        onItem: item => {
          if (items !== null) writeSync(items, `${JSON.stringify({ task: task.name, ...item })}\n`)
        },
      })
      const sources = { ...result, file: digestsOf(files), ...(examples && { examples: digestsOf(examples) }) }
      results.push({ ...sources, ...(limit && { limit }), ...(name.endsWith('.json') && { definition: task }) })
    }
  } catch (error) {
    // The results of the tasks before it are not lost.
    if (results.length === 0) throw error
    failure = error
  }
  if (items !== null) closeSync(items)
  if (!quiet) showProgress('')
  if (json) {
    const { elements, bytes } = weightBytes(model)
    const how = { weights: weights ?? 'f32', precision, bos, prefix, backend: backend.name, device: backend.device }
    const { name, version } = packageFile
    const evaluated = { folder, path, parameters: elements, bytes, ...how, ...(processes && { processes }) }
    const report = {
      package: { name, version },
      date,
      model: evaluated,
      results,
      ...(failure !== undefined && { error: errorOf(failure) }),
    }
    process.stdout.write(`${JSON.stringify(report, null, 2)}\n`)
  } else process.stdout.write(resultTable(results))
  for (const { task, truncated } of results) {
    if (truncated > 0 && !quiet)
      process.stderr.write(`note: ${truncated} items of ${task} exceed the context and were truncated on the left\n`)
  }
  model.dispose()
  if (failure !== undefined) fail(failure, json)
}

const digest = (path: string) => {
  const content = readFileSync(path)
  return { path, bytes: content.length, sha256: createHash('sha256').update(content).digest('hex') }
}

let shown = Number.NEGATIVE_INFINITY
function showProgress(line: string): void {
  if (!process.stderr.isTTY || (line !== '' && performance.now() - shown < 100)) return
  shown = performance.now()
  process.stderr.write(`\r\x1b[K${line}`)
}

function errorOf(error: unknown): { readonly code: string | undefined; readonly message: string } {
  const { code } = error as NodeJS.ErrnoException
  const isUsage = error instanceof UsageError || /^ERR_PARSE_ARGS/.test(`${code}`)
  // Drop Node's advice about arguments that begin with a dash.
  const message =
    error instanceof Error ? error.message.replace(/^Unknown option '(.+?)'.*/s, 'unknown option $1') : `${error}`
  return { code: isUsage ? 'E_USAGE' : code, message }
}

/** @param isReported whether the error is already in the JSON output */
function fail(failure: unknown, isReported = false): void {
  const error = errorOf(failure)
  const isUsage = error.code === 'E_USAGE'
  // Not `options.json`: the arguments may be what is wrong.
  const json = process.argv.includes('--json')
  if (json && !isReported) process.stdout.write(`${JSON.stringify({ error })}\n`)
  else if (!json) process.stderr.write(`moe-evaluate: ${error.message}\n${isUsage ? 'See moe-evaluate --help.\n' : ''}`)
  process.exitCode = isUsage ? 2 : error.code === 'E_ABORTED' ? 130 : 1
}

// The reader of the output may close it, as in `| head`.
process.stdout.on('error', error => process.exit((error as NodeJS.ErrnoException).code === 'EPIPE' ? undefined : 1))

try {
  const options = readArguments()
  if (options.help) process.stdout.write(HELP)
  else if (options.version) process.stdout.write(`${packageFile.version}\n`)
  else await main(options)
} catch (error) {
  fail(error)
  // A process that waits for another one does not exit by itself.
  if (process.argv.includes('--ranks')) process.exit()
}
