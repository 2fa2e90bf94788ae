/** @file A pool of worker threads, each with a copy of the tokenizer, that encode parts of a batch. */
import type { Worker } from 'node:worker_threads'
import { TokenizerError } from '../errors.ts'
import type { EncodeOptions } from '../tokenizer.ts'

/** Texts to encode in one message. Messages are small, so that threads finish at about the same time. */
export interface BatchRequest {
  readonly texts: readonly string[]
  readonly options: EncodeOptions
}

/** Concatenated ids of the texts and their counts, or an error message. */
export type BatchReply = { readonly ids: Uint32Array; readonly lengths: Uint32Array } | { readonly error: string }

/** Approximate number of characters per message. */
const SHARE = 1 << 20

export class EncodePool {
  /** Whether a worker has ended with an error. Such a pool encodes nothing more. */
  failed = false
  readonly #workers: Worker[]
  /** Requests that wait until the workers finish another batch. */
  #last: Promise<unknown> = Promise.resolve()

  constructor(workers: Worker[]) {
    this.#workers = workers
  }

  /**
   * Starts a pool. Returns undefined if there are no worker threads (browsers), only one core, or no file of the worker
   * (the package is bundled into a program).
   */
  static async start(tokenizer: string, threads: number | undefined): Promise<EncodePool | undefined> {
    const [workerThreads, os] = await Promise.all([builtin('node:worker_threads'), builtin('node:os')])
    const count = threads ?? os?.availableParallelism() ?? 1
    if (workerThreads === undefined || count < 2) return undefined
    const name = import.meta.url.endsWith('.ts') ? './worker.ts' : './worker.js'
    const url = new URL(name, import.meta.url)
    const workers = Array.from({ length: count }, () => new workerThreads.Worker(url, { workerData: tokenizer }))
    try {
      await Promise.all(workers.map(nextMessage))
    } catch (error) {
      for (const worker of workers) void worker.terminate()
      if ((error as NodeJS.ErrnoException).code === 'MODULE_NOT_FOUND') return undefined
      throw workerError(error as Error)
    }
    for (const worker of workers) worker.unref()
    return new EncodePool(workers)
  }

  encode(texts: readonly string[], options: EncodeOptions): Promise<Uint32Array[]> {
    const run = this.#last.then(() => this.#run(texts, options))
    this.#last = run.catch(() => {})
    return run
  }

  async #run(texts: readonly string[], options: EncodeOptions): Promise<Uint32Array[]> {
    if (this.failed) throw workerError(new Error('it ended in an earlier batch'))
    const results: Uint32Array[] = new Array(texts.length)
    let next = 0
    await Promise.all(
      this.#workers.map(async worker => {
        worker.ref()
        try {
          while (next < texts.length) {
            const first = next
            let size = 0
            while (next < texts.length && size < SHARE) size += texts[next++].length
            const reply = await this.#ask(worker, { texts: texts.slice(first, next), options })
            let at = 0
            reply.lengths.forEach((length, i) => {
              results[first + i] = reply.ids.slice(at, at + length)
              at += length
            })
          }
        } finally {
          worker.unref()
        }
      }),
    )
    return results
  }

  async #ask(worker: Worker, request: BatchRequest): Promise<Exclude<BatchReply, { error: string }>> {
    worker.postMessage(request)
    const reply = (await nextMessage(worker).catch(error => {
      this.failed = true
      throw workerError(error)
    })) as BatchReply
    if ('error' in reply) throw new TokenizerError({ code: 'E_DATA', op: 'encodeBatch', problem: reply.error })
    return reply
  }
}

/** Resolves to the next message of a worker; the first one, null, tells that it is ready. */
function nextMessage(worker: Worker): Promise<BatchReply | null> {
  return new Promise((resolve, reject) => {
    const onMessage = (message: BatchReply | null) => {
      worker.off('error', onError)
      resolve(message)
    }
    const onError = (error: Error) => {
      worker.off('message', onMessage)
      reject(error)
    }
    worker.once('message', onMessage)
    worker.once('error', onError)
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
