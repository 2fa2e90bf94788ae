#!/usr/bin/env node
/**
 * @file The command `moe-trainer`. Exit codes: 0 success (Ctrl-C ends `watch`), 1 failure, 2 usage error, 130
 *   interrupted.
 */
import { existsSync, readFileSync, statSync } from 'node:fs'
import { parseArgs } from 'node:util'
import { tokenizeCommand } from './tokenize/command.ts'
import { UsageError } from './usage-error.ts'
import { watchRuns } from './watch/index.ts'

const HELP = `Usage: moe-trainer COMMAND [options]

  watch [FOLDER]         serves a dashboard of all runs in a folder (default: runs), live while they train;
                         stop it with Ctrl-C
      --port N               port (default: 7070, or a free one)
      --host ADDRESS         address to listen on (default: 127.0.0.1, this machine only;
                             0.0.0.0 for everyone on the network)

  tokenize PATTERN...    tokenizes .txt, .jsonl (both also .gz, .zst) and .parquet files for training;
                         to continue after an interruption, run the same command again
      --tokenizer PATH       tokenizer.json, or a folder that contains one (required)
      --out FOLDER           output folder (required)
      --field NAME           field (.jsonl) or column (.parquet) that contains the text (default: text)
      --separator TEXT       separator of the documents in a .txt file, for example '\\n\\n' (default: one document per file)
      --validation FRACTION  fraction of documents to hold out, selected by --seed (default: 0)
      --fim-rate FRACTION    fraction of documents to rearrange for fill-in-the-middle (default: 0; DeepSeek-V3: 0.1)
      --seed N               seed of these selections (default: 0)
      --threads N            number of threads (default: one per core)
      --shard-tokens N       maximum number of tokens per pair of files (default: 2^29)
      --overwrite            replace the output of other settings
      --quiet                show no progress

  --json       print machine-readable output
  --version    print the version
  -h, --help   print this help
`

const { values, positionals, tokens } = readArguments()

/** The names of the options on the command line. */
const given = tokens.flatMap(token => (token.kind === 'option' ? token.name : []))

/** What each command does, and its options. */
const commands = new Map([
  ['watch', { run: watch, options: ['port', 'host'] }],
  [
    'tokenize',
    {
      run: (patterns: string[]) => tokenizeCommand(patterns, values),
      options: [
        ...['tokenizer', 'out', 'field', 'separator', 'validation', 'fim-rate', 'seed', 'threads', 'shard-tokens'],
        ...['overwrite', 'quiet'],
      ],
    },
  ],
])

const commonOptions = ['json', 'version', 'help']

// The reader of the output may close the pipe, for example `| head`.
process.stdout.on('error', error => process.exit((error as NodeJS.ErrnoException).code === 'EPIPE' ? undefined : 1))

function packageVersion(): string {
  return JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8')).version
}

function readArguments() {
  try {
    return parseArgs({
      allowPositionals: true,
      tokens: true,
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
  else process.stderr.write(`moe-trainer: ${message}\n${usage ? 'See moe-trainer --help.\n' : ''}`)
  process.exitCode = usage ? 2 : code === 'E_ABORTED' ? 130 : 1
}

async function watch([folder = 'runs', ...rest]: string[]): Promise<void> {
  if (rest.length > 0) throw new UsageError(`expected one FOLDER, got ${rest.length + 1}`)
  const { port, host, json } = values
  if (port !== undefined && !/^\d+$/.test(port)) throw new UsageError(`--port is "${port}", expected an integer`)
  if (existsSync(folder) && !statSync(folder).isDirectory()) throw new UsageError(`${folder} is not a folder`)
  const watcher = await watchRuns(folder, { port: port === undefined ? undefined : Number(port), host })
  for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => watcher.close())
  const { url } = watcher
  if (json) process.stdout.write(`${JSON.stringify({ url, folder })}\n`)
  else
    process.stdout.write(`${folder}${existsSync(folder) ? '' : ' (does not exist yet)'}: ${url}  (stop with Ctrl-C)\n`)
}

try {
  const [name, ...rest] = positionals
  const command = commands.get(name)
  if (values.version) process.stdout.write(`${packageVersion()}\n`)
  else if (values.help) process.stdout.write(HELP)
  else if (name === undefined) throw new UsageError('missing COMMAND')
  else if (command === undefined) {
    throw new UsageError(`unknown command ${name}, expected one of ${[...commands.keys()].join(', ')}`)
  } else {
    const foreign = given.find(option => !command.options.includes(option) && !commonOptions.includes(option))
    if (foreign !== undefined) throw new UsageError(`unknown option --${foreign} for ${name}`)
    await command.run(rest)
  }
} catch (error) {
  fail(error)
}
