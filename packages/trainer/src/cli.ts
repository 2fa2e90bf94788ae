#!/usr/bin/env node
/** @file The command `moe-trainer`: makes tokens of texts, shows runs. Exit codes: 0 done (watching ends with Ctrl-C), 1 failed, 2 wrong usage, 130 interrupted. */
import { existsSync, readFileSync, statSync } from 'node:fs'
import { parseArgs } from 'node:util'
import { isMoeError } from '@moe/core'
import { tokenizeCommand } from './tokenize/command.ts'
import { UsageError } from './usage-error.ts'
import { watchRuns } from './watch/index.ts'

const HELP = `moe-trainer COMMAND [options]

  watch [FOLDER]    a page of the runs below a folder, live while they train (default runs); Ctrl-C ends it
      --port N            default 7070, or any that is free
      --host ADDRESS      who may look: default 127.0.0.1, this machine; 0.0.0.0 for everybody who can reach it

  tokenize PATTERN...    makes tokens of .txt, .jsonl (both also .gz, .zst) and .parquet files, for training; the same command goes on where it was stopped
      --tokenizer PATH       tokenizer.json, or a folder that has one (required)
      --out FOLDER           where the tokens are written (required)
      --field NAME           field of .jsonl, column of .parquet that holds the text (default text)
      --separator TEXT       what separates the documents of a .txt, such as '\\n\\n' (default: a file is a document)
      --validation FRACTION  documents that are held out, drawn by --seed (default 0)
      --fim-rate FRACTION    documents to be filled in the middle (default 0; DeepSeek-V3 has 0.1)
      --seed N               default 0
      --threads N            default: one a core
      --shard-tokens N       most tokens of a pair of files (default 2^29)
      --overwrite            remove what other settings have made in the folder
      --quiet                no progress

  --json     machine-readable output
  --version  of the package
  --help     this text
`

const { values, positionals } = readArguments()

// Whoever reads the output may have had enough of it, as in `| head`.
process.stdout.on('error', error => process.exit((error as NodeJS.ErrnoException).code === 'EPIPE' ? undefined : 1))

try {
  const [command, ...rest] = positionals
  if (values.version) process.stdout.write(`${packageVersion()}\n`)
  else if (values.help || command === undefined) {
    process.stdout.write(HELP)
    if (!values.help) process.exitCode = 2
  } else if (command === 'watch') await watch(rest)
  else if (command === 'tokenize') await tokenizeCommand(rest, values)
  else throw new UsageError(`there is no command ${command}`)
} catch (error) {
  fail(error)
}

function packageVersion(): string {
  return JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8')).version
}

function readArguments() {
  try {
    return parseArgs({
      allowPositionals: true,
      options: {
        port: { type: 'string' },
        host: { type: 'string' },
        tokenizer: { type: 'string' },
        out: { type: 'string' },
        field: { type: 'string' },
        separator: { type: 'string' },
        validation: { type: 'string' },
        'fim-rate': { type: 'string' },
        seed: { type: 'string' },
        threads: { type: 'string' },
        'shard-tokens': { type: 'string' },
        overwrite: { type: 'boolean', default: false },
        quiet: { type: 'boolean', default: false },
        json: { type: 'boolean', default: false },
        version: { type: 'boolean', default: false },
        help: { type: 'boolean', short: 'h', default: false },
      },
    })
  } catch (error) {
    // Node goes on about arguments that begin with a dash.
    const message = (error as Error).message.replace(/^Unknown option '(.+?)'.*/s, 'there is no option $1')
    process.stderr.write(`moe-trainer: ${message}\nSee moe-trainer --help.\n`)
    process.exit(2)
  }
}

function fail(error: unknown): void {
  const usage = error instanceof UsageError
  const code = isMoeError(error) ? error.code : (error as NodeJS.ErrnoException).code
  const message = error instanceof Error ? error.message : String(error)
  if (values.json) process.stdout.write(`${JSON.stringify({ error: { code: code ?? 'E_USAGE', message } })}\n`)
  else process.stderr.write(`moe-trainer: ${message}\n${usage ? 'See moe-trainer --help.\n' : ''}`)
  process.exitCode = usage ? 2 : code === 'E_ABORTED' ? 130 : 1
}

async function watch([folder = 'runs', ...rest]: string[]): Promise<void> {
  if (rest.length > 0) throw new UsageError('watch takes one folder')
  const { port, host, json } = values
  if (port !== undefined && !/^\d+$/.test(port)) throw new UsageError(`--port ${port} is not a whole number`)
  if (existsSync(folder) && !statSync(folder).isDirectory()) throw new UsageError(`${folder} is no folder`)
  const watcher = await watchRuns(folder, { port: port === undefined ? undefined : Number(port), host })
  for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => watcher.close())
  const { url } = watcher
  if (json) process.stdout.write(`${JSON.stringify({ url, folder })}\n`)
  else process.stdout.write(`${folder}${existsSync(folder) ? '' : ' (not there yet)'}: ${url}  (Ctrl-C ends)\n`)
}
