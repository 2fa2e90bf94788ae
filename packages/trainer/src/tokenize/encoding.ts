/** @file Encodes texts into documents of ids, with held-out selection and fill-in-the-middle. */
import { MoeError } from '@moe/core'
import type { TextTokenizer } from '../model.ts'
import { type DrawOptions, drawFor } from './document-draw.ts'

/** Special tokens of fill-in-the-middle documents: `begin prefix hole suffix end middle`. */
export interface FimTokens {
  /** Before the prefix. */
  readonly begin: string
  /** Between prefix and suffix, where the middle was. */
  readonly hole: string
  /** Between suffix and middle. */
  readonly end: string
}

/** The tokens of DeepSeek-V3's tokenizer. */
const deepSeekFim: FimTokens = { begin: '<｜fim▁begin｜>', hole: '<｜fim▁hole｜>', end: '<｜fim▁end｜>' }

export interface EncodingOptions extends DrawOptions {
  readonly bos: number | null
  readonly eos: number | null
  readonly threads: number
  readonly fimTokens: FimTokens | undefined
}

/** Encoded documents of the training or the held-out part. */
export interface EncodedPart {
  readonly documents: Int32Array[]
  textBytes: number
}

export interface Encoded {
  readonly training: EncodedPart
  readonly validation: EncodedPart
}

/** Text that spells a special token is encoded as ordinary text. */
const asText = { addSpecialTokens: false, parseSpecialTokens: false }

export class TextEncoding {
  readonly #tokenizer: TextTokenizer
  readonly #options: EncodingOptions
  readonly #vocabSize: number
  /** Ids of the fill-in-the-middle tokens. */
  readonly #fim: readonly number[]

  /** @throws MoeError E_CONFIG if the tokenizer lacks the tokens that are needed */
  constructor(tokenizer: TextTokenizer, options: EncodingOptions) {
    this.#tokenizer = tokenizer
    this.#options = options
    this.#vocabSize = tokenizer.vocabSize as number
    const { begin, hole, end } = options.fimTokens ?? deepSeekFim
    this.#fim = options.fimRate === 0 ? [] : [begin, hole, end].map(token => idOf(tokenizer, token))
    for (const id of [options.bos, options.eos, ...this.#fim]) if (id !== null) this.#check(id)
  }

  /** Encodes texts, in order. Texts without tokens are left out. */
  async encode(texts: readonly string[]): Promise<Encoded> {
    const draws = texts.map(text => drawFor(text, this.#options))
    const pieces = await this.#encodeAll(texts.flatMap((text, i) => draws[i].cuts ?? [text]))
    const encoded: Encoded = {
      training: { documents: [], textBytes: 0 },
      validation: { documents: [], textBytes: 0 },
    }
    let piece = 0
    texts.forEach((text, i) => {
      const { heldOut, cuts } = draws[i]
      const own = pieces.slice(piece, piece + (cuts ?? [text]).length)
      piece += own.length
      if (own.every(({ length }) => length === 0)) return
      const part = encoded[heldOut ? 'validation' : 'training']
      part.documents.push(this.#document(own))
      part.textBytes += Buffer.byteLength(text)
    })
    return encoded
  }

  async #encodeAll(texts: readonly string[]): Promise<readonly ArrayLike<number>[]> {
    const { threads } = this.#options
    if (this.#tokenizer.encodeBatch !== undefined) return this.#tokenizer.encodeBatch(texts, { ...asText, threads })
    return texts.map(text => this.#tokenizer.encode(text, asText))
  }

  /** Assembles a document from its parts and special tokens. */
  #document(pieces: readonly ArrayLike<number>[]): Int32Array {
    const { bos, eos } = this.#options
    const fim = pieces.length > 1 ? this.#fim : []
    const length =
      pieces.reduce((sum, { length }) => sum + length, fim.length) + Number(bos !== null) + Number(eos !== null)
    const document = new Int32Array(length)
    let at = 0
    if (bos !== null) document[at++] = bos
    pieces.forEach((ids, i) => {
      if (fim.length > 0) document[at++] = fim[i]
      for (let j = 0; j < ids.length; j++) this.#check(ids[j])
      document.set(ids, at)
      at += ids.length
    })
    if (eos !== null) document[at] = eos
    return document
  }

  #check(id: number): void {
    if (id >= 0 && id < this.#vocabSize) return
    throw new MoeError({
      code: 'E_DATA',
      op: 'tokenize',
      problem: `the tokenizer returned id ${id}, outside its vocabulary of ${this.#vocabSize} ids`,
      fix: 'use a tokenizer whose vocabSize counts all of its ids',
    })
  }
}

function idOf(tokenizer: TextTokenizer, token: string): number {
  const id = tokenizer.tokenToId?.(token)
  if (id !== undefined) return id
  throw new MoeError({
    code: 'E_CONFIG',
    op: 'tokenize',
    problem: `the tokenizer has no token ${token}, which fill-in-the-middle needs`,
    fix: 'train it with these special tokens, or pass its own as fimTokens: { begin, hole, end }',
  })
}
