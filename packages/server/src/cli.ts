#!/usr/bin/env node
/** @file The command `moe-serve`. Exit codes: 0 stopped by a signal or the end of a chat, 1 failure, 2 usage error, 130 or 143 on a second signal or if an answer was interrupted. */
import { readFileSync } from 'node:fs'
import { type Backend, firstAvailable, isMoeError, setDefaultBackend, weightBytes } from '@moe/core'
import { isFirstProcess, type Options, readArguments, UsageError } from './arguments.ts'
import { RejectedError } from './conversation.ts'
import { createServer } from './create-server.ts'
import { type OpenedModel, type OpenOptions, openFolder } from './open-folder.ts'
import { requestJson, requestLine } from './request-line.ts'
import { serve } from './serve.ts'
import { chatInTerminal } from './terminal-chat.ts'

const HELP = `Usage: moe-serve FOLDER [options]

Serves a language model through an OpenAI-compatible HTTP API, or chats with it in the terminal.

  FOLDER             a model (config.json, *.safetensors, tokenizer.json), a training run (its latest checkpoint), or a checkpoint

  --chat             chat in this terminal instead of listening on a port; text from a pipe is one message
  --host ADDRESS     address to listen on (default: 127.0.0.1, which accepts connections from this machine only)
  --port N           port to listen on; 0 selects a free one (default: 8000)
  --api-key KEY      key that clients must send (default: $MOE_API_KEY; if neither is set, no key is required)
  --cors ORIGIN      web origin that may call the server, or *; may be repeated
  --body-limit MIB   maximum size of a request (default: 4)
  --name NAME        name of the model for clients (default: the name of the folder)
  --chat-template F  Jinja file with the chat template (default: that of the folder)
  --weights F        store the weights as bf16, fp8, int8 or int4: faster and smaller, but less exact
  --precision P      arithmetic of matrix products: f32, bf16 or fp8 (default: bf16 with --weights, else f32)
  --max-texts N      number of texts generated at the same time; others wait (default: 8)
  --cache-tokens N   capacity of the KV cache in tokens (default: the context length, or 2048 per text if that is more)
  --cache FORMAT     format of the KV cache: f32 (default), or bf16 for half the memory
  --speculative      use speculative decoding with the model's MTP modules
  --threads N        number of CPU threads (default: one per core; with --ranks, one)
  --ranks            shard the experts over the processes that mpirun has started: mpirun -np 4 moe-serve FOLDER --ranks
  --json             log to standard output, one JSON object per line; with --chat, one per answer
  --quiet            log nothing to standard error
  --version          print the version
  -h, --help         print this help

Ctrl-C waits up to 10 seconds for running requests; press it again to stop immediately.
`

const color = process.stderr.isTTY && !process.env.NO_COLOR

const exitCodes = { SIGINT: 130, SIGTERM: 143 } as const

/** Keep serving if the reader of the log closes the pipe. */
for (const stream of [process.stdout, process.stderr]) stream.on('error', () => undefined)

const log = (text: string) => process.stderr.write(`${text}\n`)
const print = (line: string) => process.stdout.write(`${line}\n`)

async function main(options: Options): Promise<void> {
  const { folder, ranks } = options
  if (folder === undefined) throw new UsageError('missing FOLDER')
  const open = (more: OpenOptions = {}) => {
    const { weights, name, 'chat-template': chatTemplate } = options
    return openFolder(folder, { weights, name, chatTemplate, ...more })
  }
  const threads = options.threads ?? (ranks ? 1 : undefined)
  if (ranks) {
    const { leadProcesses } = await import('@moe/parallel').catch(error => {
      if (error.code !== 'ERR_MODULE_NOT_FOUND') throw error
      throw new UsageError('--ranks needs another package: npm i @moe/parallel')
    })
    await leadProcesses({
      createBackend: device => useBackend(threads, device),
      open: parameters => open({ parameters }),
      work: opened => useModel(opened, options),
      note: log,
    })
  } else {
    await useBackend(threads)
    await useModel(await open(), options)
  }
  process.exit()
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

/** Chats, or serves until a signal stops the server. */
async function useModel(opened: OpenedModel, options: Options): Promise<void> {
  const { path, model, tokenizer, chatTemplate, name } = opened
  const { chat, json, quiet, precision, speculative } = options
  if (speculative && model.mtp.length === 0) throw new UsageError(`--speculative: ${path} has no MTP modules`)
  if (chat && chatTemplate === undefined)
    throw new UsageError(`--chat: ${path} has no chat template, expected one with --chat-template`)
  const engine = model.continuousBatch({
    precision,
    maxTexts: options.maxTexts ?? (chat ? 1 : undefined),
    cacheTokens: options.cacheTokens,
    cacheDtype: options.cache,
    speculative,
  })
  const app = createServer({
    model,
    engine,
    tokenizer,
    chatTemplate,
    name,
    apiKey: chat ? undefined : options.apiKey,
    cors: options.cors,
    bodyLimit: options.bodyLimit,
    onRequest: record => {
      if (chat) return
      if (json) print(requestJson(record))
      else if (!quiet) log(requestLine(record, color))
    },
  })
  if (!quiet) log(modelLine(opened))
  if (chat) {
    const { stdin: input, stdout: output, stderr: notes } = process
    const context = model.config.max_position_embeddings
    const streams = { input, output, notes, signals: process }
    const isComplete = await chatInTerminal({ app, model: name, context, ...streams, json, quiet, color })
    if (!isComplete) process.exitCode = exitCodes.SIGINT
  } else await listen(app, opened, options)
  engine.dispose()
}

/** Serves until a signal stops the server. */
async function listen(app: ReturnType<typeof createServer>, opened: OpenedModel, options: Options): Promise<void> {
  const { chatTemplate, name } = opened
  const { json, quiet, host, port } = options
  const server = await serve(app, { port, host })
  const stopped = untilSignal(() => server.close(), quiet)
  const { url } = server
  if (json) print(JSON.stringify({ event: 'listening', url, model: name, chat: chatTemplate !== undefined }))
  if (!quiet) describe(opened, options, url)
  await stopped
}

/** For example `models/v2-lite: 15706.5M parameters, 16000 MiB on kernels-cpu (Intel Xeon, AVX-512, 2 threads)`. */
function modelLine({ path, model }: OpenedModel): string {
  const { backend } = model
  const { elements, bytes } = weightBytes(model)
  const size = `${(elements / 1e6).toFixed(1)}M parameters, ${(bytes / 2 ** 20).toFixed(0)} MiB`
  return `${path}: ${size} on ${backend.name} (${backend.device})`
}

/** Logs what is served where. */
function describe({ chatTemplate, name }: OpenedModel, { host, apiKey }: Options, url: string): void {
  if (chatTemplate === undefined)
    log('no chat template: only /v1/completions is available; set one with --chat-template')
  if (!/^(127\.|localhost$|::1$)/.test(host) && apiKey === undefined)
    log(`anyone who can reach ${host} can use this server; require a key with --api-key`)
  log(`serving ${name} at ${url}/v1`)
}

/** Resolves when the server has been closed after a signal. */
function untilSignal(close: () => Promise<void>, quiet: boolean): Promise<void> {
  return new Promise((resolve, reject) => {
    let stopping = false
    const stop = (signal: NodeJS.Signals) => {
      if (stopping) process.exit(exitCodes[signal as keyof typeof exitCodes])
      stopping = true
      if (!quiet) log('waiting up to 10 s for running requests; press Ctrl-C again to stop immediately')
      close().then(resolve, reject)
    }
    for (const signal of Object.keys(exitCodes)) process.on(signal, stop)
  })
}

/** Errors whose message is sufficient without a stack trace. */
const isExpected = (error: unknown): error is Error =>
  error instanceof Error && (isMoeError(error) || error instanceof RejectedError || error.name === 'TokenizerError')

const isUsage = (error: unknown): error is Error =>
  error instanceof UsageError || /^ERR_PARSE_ARGS/.test(`${(error as NodeJS.ErrnoException).code}`)

try {
  const options = readArguments(process.argv.slice(2))
  if (options.help) process.stdout.write(HELP)
  else if (options.version) print(JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8')).version)
  else await main(options)
} catch (error) {
  if (!isExpected(error) && !isUsage(error)) throw error
  // All processes have the same arguments. A failure of another one could end the first before it reports.
  if (isUsage(error) && process.argv.includes('--ranks') && !isFirstProcess(process.env)) process.exit(0)
  const { code } = error as NodeJS.ErrnoException
  // Drop Node's advice about arguments that begin with a dash.
  const message = error.message.replace(/^Unknown option '(.+?)'.*/s, 'unknown option $1')
  // Not `options.json`: the arguments may be what is wrong.
  const json = process.argv.includes('--json')
  if (json) print(JSON.stringify({ error: { code: isUsage(error) ? 'E_USAGE' : code, message } }))
  else log(`moe-serve: ${message}${isUsage(error) ? '\nSee moe-serve --help.' : ''}`)
  process.exit(isUsage(error) ? 2 : 1)
}
