#!/usr/bin/env node
/** @file The command `moe-serve`: serves a model's folder. Exit codes: 0 stopped by a signal, 1 failed, 2 wrong usage, 130 or 143 for a second signal. */
import { readFileSync } from 'node:fs'
import { parseArgs } from 'node:util'
import { firstAvailable, isMoeError, precisions, setDefaultBackend, type WeightFormat, weightBytes } from '@moe/core'
import { createServer } from './create-server.ts'
import { openFolder } from './open-folder.ts'
import { requestJson, requestLine } from './request-line.ts'
import { serve } from './serve.ts'

const HELP = `moe-serve FOLDER [options]: an OpenAI-compatible server of a model.

  FOLDER             a model (config.json, *.safetensors, tokenizer.json), or a run, whose latest checkpoint it takes

  --host ADDRESS     where to listen (default 127.0.0.1, which only this machine reaches)
  --port N           default 8000; 0 takes one that is free
  --api-key KEY      what clients have to send (default: $MOE_API_KEY; nobody is asked without)
  --cors ORIGIN      web pages that may call, or *; may be repeated
  --body-limit MIB   largest request (default 4)
  --name NAME        the model's name (default: that of the folder)
  --chat-template F  a Jinja file that writes conversations (default: that of the folder)
  --weights F        store weights as bf16, fp8, int8 or int4: faster, smaller, less exact
  --precision P      f32, bf16 or fp8 arithmetic in matrix products (default: bf16 with --weights, else f32)
  --max-texts N      texts that are made at once; others wait (default 8)
  --cache-tokens N   tokens that are remembered of all texts (default: a context, or 2048 a text where that is more)
  --cache FORMAT     f32 (default), or bf16 for half the memory
  --speculative      let the model's MTP modules draft (default: they do not)
  --threads N        of the CPU (default: one a core)
  --json             log lines as JSON, on standard output
  --quiet            no log lines
  --version          of the package
  --help             this text

Ctrl-C waits for what runs, up to ten seconds; a second one does not.
`

class UsageError extends Error {}

const exitCodes = { SIGINT: 130, SIGTERM: 143 } as const

function readArguments() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    allowNegative: true,
    options: {
      host: { type: 'string', default: '127.0.0.1' },
      port: { type: 'string', default: '8000' },
      'api-key': { type: 'string' },
      cors: { type: 'string', multiple: true },
      'body-limit': { type: 'string', default: '4' },
      name: { type: 'string' },
      'chat-template': { type: 'string' },
      weights: { type: 'string' },
      precision: { type: 'string' },
      'max-texts': { type: 'string' },
      'cache-tokens': { type: 'string' },
      cache: { type: 'string' },
      speculative: { type: 'boolean', default: false },
      threads: { type: 'string' },
      json: { type: 'boolean', default: false },
      quiet: { type: 'boolean', default: false },
      version: { type: 'boolean', default: false },
      help: { type: 'boolean', short: 'h', default: false },
    },
  })
  type Numeric = 'port' | 'body-limit' | 'max-texts' | 'cache-tokens' | 'threads'
  const number = (name: Numeric, least: number, most: number, whole = true) => {
    const value = Number(values[name])
    const fits = values[name] !== '' && value >= least && value <= most && (!whole || Number.isInteger(value))
    if (!fits) throw new UsageError(`--${name} is "${values[name]}", needs a number from ${least} to ${most}`)
    return value
  }
  const optional = (name: Numeric, most: number) => (values[name] === undefined ? undefined : number(name, 1, most))
  const oneOf = <T extends string>(name: 'weights' | 'precision' | 'cache', known: readonly T[]) => {
    const value = known.find(choice => choice === values[name])
    if (values[name] !== undefined && value === undefined)
      throw new UsageError(`--${name} is "${values[name]}", needs one of ${known.join(', ')}`)
    return value
  }
  const [folder, ...more] = positionals
  if (more.length > 0) throw new UsageError('it serves one folder')
  return {
    ...values,
    folder,
    port: number('port', 0, 65535),
    bodyLimit: number('body-limit', 0.001, 1024, false) * 2 ** 20,
    maxTexts: optional('max-texts', 1024),
    cacheTokens: optional('cache-tokens', 2 ** 31),
    cache: oneOf('cache', ['f32', 'bf16'] as const),
    threads: optional('threads', 256),
    weights: oneOf<WeightFormat>('weights', ['bf16', 'fp8', 'int8', 'int4']),
    precision: oneOf('precision', precisions),
    apiKey: values['api-key'] ?? (process.env.MOE_API_KEY || undefined),
  }
}

/** Clients are answered, whoever reads the log. */
for (const stream of [process.stdout, process.stderr]) stream.on('error', () => undefined)

const say = (text: string) => process.stderr.write(`${text}\n`)
const tell = (line: string) => process.stdout.write(`${line}\n`)

async function main(options: ReturnType<typeof readArguments>): Promise<void> {
  const { folder, json, quiet, host, threads, precision, speculative } = options
  if (folder === undefined) throw new UsageError('which model?')
  const backend = await firstAvailable([
    () => import('@moe/kernels-cuda'),
    async () => {
      const { createBackend } = await import('@moe/kernels-cpu')
      return { createBackend: () => createBackend({ threads }) }
    },
    () => import('@moe/backend-tfjs'),
  ])
  setDefaultBackend(backend)
  const { path, model, tokenizer, chatTemplate, name } = await openFolder(folder, {
    weights: options.weights,
    name: options.name,
    chatTemplate: options['chat-template'],
  })
  if (speculative && model.mtp.length === 0) throw new UsageError(`--speculative: ${path} has no MTP modules`)
  const color = process.stderr.isTTY && !process.env.NO_COLOR
  const app = createServer({
    model,
    engine: model.continuousBatch({
      precision,
      maxTexts: options.maxTexts,
      cacheTokens: options.cacheTokens,
      cacheDtype: options.cache,
      speculative,
    }),
    tokenizer,
    chatTemplate,
    name,
    apiKey: options.apiKey,
    cors: options.cors,
    bodyLimit: options.bodyLimit,
    onRequest: record => {
      if (json) tell(requestJson(record))
      else if (!quiet) say(requestLine(record, color))
    },
  })
  const server = await serve(app, { port: options.port, host })
  stopOnSignals(() => server.close(), quiet)
  const { url } = server
  if (json) tell(JSON.stringify({ event: 'listening', url, model: name, chat: chatTemplate !== undefined }))
  if (quiet) return
  const { elements, bytes } = weightBytes(model)
  const size = `${(elements / 1e6).toFixed(1)}M parameters, ${(bytes / 2 ** 20).toFixed(0)} MiB`
  say(`${path}: ${size} on ${backend.name} (${backend.device})`)
  if (chatTemplate === undefined) say('it has no chat template: /v1/chat/completions refuses, /v1/completions works')
  if (!/^(127\.|localhost$|::1$)/.test(host) && options.apiKey === undefined)
    say(`whoever reaches ${host} can use it: --api-key asks for a key`)
  say(`${name} at ${url}/v1`)
}

function stopOnSignals(close: () => Promise<void>, quiet: boolean): void {
  let stopping = false
  const stop = (signal: NodeJS.Signals) => {
    if (stopping) process.exit(exitCodes[signal as keyof typeof exitCodes])
    stopping = true
    if (!quiet) say('waiting for what runs, up to 10 s; once more ends at once')
    void close().then(() => process.exit(0))
  }
  for (const signal of Object.keys(exitCodes)) process.on(signal, stop)
}

/** Failures that say by themselves what to do; a stack would only hide it. */
const isExpected = (error: unknown): error is Error =>
  error instanceof Error && (isMoeError(error) || error.name === 'TokenizerError')

const isUsage = (error: unknown): error is Error =>
  error instanceof UsageError || /^ERR_PARSE_ARGS/.test(`${(error as NodeJS.ErrnoException).code}`)

try {
  const options = readArguments()
  if (options.help) process.stdout.write(HELP)
  else if (options.version) tell(JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8')).version)
  else await main(options)
} catch (error) {
  if (!isExpected(error) && !isUsage(error)) throw error
  // Node goes on about arguments that begin with a dash.
  say(`moe-serve: ${error.message.replace(/^Unknown option '(.+?)'.*/s, 'unknown option $1')}`)
  if (isUsage(error)) say('See moe-serve --help.')
  process.exit(isUsage(error) ? 2 : 1)
}
