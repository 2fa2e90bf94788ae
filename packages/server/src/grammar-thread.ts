/** @file Grammars on a thread of their own: one may take seconds to make, in which a server has other texts to go on with. */
import type { Worker } from 'node:worker_threads'
import { type Form, type GrammarHost, LocalGrammars, type Vocabulary } from './grammar-host.ts'

type Method = Exclude<keyof GrammarHost, 'close'>

/** A call of a host's method. */
export interface GrammarCall {
  readonly number: number
  readonly method: Method
  readonly values: readonly unknown[]
}

/** What came of it, and first of all of opening, which is number 0. */
export type GrammarReply = { readonly number: number } & ({ readonly value: unknown } | { readonly error: string })

/** A host on its own thread, or on this one where there are no threads. */
export async function openGrammars(vocabulary: Vocabulary): Promise<GrammarHost> {
  const name = import.meta.url.endsWith('.ts') ? './worker.ts' : './worker.js'
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

interface Waiting {
  resolve(value: unknown): void
  reject(error: Error): void
}

class ThreadedGrammars implements GrammarHost {
  readonly opened: Promise<unknown>
  readonly #worker: Worker
  readonly #waiting = new Map<number, Waiting>()
  #calls = 0
  #failure: Error | undefined

  constructor(worker: Worker) {
    this.#worker = worker
    this.opened = this.#reply(0)
    worker.on('message', ({ number, ...reply }: GrammarReply) => {
      const waiting = this.#waiting.get(number)
      this.#waiting.delete(number)
      if (this.#waiting.size === 0) worker.unref()
      if ('error' in reply) waiting?.reject(new Error(reply.error))
      else waiting?.resolve(reply.value)
    })
    worker.on('error', error => this.#fail(error))
    worker.on('exit', () => this.#fail(new Error('the thread of the grammars has ended')))
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
    // A thread that nobody waits for does not keep the process.
    this.#worker.ref()
    return new Promise((resolve, reject) => {
      this.#waiting.set(number, { resolve, reject })
    })
  }

  #fail(error: Error): void {
    this.#failure ??= error
    for (const { reject } of this.#waiting.values()) reject(this.#failure)
    this.#waiting.clear()
  }
}
