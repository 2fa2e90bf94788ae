#!/usr/bin/env node
/** @file The command `moe-deepseek`: exports models. Exit codes: 0 success, 1 failure, 2 usage error, 130 interrupted. */
import { existsSync, readFileSync } from 'node:fs'
import { basename, join, resolve } from 'node:path'
import { parseArgs } from 'node:util'
import type { GgufProgress } from '@moe/checkpoint'
import { type ExportGgufOptions, exportGguf } from './gguf/export-gguf.ts'

const HELP = `Usage: moe-deepseek COMMAND [options]

  export-gguf FOLDER [FILE]    convert a model for llama.cpp, Ollama and LM Studio
      FOLDER                 with config.json, safetensors and tokenizer.json; a training run (its latest checkpoint), or a checkpoint
      FILE                   default: FOLDER-TYPE.gguf in the current folder
      --type TYPE            f32, f16, bf16, q8_0 (default) or q4_0
      --tokenizer PATH       use another tokenizer.json; "none" for a file without a vocabulary
      --chat-template PATH   use a Jinja chat template from a file
      --pre-tokenizer NAME   llama.cpp's name of the pre-tokenizer, if it is not recognized
      --name NAME            display name (default: the folder's name)

  --json       print machine-readable output
  --quiet      show no progress
  --version    print the version
  -h, --help   print this help
`

class UsageError extends Error {}

const types = ['f32', 'f16', 'bf16', 'q8_0', 'q4_0'] as const
const { values, positionals } = readArguments()

// The reader may close the pipe early, for example `| head`.
process.stdout.on('error', error => process.exit((error as NodeJS.ErrnoException).code === 'EPIPE' ? undefined : 1))

function packageVersion(): string {
  return JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8')).version
}

function readArguments() {
  try {
    return parseArgs({
      allowPositionals: true,
      options: {
        type: { type: 'string', default: 'q8_0' },
        tokenizer: { type: 'string' },
        'chat-template': { type: 'string' },
        'pre-tokenizer': { type: 'string' },
        name: { type: 'string' },
        json: { type: 'boolean', default: false },
        quiet: { type: 'boolean', default: false },
        version: { type: 'boolean', default: false },
        help: { type: 'boolean', short: 'h', default: false },
      },
    })
  } catch (error) {
    fail(error)
    process.exit()
  }
}

function fail(error: unknown): void {
  const { code } = error as NodeJS.ErrnoException
  const usage = error instanceof UsageError || /^ERR_PARSE_ARGS/.test(`${code}`)
  // Drop Node's advice about arguments that begin with a dash.
  const message =
    error instanceof Error ? error.message.replace(/^Unknown option '(.+?)'.*/s, 'unknown option $1') : `${error}`
  // Not `values.json`: the arguments may be what is wrong.
  const json = process.argv.includes('--json')
  if (json) process.stdout.write(`${JSON.stringify({ error: { code: usage ? 'E_USAGE' : code, message } })}\n`)
  else process.stderr.write(`moe-deepseek: ${message}\n${usage ? 'See moe-deepseek --help.\n' : ''}`)
  process.exitCode = usage ? 2 : code === 'E_ABORTED' ? 130 : 1
}

async function exportModel([folder, file, ...rest]: string[]): Promise<void> {
  if (folder === undefined) throw new UsageError('missing FOLDER')
  if (rest.length > 0) throw new UsageError(`expected FOLDER and FILE, got ${rest.length + 2} arguments`)
  const type = types.find(known => known === values.type)
  if (type === undefined) throw new UsageError(`--type is "${values.type}", expected one of ${types.join(', ')}`)
  const interrupt = new AbortController()
  process.once('SIGINT', () => interrupt.abort())
  const template = values['chat-template']
  const options: ExportGgufOptions = {
    type,
    tokenizer: values.tokenizer,
    chatTemplate: template === undefined ? undefined : readFileSync(template, 'utf8'),
    preTokenizer: values['pre-tokenizer'],
    name: values.name ?? basename(resolve(folder)),
    signal: interrupt.signal,
    onProgress: values.quiet || values.json ? undefined : showProgress,
  }
  const result = await exportGguf(modelIn(folder), file ?? `${basename(resolve(folder))}-${type}.gguf`, options)
  if (values.json) process.stdout.write(`${JSON.stringify(result)}\n`)
  else {
    if (process.stderr.isTTY && !values.quiet) process.stderr.write('\r\x1b[K')
    const { path, bytes, tensors, notes } = result
    process.stdout.write(`${path}: ${tensors} tensors, ${(bytes / 1e6).toFixed(1)} MB\n`)
    for (const note of notes) process.stdout.write(`note: ${note}\n`)
  }
}

/** Returns the model folder: of a run of `@moe/trainer`, that of its latest checkpoint. */
function modelIn(folder: string): string {
  if (existsSync(join(folder, 'config.json'))) return folder
  if (existsSync(join(folder, 'trainer.json'))) return join(folder, 'model')
  const latest = join(folder, 'checkpoints', 'latest')
  return existsSync(latest) ? join(folder, 'checkpoints', readFileSync(latest, 'utf8').trim(), 'model') : folder
}

let shown = Number.NEGATIVE_INFINITY
function showProgress({ tensor, bytes, totalBytes }: GgufProgress): void {
  if (!process.stderr.isTTY || performance.now() - shown < 100) return
  shown = performance.now()
  process.stderr.write(`\r\x1b[K${((100 * bytes) / totalBytes).toFixed(0)}%  ${tensor}`)
}

try {
  const [command, ...rest] = positionals
  if (values.version) process.stdout.write(`${packageVersion()}\n`)
  else if (values.help) process.stdout.write(HELP)
  else if (command === undefined) throw new UsageError('missing COMMAND')
  else if (command === 'export-gguf') await exportModel(rest)
  else throw new UsageError(`unknown command ${command}, expected export-gguf`)
} catch (error) {
  fail(error)
}
