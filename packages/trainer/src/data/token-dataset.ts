/** @file A corpus as one stream of tokens with document boundaries. */
import { createHash } from 'node:crypto'
import { checkOptions, MoeError } from '@moe/core'
import type { TextTokenizer } from '../model.ts'
import { checkDocuments } from './documents.ts'

/** Names that the usual tokenizers have for the tokens that begin and end a document. */
const BEGIN_NAMES = ['<｜begin▁of▁sentence｜>', '<|bos|>', '<|begin_of_text|>', '<s>', '<bos>']
const END_NAMES = ['<｜end▁of▁sentence｜>', '<|eos|>', '<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>']

export interface DocumentTokens {
  /** Id put before every document, or null for none. Default: the tokenizer's, by its usual names. */
  readonly bos?: number | null
  /** Id put after every document, or null for none. Default: the tokenizer's, by its usual names. */
  readonly eos?: number | null
}

interface DatasetParts {
  readonly tokens: Int32Array
  readonly starts: Int32Array
  readonly textBytes: number
  readonly vocabSize: number
  readonly padding: number
  readonly unpredictable: number
}

/**
 * Documents, tokenized and joined: `begin, text, end, begin, text, end, ...`. Where the tokenizer has no token that
 * begins a document, its end token serves for both, so that the first token of every text has something to be
 * predicted from.
 */
export class TokenDataset {
  /** The whole stream. */
  readonly tokens: Int32Array
  /** Position of the first token of each document, ascending. */
  readonly starts: Int32Array
  /** UTF-8 bytes of the texts. */
  readonly textBytes: number
  /** Every id is below this. */
  readonly vocabSize: number
  /** What rows are filled up with after the end of the stream. */
  readonly padding: number
  /** Text tokens that nothing precedes in their document (only where it has no begin token). */
  readonly unpredictable: number
  #digest: string | undefined

  private constructor(parts: DatasetParts) {
    this.tokens = parts.tokens
    this.starts = parts.starts
    this.textBytes = parts.textBytes
    this.vocabSize = parts.vocabSize
    this.padding = parts.padding
    this.unpredictable = parts.unpredictable
  }

  /**
   * Tokenizes documents. Text that spells a special token stays text.
   * @throws MoeError E_DATA when a document is no text, when there are no tokens, or ids outside the vocabulary
   */
  static fromTexts(documents: Iterable<string>, tokenizer: TextTokenizer, options: DocumentTokens = {}): TokenDataset {
    checkDocuments('TokenDataset', documents)
    if (typeof tokenizer?.encode !== 'function') throw noTokenizer(tokenizer)
    checkOptions('TokenDataset.fromTexts', options, { bos: true, eos: true })
    const named = (names: readonly string[]) => {
      for (const name of names) {
        const id = tokenizer.tokenToId?.(name)
        if (id !== undefined) return id
      }
      return null
    }
    const eos = options.eos === undefined ? named(END_NAMES) : options.eos
    const bos = options.bos === undefined ? (named(BEGIN_NAMES) ?? eos) : options.bos
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
      textBytes += Buffer.byteLength(text, 'utf8')
    }
    return TokenDataset.#checked(stream.take(), starts, textBytes, tokenizer.vocabSize, bos, eos)
  }

  /** Documents that are tokens already, begin and end tokens included. `textBytes` is needed for bits per byte. */
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
    // The first token of a document is taken to be its begin token.
    return TokenDataset.#checked(
      tokens,
      starts,
      options.textBytes ?? 0,
      options.vocabSize,
      tokens[0],
      options.padding ?? null,
    )
  }

  static #checked(
    tokens: Int32Array,
    starts: readonly number[],
    textBytes: number,
    vocabSize: number | undefined,
    bos: number | null,
    eos: number | null,
  ): TokenDataset {
    if (tokens.length < 2) {
      throw new MoeError({
        code: 'E_DATA',
        op: 'TokenDataset',
        problem: `the documents make ${tokens.length} tokens, and training needs at least 2`,
        fix: 'give it more text',
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
      textBytes,
      vocabSize: vocabSize ?? highest + 1,
      padding: eos ?? bos ?? 0,
      unpredictable: bos === null ? starts.length : 0,
    })
  }

  get documents(): number {
    return this.starts.length
  }

  /** Tokens that can be predicted: all but the first of each document. */
  get predictable(): number {
    return this.tokens.length - this.starts.length
  }

  /** Identity of the content, for checkpoints. */
  get digest(): string {
    if (this.#digest === undefined) {
      const bytes = (array: Int32Array) => new Uint8Array(array.buffer, array.byteOffset, array.byteLength)
      const hash = createHash('sha256').update(bytes(this.tokens)).update(bytes(this.starts))
      this.#digest = hash.digest('hex').slice(0, 16)
    }
    return this.#digest
  }

  /** Number of the document that holds the token at `position`. */
  documentAt(position: number): number {
    let low = 0
    let high = this.starts.length - 1
    while (low < high) {
      const middle = (low + high + 1) >> 1
      if (this.starts[middle] <= position) low = middle
      else high = middle - 1
    }
    return low
  }

  /**
   * Copies `length` tokens from `start` and their document numbers to the row at `at`; past the end of the stream
   * comes padding.
   */
  copyRow(start: number, length: number, tokens: Int32Array, documents: Int32Array, at: number): void {
    const present = Math.max(0, Math.min(length, this.tokens.length - start))
    tokens.set(this.tokens.subarray(start, start + present), at)
    let document = this.documentAt(start)
    for (let i = 0; i < present; i++) {
      while (document + 1 < this.starts.length && this.starts[document + 1] <= start + i) document++
      documents[at + i] = document
    }
    for (let i = present; i < length; i++) {
      tokens[at + i] = this.padding
      // Never equal to a neighbour's, so that no position here counts.
      documents[at + i] = present - i - 1
    }
  }
}

function noText(document: unknown): MoeError {
  return new MoeError({
    code: 'E_DATA',
    op: 'TokenDataset',
    problem: `a document is ${document === null ? 'null' : typeof document}, no text`,
    fix: 'pass texts, or tokens to TokenDataset.fromTokens',
  })
}

function noTokenizer(value: unknown): MoeError {
  return new MoeError({
    code: 'E_CONFIG',
    op: 'TokenDataset',
    problem: `the tokenizer is ${typeof value === 'object' && value !== null ? 'an object without encode' : value}`,
    fix: 'pass one that encodes: trainBpe(texts, options), await BpeTokenizer.fromFile(path)',
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

/** Tokens gathered without knowing how many will come. */
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
