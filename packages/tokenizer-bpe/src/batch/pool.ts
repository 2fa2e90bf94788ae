/** @file Worker threads that each hold a copy of a tokenizer and encode parts of a batch. */
import type { Worker } from 'node:worker_threads'
import { TokenizerError } from '../errors.ts'
import type { EncodeOptions } from '../tokenizer.ts'

/** Texts encoded by one message. Small, so that the threads end together. */
export interface BatchRequest {
  readonly texts: readonly string[]
  readonly options: EncodeOptions
}

/** Ids of the texts, end to end, and how many each has; or what went wrong. */
export type BatchReply = { readonly ids: Uint32Array; readonly lengths: Uint32Array } | { readonly error: string }

/** Characters in one message, about. */
const SHARE = 1 << 20

export class EncodePool {
  readonly #workers: Worker[]
  /** Requests wait here while the workers are at another batch. */
  #last: Promise<unknown> = Promise.resolve()

  constructor(workers: Worker[]) {
    this.#workers = workers
  }

  /** Starts a pool, or returns undefined where there are no worker threads (browsers) or only one core. */
  static async start(tokenizer: string, threads: number | undefined): Promise<EncodePool | undefined> {
    const [workerThreads, os] = await Promise.all([builtin('node:worker_threads'), builtin('node:os')])
    const count = threads ?? os?.availableParallelism() ?? 1
    if (workerThreads === undefined || count < 2) return undefined
    const name = import.meta.url.endsWith('.ts') ? './worker.ts' : './worker.js'
    const workers = Array.from({ length: count }, () => {
      const worker = new workerThreads.Worker(new URL(name, import.meta.url), { workerData: tokenizer })
      worker.unref()
      return worker
    })
    return new EncodePool(workers)
  }

  encode(texts: readonly string[], options: EncodeOptions): Promise<Uint32Array[]> {
    const run = this.#last.then(() => this.#run(texts, options))
    this.#last = run.catch(() => {})
    return run
  }

  async #run(texts: readonly string[], options: EncodeOptions): Promise<Uint32Array[]> {
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
            const reply = await ask(worker, { texts: texts.slice(first, next), options })
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
}

function ask(worker: Worker, request: BatchRequest): Promise<Exclude<BatchReply, { error: string }>> {
  return new Promise((resolve, reject) => {
    const done = () => {
      worker.off('message', onMessage)
      worker.off('error', onError)
    }
    const onMessage = (reply: BatchReply) => {
      done()
      if ('error' in reply) reject(new TokenizerError({ code: 'E_DATA', op: 'encodeBatch', problem: reply.error }))
      else resolve(reply)
    }
    const onError = (cause: Error) => {
      done()
      reject(
        new TokenizerError({
          code: 'E_DATA',
          op: 'encodeBatch',
          problem: `a worker thread failed: ${cause.message}`,
          cause,
        }),
      )
    }
    worker.on('message', onMessage)
    worker.on('error', onError)
    worker.postMessage(request)
  })
}

/** A module of Node, or undefined elsewhere. The name is a variable so that bundlers for browsers leave it alone. */
async function builtin<Name extends 'node:worker_threads' | 'node:os'>(name: Name) {
  type Module = Name extends 'node:os' ? typeof import('node:os') : typeof import('node:worker_threads')
  try {
    return (await import(/* @vite-ignore */ /* webpackIgnore: true */ name as string)) as Module
  } catch {
    return undefined
  }
}
