/** @file Creates constraints that hold generated texts to a form, and caches compiled grammars. */
import { yieldToEventLoop } from '@moe/core'
import type { TokenConstraint } from '@moe/deepseek'
import type { BpeTokenizer } from '@moe/tokenizer-bpe'
import { ApiError, CLIENT_GONE } from './errors.ts'
import { type Form, type FormPart, type GrammarHost, LocalGrammars, type Vocabulary } from './grammar-host.ts'
import { openGrammars } from './grammar-thread.ts'
import { findXGrammar } from './xgrammar.ts'

/**
 * Maximum of the string lengths of a form, added up, times the vocabulary size: compilation takes 0.2 to 0.5 µs per character and token. Without threads, compilation blocks
 * the server, so the limit is lower.
 */
const MAX_LENGTHS = { threaded: 2 ** 26, local: 2 ** 22 }

/** Maximum number of grammars per instance, since its memory only grows. */
const MAX_GRAMMARS = 64

/** Instances that accept more grammars, and all of them. Compiling delays the texts of an instance, so there are several; but each needs memory for the whole vocabulary. */
const MAX_INSTANCES = 3
const MAX_ALIVE = 6

/** From this cost on (string lengths times vocabulary size, or characters of the form), compilation may take a second or more. */
const EXPENSIVE = { lengths: 2 ** 20, size: 2 ** 13 }

interface Grammar {
  /** Resolves to its number in the host. */
  readonly compiled: Promise<number>
  /** Number of requests that wait for it. */
  waiting: number
}

interface Instance {
  readonly host: Promise<GrammarHost>
  readonly grammars: Map<string, Grammar>
  /** Number of requests that wait for grammars, plus number of unfinished texts. */
  users: number
}

/** Creates constraints for texts of one tokenizer. Loads @mlc-ai/web-xgrammar when the first constraint is requested. */
export class Grammars {
  readonly #tokenizer: BpeTokenizer
  readonly #endTokens: readonly number[]
  readonly #allowedControlTokens: string
  #vocabulary: Promise<Vocabulary> | undefined
  /** The instances that accept more grammars. */
  #instances: readonly Instance[] = []
  /** Number of instances, including those that only finish their texts. */
  #alive = 0
  /** Called when an instance may have become available. */
  #waiting: Array<() => void> = []

  /**
   * @param endTokens ids of the tokens that end a text
   * @param allowedControlTokens control tokens that forms may contain, concatenated
   */
  constructor(tokenizer: BpeTokenizer, endTokens: readonly number[], allowedControlTokens = '') {
    this.#tokenizer = tokenizer
    this.#endTokens = endTokens
    this.#allowedControlTokens = allowedControlTokens
  }

  /**
   * Returns one constraint for each of `count` texts.
   * @param param the request field that requires the form
   * @param signal aborts when the client disconnects; a compilation that no other request waits for is then cancelled
   * @throws ApiError 400 if the form cannot be compiled or the library is not installed, 499 if aborted
   */
  async constraints(form: Form, count: number, param: string, signal?: AbortSignal): Promise<FormConstraint[]> {
    if (this.#endTokens.length === 0)
      throw new ApiError(400, `${param}: the model has no end token: set eos_token_id in its config.json`, { param })
    const key = JSON.stringify(form)
    const lengths = lengthsOf(form.flat()) * this.#tokenizer.vocabSize
    const instance = await this.#acquire(key, lengths > EXPENSIVE.lengths || key.length > EXPENSIVE.size, signal)
    try {
      const host = await instance.host
      if (signal?.aborted) throw disconnected(signal.reason)
      this.#checkLengths(form, param, host instanceof LocalGrammars)
      const grammar = await this.#compiled(instance, host, form, key, { param, signal })
      const all: FormConstraint[] = []
      while (all.length < count) {
        const text = await host.begin(grammar)
        instance.users++
        all.push(new FormConstraint(host, text, () => this.#release(instance)))
      }
      return all
    } catch (error) {
      // The thread of the instance may have exited.
      if (!(error instanceof ApiError)) this.#retire(instance)
      throw error
    } finally {
      this.#release(instance)
    }
  }

  /** Waits for an instance and counts as its user. @throws ApiError 499 if aborted */
  async #acquire(key: string, isExpensive: boolean, signal: AbortSignal | undefined): Promise<Instance> {
    for (;;) {
      const instance = this.#instanceFor(key, isExpensive)
      if (instance) {
        instance.users++
        return instance
      }
      const change = new Promise<void>(resolve => this.#waiting.push(resolve))
      await unlessAborted(change, signal).catch(cause => {
        throw disconnected(cause)
      })
    }
  }

  /**
   * The instance that has the grammar, or an unused one, or a new one; at the maximum, the least used one. An expensive grammar would delay its texts, and with them all texts
   * of a batch. It gets a new instance instead, and the least used one only finishes its texts; undefined if there are too many.
   */
  #instanceFor(key: string, isExpensive: boolean): Instance | undefined {
    const all = this.#instances
    const known = all.find(({ grammars }) => grammars.has(key))
    if (known) return known
    const [least] = [...all].sort((a, b) => a.users - b.users)
    const isFull = all.length === MAX_INSTANCES
    if (least?.users === 0 || (isFull && !isExpensive)) return least
    if (this.#alive === MAX_ALIVE) return isExpensive ? undefined : least
    if (isFull) this.#retire(least)
    const library = findXGrammar()
    this.#vocabulary ??= vocabularyOf(this.#tokenizer, this.#endTokens, this.#allowedControlTokens, library)
    const another: Instance = { host: this.#vocabulary.then(openGrammars), grammars: new Map(), users: 0 }
    this.#instances = [...this.#instances, another]
    this.#alive++
    return another
  }

  async #compiled(
    instance: Instance,
    host: GrammarHost,
    form: Form,
    key: string,
    { param, signal }: { readonly param: string; readonly signal: AbortSignal | undefined },
  ): Promise<number> {
    const { grammars } = instance
    const grammar = grammars.get(key) ?? { compiled: host.compile(form), waiting: 0 }
    grammars.set(key, grammar)
    if (grammars.size >= MAX_GRAMMARS) this.#retire(instance)
    grammar.waiting++
    try {
      return await unlessAborted(grammar.compiled, signal)
    } catch (cause) {
      if (signal?.aborted) {
        // A running compilation can only be cancelled by terminating its thread.
        if (grammar.waiting === 1 && instance.users === 1) this.#retire(instance)
        throw disconnected(cause)
      }
      this.#retire(instance)
      const message = `${param}: cannot compile a grammar: ${(cause as Error).message}`
      throw new ApiError(400, message.slice(0, 500), { param, cause })
    } finally {
      grammar.waiting--
    }
  }

  #checkLengths(form: Form, param: string, isLocal: boolean): void {
    const characters = lengthsOf(form.flat())
    const limit = Math.floor((isLocal ? MAX_LENGTHS.local : MAX_LENGTHS.threaded) / this.#tokenizer.vocabSize)
    if (characters <= limit) return
    const message = `${param}: the string lengths add up to ${characters}, but the limit for this model's vocabulary is ${limit}`
    throw new ApiError(400, `${message}: omit large length limits`, { param })
  }

  /** Stops adding grammars to an instance. It closes after its last text. */
  #retire(instance: Instance): void {
    this.#instances = this.#instances.filter(one => one !== instance)
  }

  #release(instance: Instance): void {
    if (--instance.users > 0) return
    if (!this.#instances.includes(instance)) {
      this.#alive--
      void instance.host.then(host => host.close()).catch(() => {})
    }
    for (const wake of this.#waiting.splice(0)) wake()
  }
}

const disconnected = (cause: unknown) => new ApiError(CLIENT_GONE, 'the client disconnected', { cause })

/** The string lengths of the schemas, added up. */
function lengthsOf(parts: readonly FormPart[]): number {
  return parts.reduce((sum, part) => {
    if (typeof part !== 'object') return sum
    if ('calls' in part) return sum + lengthsOf(part.calls.flatMap(({ content }) => content))
    return 'schema' in part ? sum + part.characters : sum
  }, 0)
}

async function unlessAborted<T>(work: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (signal === undefined) return work
  let onAbort = () => {}
  const aborted = new Promise<never>((_, reject) => {
    onAbort = () => reject(signal.reason)
    signal.addEventListener('abort', onAbort)
  })
  return Promise.race([work, aborted]).finally(() => signal.removeEventListener('abort', onAbort))
}

async function vocabularyOf(
  tokenizer: BpeTokenizer,
  stops: readonly number[],
  allowedControlTokens: string,
  library: string,
): Promise<Vocabulary> {
  const none = new Uint8Array(0)
  const added = new Set(
    tokenizer.addedTokens.flatMap(({ id, content }) => (allowedControlTokens.includes(content) ? [] : id)),
  )
  const parts: Uint8Array[] = []
  const ends = new Uint32Array(tokenizer.vocabSize)
  let size = 0
  for (let id = 0; id < ends.length; id++) {
    if (id % 8192 === 8191) await yieldToEventLoop()
    // Added tokens, such as control tokens, cannot be part of JSON.
    const isText = !added.has(id) && tokenizer.idToToken(id) !== undefined
    const bytes = isText ? tokenizer.tokenBytes(id) : none
    parts.push(bytes)
    size += bytes.length
    ends[id] = size
  }
  return { library, bytes: Buffer.concat(parts), ends, stops }
}

/** Constrains one text to a form. */
export class FormConstraint implements TokenConstraint {
  readonly #host: GrammarHost
  readonly #text: number
  #onDispose: (() => void) | undefined
  #next: Promise<Int32Array>

  /** Use {@link Grammars.constraints}. */
  constructor(host: GrammarHost, text: number, onDispose: () => void) {
    this.#host = host
    this.#text = text
    this.#onDispose = onDispose
    this.#next = this.#request(null)
  }

  allowed(): Promise<Int32Array> {
    return this.#next
  }

  accept(token: number): void {
    this.#next = this.#request(token)
  }

  /** Frees the state of the text in the host. Call it when the text is finished. */
  dispose(): void {
    if (this.#onDispose) this.#host.end(this.#text)
    this.#onDispose?.()
    this.#onDispose = undefined
  }

  /** Requests the next mask early, so that it is computed while the model runs. */
  #request(token: number | null): Promise<Int32Array> {
    const next = this.#host.next(this.#text, token)
    next.catch(() => {})
    return next
  }
}
