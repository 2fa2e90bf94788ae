/** @file Runs a grammar host on a worker thread: compiling a grammar may take seconds, during which the server must continue with other texts. */
import type { Worker } from 'node:worker_threads'
import { type Form, type GrammarHost, LocalGrammars, type Vocabulary } from './grammar-host.ts'

type Method = Exclude<keyof GrammarHost, 'close'>

/** A message to the thread: a call of a method of its host. */
export interface GrammarCall {
  readonly number: number
  readonly method: Method
  readonly values: readonly unknown[]
}

/** A message from the thread: the result of a call. Number 0 is the result of opening the host. */
export type GrammarReply = { readonly number: number } & ({ readonly value: unknown } | { readonly error: string })

/** Opens a host on a new thread, or on the calling thread if no thread can be started. */
export async function openGrammars(vocabulary: Vocabulary): Promise<GrammarHost> {
  const name = import.meta.url.endsWith('.ts') ? './grammar-worker.ts' : './moe-grammar-worker.js'
  let thread: ThreadedGrammars | undefined
  try {
    const { Worker } = await import('node:worker_threads')
    thread = new ThreadedGrammars(new Worker(new URL(name, import.meta.url), { workerData: vocabulary }))
    await thread.opened
    return thread
  } catch {
    thread?.close()
    return LocalGrammars.open(vocabulary)
  }
}

interface PendingCall {
  resolve(value: unknown): void
  reject(error: Error): void
}

class ThreadedGrammars implements GrammarHost {
  readonly opened: Promise<unknown>
  readonly #worker: Worker
  readonly #pending = new Map<number, PendingCall>()
  #calls = 0
  #failure: Error | undefined

  constructor(worker: Worker) {
    this.#worker = worker
    this.opened = this.#reply(0)
    worker.on('message', ({ number, ...reply }: GrammarReply) => {
      const call = this.#pending.get(number)
      this.#pending.delete(number)
      if (this.#pending.size === 0) worker.unref()
      if ('error' in reply) call?.reject(new Error(reply.error))
      else call?.resolve(reply.value)
    })
    worker.on('error', error => this.#fail(error))
    worker.on('exit', () => this.#fail(new Error('the grammar thread has exited')))
  }

  compile(form: Form): Promise<number> {
    return this.#call('compile', form) as Promise<number>
  }

  begin(grammar: number): Promise<number> {
    return this.#call('begin', grammar) as Promise<number>
  }

  next(text: number, token: number | null): Promise<Int32Array> {
    return this.#call('next', text, token) as Promise<Int32Array>
  }

  end(text: number): void {
    this.#call('end', text).catch(() => {})
  }

  close(): void {
    void this.#worker.terminate()
  }

  async #call(method: Method, ...values: readonly unknown[]): Promise<unknown> {
    if (this.#failure) throw this.#failure
    const number = ++this.#calls
    this.#worker.postMessage({ number, method, values } satisfies GrammarCall)
    return this.#reply(number)
  }

  #reply(number: number): Promise<unknown> {
    // The thread keeps the process alive only while a call is pending.
    this.#worker.ref()
    return new Promise((resolve, reject) => {
      this.#pending.set(number, { resolve, reject })
    })
  }

  #fail(error: Error): void {
    this.#failure ??= error
    for (const { reject } of this.#pending.values()) reject(this.#failure)
    this.#pending.clear()
  }
}
