/** @file Packs documents into sequences of equal length. */

import { TokenizerError } from '../errors.ts'
import { describe } from '../json/check.ts'
import { type CallRules, isId, validateCall } from '../validate-call.ts'

/** Options of `packDocuments`. */
export interface PackOptions {
  /** Number of tokens per sequence. */
  readonly length: number
  /** Id to add after each document. */
  readonly endOfText: number
}

const rules: CallRules<PackOptions> = {
  options: { length: true, endOfText: ['the id of a token', isId, true] },
  input: [
    'an iterable of documents',
    input => typeof input === 'object' && Symbol.iterator in Object(input),
    'pass a list of ids for each document: texts.map(text => tokenizer.encode(text))',
  ],
}

/** A packed sequence. */
export interface PackedSequence {
  /** `length` ids. */
  readonly ids: Uint32Array
  /** For each id, the index of its document, from 0. */
  readonly documents: Uint32Array
}

/**
 * Concatenates documents, each followed by `endOfText`, and splits the stream into sequences of `length` ids. A
 * document may continue in the next sequence; an incomplete last sequence is dropped. DeepSeek-V3 packs this way,
 * without masking attention across documents; use `documents` to mask it.
 * @throws TokenizerError E_CONFIG, and E_DATA for a document that is not a list of ids
 */
export function* packDocuments(
  documents: Iterable<ArrayLike<number>>,
  options: PackOptions,
): Generator<PackedSequence> {
  validateCall('packDocuments', rules, options, documents)
  const { length, endOfText } = options
  if (!Number.isInteger(length) || length < 1) {
    throw new TokenizerError({
      code: 'E_CONFIG',
      op: 'packDocuments',
      problem: `length ${length} is not a positive whole number`,
    })
  }
  let ids = new Uint32Array(length)
  let documentOf = new Uint32Array(length)
  let filled = 0
  let number = 0
  for (const document of documents) {
    if (typeof document?.length !== 'number') {
      const problem = `expected document ${number} to be a list of ids, got ${describe(document)}`
      throw new TokenizerError({ code: 'E_DATA', op: 'packDocuments', problem })
    }
    for (let at = 0; at <= document.length; at++) {
      const id = at < document.length ? document[at] : endOfText
      ids[filled] = id
      if (ids[filled] !== id) {
        const problem = `document ${number} has ${describe(id)} at ${at}, expected an id`
        throw new TokenizerError({ code: 'E_DATA', op: 'packDocuments', problem, fix: 'encode texts first' })
      }
      documentOf[filled++] = number
      if (filled < length) continue
      yield { ids, documents: documentOf }
      ids = new Uint32Array(length)
      documentOf = new Uint32Array(length)
      filled = 0
    }
    number++
  }
}
