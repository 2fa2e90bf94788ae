/** @file Worker threads that encode batches. Each has its own copy of the tokenizer. */
import type { Worker } from 'node:worker_threads'
import { TokenizerError } from '../errors.ts'
import type { EncodeOptions } from '../options.ts'

/**
 * Texts of a batch that a worker encodes at once. Requests are small, so that all workers finish at about the same
 * time.
 */
export interface BatchRequest {
  readonly texts: readonly string[]
  readonly options: EncodeOptions
}

/** Concatenated ids of the texts and their counts, or an error message. */
export type BatchReply = { readonly ids: Uint32Array; readonly lengths: Uint32Array } | { readonly error: string }

/** Approximate number of characters per request. */
const REQUEST_CHARACTERS = 1 << 20

export class EncodePool {
  readonly #tokenizer: () => string
  readonly #workers: Worker[] = []
  /** Whether workers can be started here, as far as known. */
  #available = true
  /** Settles when the last batch is done. Batches are encoded one after another. */
  #last: Promise<unknown> = Promise.resolve()

  /** @param tokenizer returns the tokenizer.json that workers load */
  constructor(tokenizer: () => string) {
    this.#tokenizer = tokenizer
  }

  /**
   * Encodes a batch on `threads` workers (default: one per core). Starts the workers that are missing and keeps all for
   * later batches. Returns undefined if there are no workers: in browsers, on one core, and in a bundle without the
   * worker's file.
   * @throws TokenizerError E_DATA if a text cannot be encoded or a worker fails
   */
  encode(texts: readonly string[], options: EncodeOptions, threads?: number): Promise<Uint32Array[] | undefined> {
    const batch = this.#last.then(async () => {
      const workers = await this.#start(threads)
      return workers.length === 0 ? undefined : this.#encode(workers, texts, options)
    })
    this.#last = batch.catch(() => {})
    return batch
  }

  async #start(threads: number | undefined): Promise<Worker[]> {
    const [workerThreads, os] = await Promise.all([builtin('node:worker_threads'), builtin('node:os')])
    const count = threads ?? os?.availableParallelism() ?? 1
    const file = workerFile()
    if (!this.#available || workerThreads === undefined || file === undefined || count < 2) return []
    const missing = Math.max(0, count - this.#workers.length)
    const started: Worker[] = []
    try {
      const workerData = missing > 0 ? this.#tokenizer() : ''
      for (let i = 0; i < missing; i++) started.push(new workerThreads.Worker(file, { workerData }))
      await Promise.all(started.map(nextMessage))
    } catch (error) {
      for (const worker of started) void worker.terminate()
      if ((error as NodeJS.ErrnoException).code !== 'MODULE_NOT_FOUND') throw workerError(error as Error)
      this.#available = false
      return []
    }
    for (const worker of started) worker.unref()
    this.#workers.push(...started)
    return this.#workers.slice(0, count)
  }

  async #encode(workers: Worker[], texts: readonly string[], options: EncodeOptions): Promise<Uint32Array[]> {
    const results: Uint32Array[] = new Array(texts.length)
    let next = 0
    let failure: unknown
    const encodeOn = async (worker: Worker) => {
      while (next < texts.length) {
        const first = next
        let size = 0
        while (next < texts.length && size < REQUEST_CHARACTERS) size += texts[next++].length
        const reply = await this.#ask(worker, { texts: texts.slice(first, next), options })
        let at = 0
        reply.lengths.forEach((length, i) => {
          results[first + i] = reply.ids.slice(at, at + length)
          at += length
        })
      }
    }
    // After a failure the other workers finish their requests, so that the next batch does not get the replies.
    await Promise.all(
      workers.map(async worker => {
        worker.ref()
        await encodeOn(worker).catch(error => {
          failure ??= error
          next = texts.length
        })
        worker.unref()
      }),
    )
    if (failure !== undefined) throw failure
    return results
  }

  async #ask(worker: Worker, request: BatchRequest): Promise<Exclude<BatchReply, { error: string }>> {
    worker.postMessage(request)
    const reply = (await nextMessage(worker).catch(error => {
      this.#workers.splice(this.#workers.indexOf(worker), 1)
      throw workerError(error)
    })) as BatchReply
    if ('error' in reply) throw new TokenizerError({ code: 'E_DATA', op: 'encodeBatch', problem: reply.error })
    return reply
  }
}

/**
 * The worker's file, beside this one. Its published name is one that no file beside a user's bundle has. Undefined in a
 * CommonJS bundle made by esbuild.
 */
function workerFile(): URL | undefined {
  // A variable, because webpack replaces `new URL(…, import.meta.url)` by a file that it emits.
  const here: string | undefined = import.meta.url
  return here === undefined
    ? undefined
    : new URL(here.endsWith('.ts') ? './worker.ts' : './moe-tokenizer-worker.js', here)
}

/** Resolves to the next message of a worker: null when it is ready, then replies. Rejects if the worker ends. */
function nextMessage(worker: Worker): Promise<BatchReply | null> {
  return new Promise((resolve, reject) => {
    const settle = (done: () => void) => {
      worker.off('message', onMessage).off('error', onError).off('exit', onExit)
      done()
    }
    const onMessage = (message: BatchReply | null) => settle(() => resolve(message))
    const onError = (error: Error) => settle(() => reject(error))
    const onExit = (code: number) => onError(new Error(`it ended with exit code ${code}`))
    worker.on('message', onMessage).on('error', onError).on('exit', onExit)
  })
}

function workerError(cause: Error): TokenizerError {
  return new TokenizerError({
    code: 'E_DATA',
    op: 'encodeBatch',
    problem: `a worker thread failed: ${cause.message}`,
    cause,
  })
}

/** Imports a Node module, or returns undefined elsewhere. The name is a variable so that browser bundlers ignore it. */
async function builtin<Name extends 'node:worker_threads' | 'node:os'>(name: Name) {
  type Module = Name extends 'node:os' ? typeof import('node:os') : typeof import('node:worker_threads')
  try {
    return (await import(/* @vite-ignore */ /* webpackIgnore: true */ name as string)) as Module
  } catch {
    return undefined
  }
}
