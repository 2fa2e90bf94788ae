/** @file Trains a tokenizer: counts pieces, learns merges, and creates the tokenizer. */

import type { AddedToken } from '../added-tokens.ts'
import { registerAll } from '../all-features.ts'
import { PADDING } from '../bpe/encoder.ts'
import { alphabetOrder, byteOfChar, charOfByte } from '../byte-alphabet.ts'
import { TokenizerError } from '../errors.ts'
import { feature } from '../features.ts'
import { MAX_LENGTH } from '../json/added-tokens.ts'
import { describe } from '../json/check.ts'
import { compilePreTokenizer } from '../json/pre-tokenizer.ts'
import { MAX_ID, modelFromTokens } from '../model.ts'
import { readNormalizer } from '../normalizer.ts'
import { type PreTokenizerName, patternOf, preTokenizerJson, preTokenizerNames } from '../pre-tokenizers.ts'
import { BpeTokenizer } from '../tokenizer.ts'
import { validation } from '../validation.ts'
import { MergeLearner } from './merge-learner.ts'
import { PieceCounter } from './piece-counter.ts'

/** The progress of training. */
export interface TrainProgress {
  /** `counting`: texts are read and pieces counted; then `merging`: pairs are merged. */
  readonly phase: 'counting' | 'merging'
  /** UTF-8 bytes read so far. */
  readonly bytes: number
  /** Distinct pieces found so far. */
  readonly pieces: number
  /** Number of tokens so far. */
  readonly tokens: number
  /** Requested number of tokens. */
  readonly vocabSize: number
}

/** A special token of at most 1,024 characters with custom flags. By default it is special and not normalized. */
export type SpecialToken = { readonly content: string } & Partial<Omit<AddedToken, 'id'>>

/** Options of `trainBpe`. */
export interface TrainBpeOptions {
  /** Number of ids, including special tokens and alphabet. There are fewer if the corpus has no more pairs to merge. */
  readonly vocabSize: number
  /**
   * How texts are split into pieces, which merges do not cross: a name, a regular expression (Oniguruma syntax, as in
   * tokenizer.json) whose matches and the text between them are pieces, or several that are applied in turn. Default
   * `deepseek-v3`.
   */
  readonly preTokenizer?: PreTokenizerName | RegExp | { readonly patterns: readonly string[] } | undefined
  /** Unicode normalization that is applied to texts first. Default: none. */
  readonly normalizer?: 'NFC' | 'NFD' | 'NFKC' | 'NFKD' | undefined
  /** Special tokens. They get the first ids, in this order, and are not searched for in the corpus. */
  readonly specialTokens?: readonly (string | SpecialToken)[] | undefined
  /** Minimum number of occurrences of a merged pair. Default 2. */
  readonly minFrequency?: number | undefined
  /**
   * Tokens of single bytes: all 256 (default; every text can then be encoded), only those in the corpus, or those and
   * the given characters of the byte alphabet.
   */
  readonly initialAlphabet?: 'bytes' | 'seen' | { readonly characters: string } | undefined
  /** Maximum token length in bytes, exclusive. Default: no limit. */
  readonly maxTokenLength?: number | undefined
  /** Whether to accept a corpus that looks like binary data. Default false. */
  readonly allowBinary?: boolean | undefined
  /** Called every 4 MiB of text, then every 500 merges, and at the end of each phase. */
  readonly onProgress?: ((progress: TrainProgress) => void) | undefined
  /**
   * Aborts training with E_ABORTED. `trainBpe` does not yield to the event loop; abort from its iterable or
   * `onProgress`.
   */
  readonly signal?: AbortSignal | undefined
}

/**
 * Trains a byte-level BPE tokenizer. The result depends only on the options and the texts, not on the order of the
 * texts. The merges are the same as those of Hugging Face's `BpeTrainer`.
 * @param texts are read once, one at a time; pieces do not cross texts
 * @throws TokenizerError E_CONFIG for invalid options, E_DATA for an empty or binary corpus, E_ABORTED
 */
export function trainBpe(texts: Iterable<string>, options: TrainBpeOptions): BpeTokenizer {
  const trainer = new Trainer(options, texts)
  checkTexts(texts)
  for (const text of texts) for (const _ of trainer.count(text));
  trainer.startMerging()
  while (trainer.merge(500)) trainer.report()
  return trainer.finish()
}

/** As `trainBpe`, for texts that arrive asynchronously. Yields to the event loop, so that a signal can abort it. */
export async function trainBpeAsync(
  texts: AsyncIterable<string> | Iterable<string>,
  options: TrainBpeOptions,
): Promise<BpeTokenizer> {
  const trainer = new Trainer(options)
  checkTexts(texts)
  let paused = performance.now()
  const pause = async () => {
    if (performance.now() - paused < 20) return
    await new Promise(resolve => setTimeout(resolve))
    paused = performance.now()
  }
  for await (const text of texts) {
    for (const _ of trainer.count(text)) await pause()
  }
  trainer.startMerging()
  while (trainer.merge(100)) {
    trainer.report()
    await pause()
  }
  return trainer.finish()
}

function checkTexts(texts: unknown): void {
  if (typeof texts === 'object' && texts) return
  throw new TokenizerError({
    code: 'E_DATA',
    op: 'trainBpe',
    problem: `expected an iterable of strings, got ${describe(texts)}`,
    fix: 'pass [text] or a generator of texts',
  })
}

/** Bytes between two calls of `onProgress` while counting. */
const REPORT_BYTES = 1 << 22

class Trainer {
  readonly #options: TrainBpeOptions
  readonly #special: AddedToken[]
  readonly #json: unknown
  readonly #preTokenizer: ReturnType<typeof compilePreTokenizer>
  readonly #normalizer: ((text: string) => string) | undefined
  readonly #counter = new PieceCounter()
  readonly #ends = new Int32Array(4096)
  readonly #utf8 = new TextEncoder()
  #scratch = new Uint8Array(1 << 16)
  #view = new DataView(this.#scratch.buffer)
  #bytes = 0
  #reported = 0
  #texts = 0
  #tokens: string[] = []
  #learner: MergeLearner | undefined

  constructor(options: TrainBpeOptions, texts?: Iterable<string>) {
    validation.check?.('trainBpe', options, texts)
    registerAll()
    this.#options = options
    this.#special = specialTokens(options.specialTokens ?? [])
    const { vocabSize } = options
    const alphabet = (options.initialAlphabet ?? 'bytes') === 'bytes' ? 256 : 0
    if (!Number.isInteger(vocabSize) || vocabSize < alphabet + this.#special.length) {
      throw config(
        `vocabSize ${describe(vocabSize)} is smaller than ${alphabet} bytes + ${this.#special.length} special tokens`,
        `pass at least ${alphabet + this.#special.length}`,
      )
    }
    if (vocabSize > MAX_ID) throw config(`vocabSize is ${vocabSize}`, `pass at most ${MAX_ID}`)
    const minFrequency = options.minFrequency ?? 2
    if (!(minFrequency >= 0)) throw config(`minFrequency ${minFrequency} is not a number of occurrences`)
    this.#json = preTokenizerOf(options.preTokenizer ?? 'deepseek-v3')
    this.#preTokenizer = compilePreTokenizer(this.#json)
    this.#normalizer = readNormalizer(options.normalizer && { type: options.normalizer })
  }

  /** Counts the pieces of a text. Yields after every few thousand, so that the caller can pause. */
  *count(text: string): Generator<void> {
    this.#checkSignal()
    if (typeof text !== 'string') {
      throw new TokenizerError({
        code: 'E_DATA',
        op: 'trainBpe',
        problem: `text ${this.#texts} is ${describe(text)}, not a string`,
        fix: 'read files as UTF-8',
      })
    }
    this.#texts++
    const normal = this.#normalizer ? this.#normalizer(text) : text
    const need = normal.length * 3 + PADDING
    if (need > this.#scratch.length) {
      this.#scratch = new Uint8Array(need)
      this.#view = new DataView(this.#scratch.buffer)
    }
    const end = this.#utf8.encodeInto(normal, this.#scratch).written
    const prepared = this.#preTokenizer.prepare?.(this.#scratch, 0, end, true)
    const bytes = prepared?.bytes ?? this.#scratch
    const view = prepared ? new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength) : this.#view
    const stop = prepared?.length ?? end
    let pos = 0
    while (pos < stop) {
      const count = this.#preTokenizer.scanner(bytes, pos, stop, this.#ends)
      this.#counter.add(bytes, view, pos, this.#ends, count)
      pos = this.#ends[count - 1]
      if (this.#bytes + pos - this.#reported > REPORT_BYTES) {
        this.#reported = this.#bytes + pos
        this.report()
        this.#checkSignal()
      }
      yield
    }
    this.#bytes += end
    if (this.#scratch.length > 1 << 26) {
      this.#scratch = new Uint8Array(1 << 16)
      this.#view = new DataView(this.#scratch.buffer)
    }
  }

  startMerging(): void {
    const counter = this.#counter
    if (counter.size === 0) {
      throw new TokenizerError({
        code: 'E_DATA',
        op: 'trainBpe',
        problem: `the corpus is empty: ${this.#texts} texts without a character`,
        fix: 'check the path or the iterable that you pass',
      })
    }
    if (!this.#options.allowBinary) this.#refuseBinary()

    const seen = new Uint8Array(256)
    const total = counter.starts[counter.size]
    for (let i = 0; i < total; i++) seen[counter.bytes[i]] = 1
    const alphabet = this.#options.initialAlphabet ?? 'bytes'
    if (typeof alphabet === 'object') {
      for (const char of alphabet.characters) {
        const byte = byteOfChar[char.codePointAt(0)!] ?? -1
        if (byte < 0) throw config(`initialAlphabet: ${describe(char)} is not a character of the byte alphabet`)
        seen[byte] = 1
      }
    }
    const tokens = this.#special.map(token => token.content)
    const idOf = new Map(tokens.map((content, id) => [content, id]))
    const byteToken = new Int32Array(256).fill(-1)
    for (const byte of alphabetOrder()) {
      if (alphabet !== 'bytes' && seen[byte] === 0) continue
      const char = String.fromCharCode(charOfByte[byte])
      let id = idOf.get(char)
      if (id === undefined) {
        id = tokens.length
        tokens.push(char)
        idOf.set(char, id)
      }
      byteToken[byte] = id
    }
    if (tokens.length > this.#options.vocabSize) {
      throw config(`vocabSize ${this.#options.vocabSize} is smaller than the alphabet of ${tokens.length} tokens`)
    }

    // Pieces of one byte have no pairs.
    let cells = 1
    for (let i = 0; i < counter.size; i++) {
      const width = counter.starts[i + 1] - counter.starts[i]
      if (width > 1) cells += width + 1
    }
    const layout = new Int32Array(cells).fill(-1)
    const pieceOf = new Int32Array(cells)
    let at = 1
    for (let i = 0; i < counter.size; i++) {
      const start = counter.starts[i]
      const stop = counter.starts[i + 1]
      if (stop - start < 2) continue
      for (let b = start; b < stop; b++) {
        layout[at] = byteToken[counter.bytes[b]]
        pieceOf[at++] = i
      }
      at++
    }
    const counts = counter.counts
    this.#tokens = tokens
    this.#learner = new MergeLearner({
      cells: layout,
      weightOf: cell => counts[pieceOf[cell]],
      tokens,
      idOf,
      vocabSize: this.#options.vocabSize,
      minFrequency: this.#options.minFrequency ?? 2,
      maxTokenLength: this.#options.maxTokenLength ?? Number.POSITIVE_INFINITY,
    })
    this.report()
  }

  merge(limit: number): boolean {
    this.#checkSignal()
    return this.#learner!.learn(limit)
  }

  report(): void {
    this.#options.onProgress?.({
      phase: this.#learner ? 'merging' : 'counting',
      bytes: Math.max(this.#bytes, this.#reported),
      pieces: this.#counter.size,
      tokens: this.#tokens.length,
      vocabSize: this.#options.vocabSize,
    })
  }

  finish(): BpeTokenizer {
    this.report()
    const model = modelFromTokens(this.#tokens, Int32Array.from(this.#learner!.merges))
    const parts = {
      normalizer: this.#options.normalizer ? { type: this.#options.normalizer } : null,
      pre_tokenizer: this.#json,
      post_processor: { type: 'ByteLevel', add_prefix_space: true, trim_offsets: false, use_regex: true },
      decoder: { type: 'ByteLevel', add_prefix_space: true, trim_offsets: true, use_regex: true },
    }
    return new BpeTokenizer(model, this.#special, parts, this.#preTokenizer)
  }

  /** Throws if the corpus has many control and replacement characters, as binary data read as UTF-8 does. */
  #refuseBinary(): void {
    const { bytes, starts, counts, size } = this.#counter
    let odd = 0
    let all = 0
    for (let i = 0; i < size; i++) {
      const stop = starts[i + 1]
      for (let b = starts[i]; b < stop; b++) {
        const byte = bytes[b]
        if ((byte & 0xc0) === 0x80) continue
        all += counts[i]
        const control = byte < 0x20 && !((byte >= 8 && byte <= 13) || byte === 0x1b)
        if (control || (byte === 0xef && bytes[b + 1] === 0xbf && bytes[b + 2] === 0xbd)) odd += counts[i]
      }
    }
    if (odd > all / 10) {
      throw new TokenizerError({
        code: 'E_DATA',
        op: 'trainBpe',
        problem: `the corpus looks like binary data: ${Math.round((odd / all) * 100)}% control or replacement characters`,
        fix: 'pass text decoded as UTF-8, or allowBinary: true',
        details: { characters: all, odd },
      })
    }
  }

  #checkSignal(): void {
    const signal = this.#options.signal
    if (signal?.aborted) {
      throw new TokenizerError({
        code: 'E_ABORTED',
        op: 'trainBpe',
        problem: 'training was aborted',
        cause: signal.reason,
      })
    }
  }
}

function config(problem: string, fix?: string): TokenizerError {
  return new TokenizerError({ code: 'E_CONFIG', op: 'trainBpe', problem, fix })
}

function preTokenizerOf(choice: NonNullable<TrainBpeOptions['preTokenizer']>): unknown {
  if (typeof choice === 'string') {
    if (!preTokenizerNames().includes(choice)) {
      throw config(
        `unknown preTokenizer ${describe(choice)}`,
        `use one of ${preTokenizerNames().join(', ')}, a RegExp or { patterns: [text, ...] }`,
      )
    }
    const { patterns, digits } = feature(choice)
    return preTokenizerJson(patterns, digits)
  }
  return preTokenizerJson(choice instanceof RegExp ? [patternOf(choice)] : choice.patterns)
}

const FLAGS = { special: true, normalized: false, lstrip: false, rstrip: false, single_word: false }

function specialTokens(list: NonNullable<TrainBpeOptions['specialTokens']>): AddedToken[] {
  const seen = new Set<string>()
  return list.map((item, id) => {
    const given = typeof item === 'string' ? { content: item } : item
    if (typeof given.content !== 'string' || given.content === '') throw config(`specialTokens[${id}] is empty`)
    if (given.content.length > MAX_LENGTH)
      throw config(`specialTokens[${id}] has ${given.content.length} characters`, `use at most ${MAX_LENGTH}`)
    if (seen.has(given.content)) throw config(`specialTokens: ${describe(given.content)} is listed twice`)
    seen.add(given.content)
    const flags = { ...FLAGS }
    for (const [name, value] of Object.entries(given)) {
      // An entry of `addedTokens` has an id, too.
      if (name === 'content' || name === 'id' || value === undefined) continue
      if (!Object.hasOwn(FLAGS, name) || typeof value !== 'boolean') {
        const fix = `flags are ${Object.keys(FLAGS).join(', ')}: true or false`
        throw config(`specialTokens[${id}].${name} is ${describe(value)}`, fix)
      }
      flags[name as keyof typeof FLAGS] = value
    }
    return { ...flags, content: given.content, id }
  })
}
