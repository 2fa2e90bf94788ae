/** @file Packing documents into sequences of one length. */
import { checkCall } from '../check-call.ts'
import { TokenizerError } from '../errors.ts'
import { describe } from '../json/check.ts'

/** Length of the sequences, and what ends a document. */
export interface PackOptions {
  /** Tokens in each sequence. */
  readonly length: number
  /** Id put after each document. */
  readonly endOfText: number
}

/** One sequence. */
export interface PackedSequence {
  /** `length` ids. */
  readonly ids: Uint32Array
  /** Number of the document, from 0, that each id belongs to; where it changes a document begins. */
  readonly documents: Uint32Array
}

/**
 * Lays documents end to end, each followed by `endOfText`, and cuts the stream into sequences of `length` ids. A document may go on in the next sequence;
 * what does not fill a last sequence is left out. DeepSeek-V3 packs like this, without masking attention across documents; `documents` is there
 * for those who mask.
 * @throws TokenizerError E_CONFIG, and E_DATA for a document that is no list of ids
 */
export function* packDocuments(
  documents: Iterable<ArrayLike<number>>,
  options: PackOptions,
): Generator<PackedSequence> {
  checkCall('packDocuments', options, documents)
  const { length, endOfText } = options
  if (!Number.isInteger(length) || length < 1) {
    throw new TokenizerError({
      code: 'E_CONFIG',
      op: 'packDocuments',
      problem: `length ${length} is not a positive whole number`,
    })
  }
  let ids = new Uint32Array(length)
  let owner = new Uint32Array(length)
  let filled = 0
  let number = 0
  for (const document of documents) {
    if (typeof document?.length !== 'number') {
      const problem = `document ${number} is ${describe(document)}, no list of ids`
      throw new TokenizerError({ code: 'E_DATA', op: 'packDocuments', problem })
    }
    for (let at = 0; at <= document.length; at++) {
      const id = at < document.length ? document[at] : endOfText
      ids[filled] = id
      if (ids[filled] !== id) {
        const problem = `document ${number} has ${describe(id)} at ${at}, which is no id`
        throw new TokenizerError({ code: 'E_DATA', op: 'packDocuments', problem, fix: 'encode texts first' })
      }
      owner[filled++] = number
      if (filled < length) continue
      yield { ids, documents: owner }
      ids = new Uint32Array(length)
      owner = new Uint32Array(length)
      filled = 0
    }
    number++
  }
}
