#!/usr/bin/env node
/** @file The command `moe-trainer`: shows runs. Exit codes: 0 done (watching ends with Ctrl-C), 1 failed, 2 wrong usage. */
import { existsSync, readFileSync, statSync } from 'node:fs'
import { parseArgs } from 'node:util'
import { isMoeError } from '@moe/core'
import { watchRuns } from './watch/index.ts'

const HELP = `moe-trainer COMMAND [options]

  watch [FOLDER]    a page of the runs below a folder, live while they train (default runs); Ctrl-C ends it
      --port N            default 7070, or any that is free
      --host ADDRESS      who may look: default 127.0.0.1, this machine; 0.0.0.0 for everybody who can reach it

  --json     machine-readable output
  --version  of the package
  --help     this text
`

class UsageError extends Error {}

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
  process.exitCode = usage ? 2 : 1
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
