#!/usr/bin/env node
/**
 * @file The command `moe-tokenizer`: train, encode, decode, inspect. Exit codes: 0 success, 1 failure, 2 usage error,
 * 130 interrupted.
 */
import fs, { createReadStream, existsSync, readFileSync, statSync } from 'node:fs'
import { parseArgs } from 'node:util'
import { BpeTokenizer, TokenizerError, type TrainBpeOptions, type TrainProgress, trainBpeAsync } from './index.ts'

const HELP = `Usage: moe-tokenizer COMMAND [options]

  train FILE...    train a byte-level BPE vocabulary on text files; FILE may be a pattern, or - for standard input
      --vocab-size N         number of ids, including special tokens and the 256 bytes (required)
      --out PATH             output file (default tokenizer.json)
      --pre-tokenizer NAME   deepseek-v3 (default), deepseek-llm, gpt2, cl100k, o200k, qwen2
      --pattern REGEX        custom pre-tokenizer pattern (Oniguruma syntax)
      --special TOKEN        add a special token; may be repeated
      --min-frequency N      minimum number of occurrences of a merged pair (default 2)
  encode [FILE]    print the ids of a text (default: standard input)
      --tokenizer PATH       tokenizer file (default tokenizer.json)
      --no-special           neither add special tokens nor recognize them in the text
  decode [ID...]   print the text of ids (default: from standard input)
      --tokenizer PATH       tokenizer file (default tokenizer.json)
      --skip-special         omit special tokens
  inspect [TEXT]   describe a tokenizer.json, and show how it splits a text
      --tokenizer PATH       tokenizer file (default tokenizer.json)

  --json       print machine-readable output
  --quiet      show no progress
  --version    print the version
  -h, --help   print this help
`

class UsageError extends Error {}

const { values, positionals, tokens } = readArguments()

/** The names of the options on the command line. */
const given = tokens.flatMap(token => (token.kind === 'option' ? token.name : []))

/** What each command does, and its options. */
const commands = new Map([
  ['train', { run: train, options: ['vocab-size', 'out', 'pre-tokenizer', 'pattern', 'special', 'min-frequency'] }],
  ['encode', { run: encode, options: ['tokenizer', 'no-special'] }],
  ['decode', { run: decode, options: ['tokenizer', 'skip-special'] }],
  ['inspect', { run: inspect, options: ['tokenizer'] }],
])

const commonOptions = ['json', 'quiet', 'version', 'help']

const interrupt = new AbortController()

// The reader may close the pipe early, for example `| head`.
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
        'vocab-size': { type: 'string' },
        out: { type: 'string', default: 'tokenizer.json' },
        'pre-tokenizer': { type: 'string' },
        pattern: { type: 'string' },
        special: { type: 'string', multiple: true, default: [] },
        'min-frequency': { type: 'string', default: '2' },
        tokenizer: { type: 'string', default: 'tokenizer.json' },
        'no-special': { type: 'boolean', default: false },
        'skip-special': { type: 'boolean', default: false },
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
  else process.stderr.write(`moe-tokenizer: ${message}\n${usage ? 'See moe-tokenizer --help.\n' : ''}`)
  process.exitCode = usage ? 2 : code === 'E_ABORTED' ? 130 : 1
}

function wholeNumber(name: 'vocab-size' | 'min-frequency'): number {
  const text = values[name]
  if (text === undefined) throw new UsageError(`missing --${name} N`)
  if (!/^\d+$/.test(text)) throw new UsageError(`--${name} is "${text}", expected an integer`)
  return Number(text)
}

async function train(files: string[]): Promise<void> {
  if (files.length === 0) throw new UsageError('missing FILE')
  if (values.pattern !== undefined && values['pre-tokenizer'] !== undefined) {
    throw new UsageError('--pattern and --pre-tokenizer cannot be used together')
  }
  process.once('SIGINT', () => interrupt.abort())
  const started = performance.now()
  const tokenizer = await trainBpeAsync(textsOf(files.flatMap(filesOf)), {
    vocabSize: wholeNumber('vocab-size'),
    minFrequency: wholeNumber('min-frequency'),
    specialTokens: values.special,
    preTokenizer:
      values.pattern !== undefined
        ? { patterns: [values.pattern] }
        : (values['pre-tokenizer'] as TrainBpeOptions['preTokenizer']),
    signal: interrupt.signal,
    onProgress: values.quiet || values.json ? undefined : showProgress,
  })
  await tokenizer.save(values.out)
  const seconds = (performance.now() - started) / 1000
  const result = { path: values.out, vocabSize: tokenizer.vocabSize, merges: tokenizer.mergeCount, seconds }
  if (values.json) process.stdout.write(`${JSON.stringify(result)}\n`)
  else {
    if (process.stderr.isTTY && !values.quiet) process.stderr.write('\r\x1b[K')
    process.stdout.write(`${values.out}: ${result.vocabSize} ids, ${result.merges} merges, ${seconds.toFixed(1)} s\n`)
  }
}

let shown = Number.NEGATIVE_INFINITY
function showProgress(progress: TrainProgress): void {
  if (!process.stderr.isTTY || performance.now() - shown < 100) return
  shown = performance.now()
  const megabytes = (progress.bytes / 1e6).toFixed(0)
  const line =
    progress.phase === 'counting'
      ? `counting: ${megabytes} MB, ${progress.pieces} distinct pieces`
      : `merging: ${progress.tokens} of ${progress.vocabSize} ids`
  process.stderr.write(`\r\x1b[K${line}`)
}

/** The files that match a pattern, for shells that do not expand it. Paths of files are returned as they are. */
function filesOf(pattern: string): string[] {
  if (pattern === '-' || existsSync(pattern)) return [pattern]
  // Node 20 has no globSync.
  const globSync = fs.globSync as typeof fs.globSync | undefined
  const matches = globSync?.(pattern).filter(path => statSync(path).isFile()) ?? []
  if (matches.length > 0) return matches.sort()
  const fix = globSync
    ? 'check the pattern and the current folder'
    : 'leave out the quotes: Node 20 expands no patterns'
  throw new TokenizerError({ code: 'E_DATA', op: 'train', problem: `no file matches ${pattern}`, fix })
}

/**
 * Yields the texts of files. Large files are split before a line that does not start with white space; if there is none
 * for long, before any line or, in a single line, anywhere.
 */
async function* textsOf(files: readonly string[]): AsyncGenerator<string> {
  for (const file of files) {
    const decoder = new TextDecoder('utf-8', { ignoreBOM: true })
    let held = ''
    for await (const chunk of bytesOf(file)) {
      held += decoder.decode(chunk, { stream: true })
      if (held.length < 1 << 24) continue
      let cut = held.length - 1
      while (cut > 0 && !(held[cut - 1] === '\n' && /\S/.test(held[cut]))) cut--
      if (cut === 0) {
        if (held.length < 1 << 25) continue
        cut = held.lastIndexOf('\n') + 1 || held.length
      }
      yield held.slice(0, cut)
      held = held.slice(cut)
    }
    yield held + decoder.decode()
  }
}

async function readInput(file: string | undefined): Promise<string> {
  const decoder = new TextDecoder('utf-8', { ignoreBOM: true })
  let text = ''
  for await (const chunk of bytesOf(file ?? '-')) text += decoder.decode(chunk, { stream: true })
  return text + decoder.decode()
}

/** Reads a file in parts; `-` is standard input. Adds the path to errors, which Node omits for folders. */
async function* bytesOf(file: string): AsyncGenerator<Buffer> {
  try {
    yield* file === '-' ? process.stdin : createReadStream(file, { highWaterMark: 1 << 22 })
  } catch (cause) {
    throw new TokenizerError({ code: 'E_FORMAT', op: file, problem: (cause as Error).message, cause })
  }
}

async function encode(files: string[]): Promise<void> {
  if (files.length > 1) throw new UsageError(`expected one FILE, got ${files.length}`)
  const tokenizer = await BpeTokenizer.fromFile(values.tokenizer)
  const special = !values['no-special']
  const ids = tokenizer.encode(await readInput(files[0]), { addSpecialTokens: special, parseSpecialTokens: special })
  process.stdout.write(values.json ? `${JSON.stringify([...ids])}\n` : `${ids.join(' ')}\n`)
}

async function decode(args: string[]): Promise<void> {
  const tokenizer = await BpeTokenizer.fromFile(values.tokenizer)
  const source = args.length > 0 ? args.join(' ') : await readInput(undefined)
  const words = source.split(/[\s,[\]]+/).filter(word => word !== '')
  const invalid = words.find(word => !/^\d+$/.test(word))
  if (invalid !== undefined) throw new UsageError(`ID is "${invalid}", expected an integer`)
  const text = tokenizer.decode(words.map(Number), { skipSpecialTokens: values['skip-special'] })
  process.stdout.write(values.json ? `${JSON.stringify(text)}\n` : text)
}

async function inspect(args: string[]): Promise<void> {
  const tokenizer = await BpeTokenizer.fromFile(values.tokenizer)
  const longest = { id: 0, bytes: 0 }
  for (let id = 0; id < tokenizer.vocabSize; id++) {
    if (tokenizer.idToToken(id) === undefined) continue
    const bytes = tokenizer.tokenBytes(id).length
    if (bytes > longest.bytes) Object.assign(longest, { id, bytes })
  }
  const report = {
    vocabSize: tokenizer.vocabSize,
    merges: tokenizer.mergeCount,
    preTokenizer: tokenizer.preTokenizer,
    addedTokens: tokenizer.addedTokens.length,
    specialTokens: tokenizer.addedTokens.filter(token => token.special).length,
    longestToken: longest,
    tokens:
      args.length === 0
        ? undefined
        : Array.from(tokenizer.encode(args.join(' ')), id => ({ id, token: tokenizer.idToToken(id) })),
  }
  if (values.json) {
    process.stdout.write(`${JSON.stringify(report)}\n`)
    return
  }
  const how = report.preTokenizer === 'steps' ? 'steps (interpreted; no hand-written scanner)' : report.preTokenizer
  process.stdout.write(
    `ids             ${report.vocabSize}\nmerges          ${report.merges}\npre-tokenizer   ${how}\n` +
      `added tokens    ${report.addedTokens}, ${report.specialTokens} of them special\nlongest token   id ${longest.id}, ${longest.bytes} bytes\n`,
  )
  for (const { id, token } of report.tokens ?? []) process.stdout.write(`${String(id).padStart(8)}  ${token}\n`)
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
