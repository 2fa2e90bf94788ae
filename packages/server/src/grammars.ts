/** @file Forms that texts can be held to. */
import { eventLoopTurn } from '@moe/core'
import type { TokenConstraint } from '@moe/deepseek'
import type { BpeTokenizer } from '@moe/tokenizer-bpe'
import { ApiError, CLIENT_GONE } from './errors.ts'
import { type Form, type GrammarHost, LocalGrammars, type Vocabulary } from './grammar-host.ts'
import { openGrammars } from './grammar-thread.ts'
import { findXGrammar } from './xgrammar.ts'

/**
 * Characters of texts with lengths times the vocabulary: each takes a fifth to half of a microsecond a token. Fewer where the server does nothing else meanwhile.
 */
const MOST_LENGTHS = { apart: 2 ** 26, here: 2 ** 22 }

/** Grammars of an instance, whose memory only grows. */
const MOST_GRAMMARS = 64

/** What is made in one holds up its texts, and an instance takes memory for the whole vocabulary. */
const MOST_INSTANCES = 3

interface Grammar {
  readonly made: Promise<number>
  /** Requests that wait for it. */
  waiting: number
}

interface Instance {
  readonly host: Promise<GrammarHost>
  readonly grammars: Map<string, Grammar>
  /** Requests that wait for grammars, and texts. */
  users: number
}

/** Constraints for the texts of one tokenizer, by @mlc-ai/web-xgrammar, which is loaded when the first is asked for. */
export class Grammars {
  readonly #tokenizer: BpeTokenizer
  readonly #ends: readonly number[]
  readonly #written: string
  #vocabulary: Promise<Vocabulary> | undefined
  /** Those that take grammars. */
  #instances: readonly Instance[] = []

  /**
   * @param ends ids of the tokens that end a text
   * @param written text of which control tokens may be in a form
   */
  constructor(tokenizer: BpeTokenizer, ends: readonly number[], written = '') {
    this.#tokenizer = tokenizer
    this.#ends = ends
    this.#written = written
  }

  /**
   * A constraint for each of so many texts.
   * @param param field of the request that asks for it
   * @param signal of the request: a grammar that nobody waits for any more is not made
   * @throws ApiError 400 where there is no grammar of it, or no library; 499 for the signal
   */
  async constraints(form: Form, count: number, param: string, signal?: AbortSignal): Promise<FormConstraint[]> {
    if (this.#ends.length === 0)
      throw new ApiError(
        400,
        `${param}: this model has no token that ends a text: its config.json needs eos_token_id`,
        { param },
      )
    const key = JSON.stringify(form)
    const instance = this.#instanceFor(key)
    instance.users++
    try {
      const host = await instance.host
      if (signal?.aborted) throw gone(signal.reason)
      this.#checkLengths(form, param, host instanceof LocalGrammars)
      const grammar = await this.#made(instance, host, form, key, { param, signal })
      const all: FormConstraint[] = []
      while (all.length < count) {
        const text = await host.begin(grammar)
        instance.users++
        all.push(new FormConstraint(host, text, () => this.#leave(instance)))
      }
      return all
    } catch (error) {
      // Its thread may have ended.
      if (!(error instanceof ApiError)) this.#retire(instance)
      throw error
    } finally {
      this.#leave(instance)
    }
  }

  /** The one that has the grammar, else one that nobody uses, or another. */
  #instanceFor(key: string): Instance {
    const all = this.#instances
    const known = all.find(({ grammars }) => grammars.has(key))
    if (known) return known
    const [least] = [...all].sort((a, b) => a.users - b.users)
    if (least?.users === 0 || all.length === MOST_INSTANCES) return least
    const library = findXGrammar()
    this.#vocabulary ??= vocabularyOf(this.#tokenizer, this.#ends, this.#written, library)
    const another: Instance = { host: this.#vocabulary.then(openGrammars), grammars: new Map(), users: 0 }
    this.#instances = [...all, another]
    return another
  }

  async #made(
    instance: Instance,
    host: GrammarHost,
    form: Form,
    key: string,
    { param, signal }: { readonly param: string; readonly signal: AbortSignal | undefined },
  ): Promise<number> {
    const { grammars } = instance
    const grammar = grammars.get(key) ?? { made: host.compile(form), waiting: 0 }
    grammars.set(key, grammar)
    if (grammars.size >= MOST_GRAMMARS) this.#retire(instance)
    grammar.waiting++
    try {
      return await unlessAborted(grammar.made, signal)
    } catch (cause) {
      if (signal?.aborted) {
        // Only the end of its thread ends the making of a grammar.
        if (grammar.waiting === 1 && instance.users === 1) this.#retire(instance)
        throw gone(cause)
      }
      this.#retire(instance)
      const message = `${param}: no grammar can be made of it: ${(cause as Error).message}`
      throw new ApiError(400, message.slice(0, 500), { param, cause })
    } finally {
      grammar.waiting--
    }
  }

  #checkLengths(form: Form, param: string, isHere: boolean): void {
    const characters = form.flat().reduce((sum, part) => sum + (isSchema(part) ? part.characters : 0), 0)
    const most = Math.floor((isHere ? MOST_LENGTHS.here : MOST_LENGTHS.apart) / this.#tokenizer.vocabSize)
    if (characters <= most) return
    const message = `${param}: lengths of strings add up to ${characters}, with this model's vocabulary to ${most} at most`
    throw new ApiError(400, `${message}: leave them out where they are large`, { param })
  }

  /** It takes no more, and ends with its last text. */
  #retire(instance: Instance): void {
    this.#instances = this.#instances.filter(one => one !== instance)
  }

  #leave(instance: Instance): void {
    if (--instance.users > 0 || this.#instances.includes(instance)) return
    void instance.host.then(host => host.close()).catch(() => {})
  }
}

const gone = (cause: unknown) => new ApiError(CLIENT_GONE, 'the client went away', { cause })

const isSchema = (part: Form[number][number]) => typeof part === 'object' && 'schema' in part

async function unlessAborted<T>(work: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (signal === undefined) return work
  let leave = () => {}
  const left = new Promise<never>((_, reject) => {
    leave = () => reject(signal.reason)
    signal.addEventListener('abort', leave)
  })
  return Promise.race([work, left]).finally(() => signal.removeEventListener('abort', leave))
}

async function vocabularyOf(
  tokenizer: BpeTokenizer,
  stops: readonly number[],
  written: string,
  library: string,
): Promise<Vocabulary> {
  const none = new Uint8Array(0)
  const added = new Set(tokenizer.addedTokens.flatMap(({ id, content }) => (written.includes(content) ? [] : id)))
  const parts: Uint8Array[] = []
  const ends = new Uint32Array(tokenizer.vocabSize)
  let size = 0
  for (let id = 0; id < ends.length; id++) {
    if (id % 8192 === 8191) await eventLoopTurn()
    // What is added, such as control tokens, is no part of JSON.
    const isText = !added.has(id) && tokenizer.idToToken(id) !== undefined
    const bytes = isText ? tokenizer.tokenBytes(id) : none
    parts.push(bytes)
    size += bytes.length
    ends[id] = size
  }
  return { library, bytes: Buffer.concat(parts), ends, stops }
}

/** Holds one text to a form. */
export class FormConstraint implements TokenConstraint {
  readonly #host: GrammarHost
  readonly #text: number
  #over: (() => void) | undefined
  #next: Promise<Int32Array>

  /** Use `Grammars.constraints`. */
  constructor(host: GrammarHost, text: number, over: () => void) {
    this.#host = host
    this.#text = text
    this.#over = over
    this.#next = this.#ask(null)
  }

  allowed(): Promise<Int32Array> {
    return this.#next
  }

  accept(token: number): void {
    this.#next = this.#ask(token)
  }

  /** Frees what it holds, when its text is made. */
  dispose(): void {
    if (this.#over) this.#host.end(this.#text)
    this.#over?.()
    this.#over = undefined
  }

  /** It is found while the model computes what is likely. */
  #ask(token: number | null): Promise<Int32Array> {
    const next = this.#host.next(this.#text, token)
    next.catch(() => {})
    return next
  }
}
