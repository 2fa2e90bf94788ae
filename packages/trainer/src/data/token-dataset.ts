/** @file A tokenized corpus in memory, as one stream with document boundaries. */
import { createHash } from 'node:crypto'
import { checkOptions, MoeError } from '@moe/core'
import type { TextTokenizer } from '../model.ts'
import { checkDocuments, utf8Bytes } from './documents.ts'
import { lastUpTo, type TokenStream } from './token-stream.ts'

/** Names of the begin and end tokens in common tokenizers. */
const USUAL_NAMES = {
  begin: ['<｜begin▁of▁sentence｜>', '<|bos|>', '<|begin_of_text|>', '<s>', '<bos>', '<|begin|>'],
  end: ['<｜end▁of▁sentence｜>', '<|eos|>', '<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>', '<|end|>'],
}

/** Id of the begin or end token, by its usual names; null if there is none. */
export function tokenNamed(tokenizer: TextTokenizer, place: keyof typeof USUAL_NAMES): number | null {
  for (const name of USUAL_NAMES[place]) {
    const id = tokenizer.tokenToId?.(name)
    if (id !== undefined) return id
  }
  return null
}

/** Options for the tokens around every document. */
export interface DocumentTokens {
  /**
   * Id of the token before every document, or null for none. Default: the tokenizer's begin token, by its usual names.
   */
  readonly bos?: number | null | undefined
  /** Id of the token after every document, or null for none. Default: the tokenizer's end token, by its usual names. */
  readonly eos?: number | null | undefined
}

/** Ids of the begin and end tokens. Without a begin token, the end token serves as both. */
export function documentTokens(
  tokenizer: TextTokenizer,
  { bos, eos }: DocumentTokens,
): { readonly bos: number | null; readonly eos: number | null } {
  const end = eos === undefined ? tokenNamed(tokenizer, 'end') : eos
  return { bos: bos === undefined ? (tokenNamed(tokenizer, 'begin') ?? end) : bos, eos: end }
}

/** Tokens of which only some are learned, for example an instruction with its answer. */
export interface Example {
  /** Ids of the whole example, in order. */
  readonly tokens: ArrayLike<number>
  /**
   * For each token, whether it is learned. The entry of the first token has no effect, because nothing precedes it.
   * Default: all tokens are learned.
   */
  readonly lossMask?: ArrayLike<boolean | number>
}

interface DatasetParts {
  readonly tokens: Int32Array
  readonly starts: Int32Array
  readonly examples: Int32Array | null
  readonly textBytes: number
  readonly vocabSize: number
  readonly padding: number
  readonly unpredictable: number
  readonly end: number | null | undefined
}

/**
 * A tokenized data set in memory: documents joined to one stream (`begin, text, end, begin, text, end, ...`), or
 * examples, which are not cut apart. If the tokenizer has no begin token, its end token is used as both, so that the
 * first token of every text can be predicted from something.
 */
export class TokenDataset implements TokenStream {
  /** All tokens of the stream. */
  readonly tokens: Int32Array
  /**
   * Positions of the tokens that are not predicted, ascending: the first of each document, and the unlearned ones of
   * examples.
   */
  readonly starts: Int32Array
  /** Position of the first token of each example, ascending; null for documents. */
  readonly examples: Int32Array | null
  /** UTF-8 bytes of the predicted text. */
  readonly textBytes: number
  /** Number of ids; all are below this. */
  readonly vocabSize: number
  /** Id that fills up rows after the end of the stream. */
  readonly padding: number
  /** Id of the token that ends every text; null if there is none, undefined if unknown. @internal */
  readonly end: number | null | undefined
  /** Number of text tokens that nothing precedes in their document (only without a begin token). */
  readonly unpredictable: number
  #digest: string | undefined

  private constructor(parts: DatasetParts) {
    this.tokens = parts.tokens
    this.starts = parts.starts
    this.examples = parts.examples
    this.textBytes = parts.textBytes
    this.vocabSize = parts.vocabSize
    this.padding = parts.padding
    this.unpredictable = parts.unpredictable
    this.end = parts.end
  }

  /**
   * Tokenizes documents. Text that spells a special token is encoded as ordinary text.
   *
   * @throws MoeError E_DATA if a document is not text, there are fewer than two tokens, or ids are outside the
   *   vocabulary
   */
  static fromTexts(documents: Iterable<string>, tokenizer: TextTokenizer, options: DocumentTokens = {}): TokenDataset {
    checkDocuments('TokenDataset', documents)
    if (typeof tokenizer?.encode !== 'function') throw noTokenizer(tokenizer)
    checkOptions('TokenDataset.fromTexts', options, { bos: true, eos: true })
    const { bos, eos } = documentTokens(tokenizer, options)
    const stream = new GrowingStream()
    const starts: number[] = []
    let textBytes = 0
    for (const text of documents) {
      if (typeof text !== 'string') throw noText(text)
      const ids = tokenizer.encode(text, { addSpecialTokens: false, parseSpecialTokens: false })
      if (ids.length === 0) continue
      starts.push(stream.length)
      if (bos !== null) stream.push(bos)
      stream.append(ids)
      if (eos !== null) stream.push(eos)
      textBytes += utf8Bytes(text)
    }
    const unpredictable = bos === null ? starts.length : 0
    const { vocabSize } = tokenizer
    return TokenDataset.#checked(stream.take(), {
      starts,
      textBytes,
      vocabSize,
      padding: eos ?? bos,
      unpredictable,
      end: eos,
    })
  }

  /**
   * Creates a data set from tokenized documents that include their begin and end tokens.
   *
   * @param options `textBytes` is needed for bits per byte. Ids must be below `vocabSize` (default: the highest id plus
   *   one). `padding` fills the last rows (default: the first token)
   * @throws MoeError E_DATA for ids outside the vocabulary, or fewer than two tokens
   */
  static fromTokens(
    documents: Iterable<ArrayLike<number>>,
    options: { vocabSize?: number; textBytes?: number; padding?: number } = {},
  ): TokenDataset {
    checkOptions('TokenDataset.fromTokens', options, { vocabSize: true, textBytes: true, padding: true })
    const stream = new GrowingStream()
    const starts: number[] = []
    for (const ids of documents) {
      if (ids.length === 0) continue
      starts.push(stream.length)
      stream.append(ids)
    }
    const tokens = stream.take()
    // Assumes that the first token of a document is its begin token.
    return TokenDataset.#checked(tokens, { starts, ...options, padding: options.padding ?? tokens[0] })
  }

  /**
   * Creates a data set from tokenized examples. An example is only cut at the end of its row, and no other example
   * precedes it: each has its own row, or is isolated in a shared row (`isolate` of `train`), like DeepSeek-V3's
   * fine-tuning samples (report, 5.1).
   *
   * @param options `textBytes`, of the learned parts, is needed for bits per byte. Ids must be below `vocabSize`
   *   (default: the highest id plus one). `padding` (default 0) fills rows
   * @throws MoeError E_DATA if `tokens` and `lossMask` of an example differ in length, or if there is nothing to learn;
   *   E_CONFIG if an example has other fields
   */
  static fromExamples(
    examples: Iterable<Example>,
    options: { vocabSize?: number; textBytes?: number; padding?: number } = {},
  ): TokenDataset {
    checkOptions('TokenDataset.fromExamples', options, { vocabSize: true, textBytes: true, padding: true })
    const stream = new GrowingStream()
    const starts: number[] = []
    const begins: number[] = []
    const ends = new Set<number>()
    for (const example of examples) {
      // A misspelled mask would train on all tokens.
      checkOptions('TokenDataset.fromExamples', example, { tokens: true, lossMask: true })
      const { tokens, lossMask } = example
      if (lossMask !== undefined && lossMask.length !== tokens.length) {
        throw new MoeError({
          code: 'E_DATA',
          op: 'TokenDataset.fromExamples',
          problem: `example ${begins.length} has ${tokens.length} tokens, but ${lossMask.length} entries in lossMask`,
          fix: 'pass one entry per token, or omit lossMask to learn all tokens',
        })
      }
      if (tokens.length === 0) continue
      begins.push(stream.length)
      for (let i = 0; i < tokens.length; i++)
        if (i === 0 || lossMask?.[i] === 0 || lossMask?.[i] === false) starts.push(stream.length + i)
      stream.append(tokens)
      let last = tokens.length - 1
      while (last > 0 && !(lossMask?.[last] ?? true)) last--
      ends.add(tokens[last])
    }
    if (begins.length > 0 && starts.length === stream.length) {
      throw new MoeError({
        code: 'E_DATA',
        op: 'TokenDataset.fromExamples',
        problem: `none of the ${stream.length} tokens is learned`,
        fix: 'mark the tokens of answers in lossMask; the first token of an example cannot be learned',
      })
    }
    const end = ends.size === 1 ? [...ends][0] : undefined
    return TokenDataset.#checked(stream.take(), { starts, examples: Int32Array.from(begins), end, ...options })
  }

  static #checked(
    tokens: Int32Array,
    parts: {
      readonly starts: readonly number[]
      readonly examples?: Int32Array
      readonly textBytes?: number
      readonly vocabSize?: number
      readonly padding?: number | null
      readonly unpredictable?: number
      readonly end?: number | null | undefined
    },
  ): TokenDataset {
    const { starts, examples = null, textBytes = 0, vocabSize, padding, unpredictable = 0, end } = parts
    if (tokens.length < 2) {
      throw new MoeError({
        code: 'E_DATA',
        op: 'TokenDataset',
        problem: `the documents have ${tokens.length} tokens in total, expected at least 2`,
        fix: 'pass more text',
      })
    }
    let highest = 0
    for (let i = 0; i < tokens.length; i++) {
      if (tokens[i] < 0) throw badId(tokens[i], i, vocabSize)
      if (tokens[i] > highest) {
        highest = tokens[i]
        if (vocabSize !== undefined && highest >= vocabSize) throw badId(highest, i, vocabSize)
      }
    }
    return new TokenDataset({
      tokens,
      starts: Int32Array.from(starts),
      examples,
      textBytes,
      vocabSize: vocabSize ?? highest + 1,
      padding: padding ?? 0,
      unpredictable,
      end,
    })
  }

  /** Number of tokens in the stream. */
  get length(): number {
    return this.tokens.length
  }

  /** Number of documents, or of examples. */
  get documents(): number {
    return (this.examples ?? this.starts).length
  }

  /** Number of predicted tokens: all but the first of each document, or the learned tokens of examples. */
  get predictable(): number {
    return this.tokens.length - this.starts.length
  }

  /** Digest of the content, for checkpoints. */
  get digest(): string {
    if (this.#digest === undefined) {
      const hash = createHash('sha256').update(this.tokens).update(this.starts)
      if (this.examples !== null) hash.update(this.examples)
      this.#digest = hash.digest('hex').slice(0, 16)
    }
    return this.#digest
  }

  documentAt(position: number): number {
    return lastUpTo(this.starts, position)
  }

  startOf(document: number): number {
    return this.starts[document] ?? Number.POSITIVE_INFINITY
  }

  read(from: number, count: number): Int32Array {
    return this.tokens.subarray(from, from + count)
  }
}

function noText(document: unknown): MoeError {
  return new MoeError({
    code: 'E_DATA',
    op: 'TokenDataset',
    problem: `a document is ${document === null ? 'null' : `of type ${typeof document}`}, expected a string`,
    fix: 'pass strings, or pass tokens to TokenDataset.fromTokens',
  })
}

export function noTokenizer(value: unknown): MoeError {
  return new MoeError({
    code: 'E_CONFIG',
    op: 'TokenDataset',
    problem: `the tokenizer is ${typeof value === 'object' && value !== null ? 'an object without encode' : value}`,
    fix: 'pass the result of trainBpe(texts, options) or await BpeTokenizer.fromFile(path)',
  })
}

function badId(id: number, position: number, vocabSize: number | undefined): MoeError {
  return new MoeError({
    code: 'E_DATA',
    op: 'TokenDataset',
    problem: `token ${position} of the stream is ${id}, outside the vocabulary of ${vocabSize ?? 'unknown'} ids`,
    fix: 'use the tokenizer that the vocabulary size belongs to',
    details: { id, position, vocabSize },
  })
}

/** A token array that grows as needed. */
class GrowingStream {
  #tokens = new Int32Array(1 << 16)
  length = 0

  push(id: number): void {
    this.#reserve(1)
    this.#tokens[this.length++] = id
  }

  append(ids: ArrayLike<number>): void {
    this.#reserve(ids.length)
    this.#tokens.set(ids, this.length)
    this.length += ids.length
  }

  take(): Int32Array {
    return this.#tokens.slice(0, this.length)
  }

  #reserve(more: number): void {
    if (this.length + more <= this.#tokens.length) return
    const grown = new Int32Array(Math.max(this.length + more, this.#tokens.length * 2))
    grown.set(this.#tokens.subarray(0, this.length))
    this.#tokens = grown
  }
}
