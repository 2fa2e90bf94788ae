#!/usr/bin/env node
/** @file The command `moe-evaluate`. Exit codes: 0 success, 1 failure, 2 usage error, 130 interrupted. */
import { createHash } from 'node:crypto'
import { closeSync, openSync, readFileSync, writeSync } from 'node:fs'
import { type Backend, firstAvailable, setDefaultBackend, weightBytes } from '@moe/core'
import type { FromPretrainedOptions } from '@moe/deepseek'
import { isFirstProcess, type Options, type RequestedTask, readArguments, requestOf, UsageError } from './arguments.ts'
import { evaluateTask } from './evaluate-task.ts'
import { type OpenedModel, openModel } from './open-model.ts'
import { progressLine, resultTable } from './report.ts'
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

const packageFile: { name: string; version: string } = JSON.parse(
  readFileSync(new URL('../package.json', import.meta.url), 'utf8'),
)

async function main(options: Options): Promise<void> {
  const { weights, bos, ranks } = options
  const { folder, tasks: requested } = await requestOf(options)
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
  // All processes have the same arguments. A failure of another one could end the first before it reports.
  if (isUsage && process.argv.includes('--ranks') && !isFirstProcess(process.env)) return
  // Not `options.json`: the arguments may be what is wrong.
  const json = process.argv.includes('--json')
  if (json && !isReported) process.stdout.write(`${JSON.stringify({ error })}\n`)
  else if (!json) process.stderr.write(`moe-evaluate: ${error.message}\n${isUsage ? 'See moe-evaluate --help.\n' : ''}`)
  process.exitCode = isUsage ? 2 : error.code === 'E_ABORTED' ? 130 : 1
}

// The reader of the output may close it, as in `| head`.
process.stdout.on('error', error => process.exit((error as NodeJS.ErrnoException).code === 'EPIPE' ? undefined : 1))

try {
  const options = readArguments(process.argv.slice(2))
  if (options.help) process.stdout.write(HELP)
  else if (options.version) process.stdout.write(`${packageFile.version}\n`)
  else await main(options)
} catch (error) {
  fail(error)
  // A process that waits for another one does not exit by itself.
  if (process.argv.includes('--ranks')) process.exit()
}
