/** @file A byte-level BPE model: tokens, their bytes, and merges. */
import { alphabetToBytes, charOfByte } from './byte-alphabet.ts'
import { TokenizerError } from './errors.ts'

/** Maximum id plus one: tables are indexed by id. */
export const MAX_ID = 1 << 22

export interface ModelOptions {
  /** Id for bytes without a token, or -1 to drop them. */
  readonly unknown: number
  /** Whether consecutive bytes without a token become one unknown token. */
  readonly fuseUnknown: boolean
  /** Whether a piece that is a token is encoded as that token without merging. */
  readonly ignoreMerges: boolean
}

export class BpeModel {
  /** Tokens in the byte alphabet, by id; undefined for unused ids. */
  readonly tokens: readonly (string | undefined)[]
  readonly idOf: ReadonlyMap<string, number>
  /** Left id, right id and resulting id of each merge, in order of rank. */
  readonly merges: Int32Array
  readonly options: ModelOptions
  /** Token of each byte, or -1. */
  readonly byteToken: Int32Array
  /** Bytes of all tokens, concatenated; token i is `bytes[starts[i]..starts[i] + lengths[i])`. */
  readonly bytes: Uint8Array
  readonly starts: Int32Array
  readonly lengths: Int32Array
  /** The same lengths, but 0 for tokens outside of the byte alphabet, which no piece can equal. */
  readonly pieceLengths: Int32Array

  constructor(
    tokens: readonly (string | undefined)[],
    idOf: ReadonlyMap<string, number>,
    merges: Int32Array,
    options: ModelOptions,
  ) {
    this.tokens = tokens
    this.idOf = idOf
    this.merges = merges
    this.options = options
    this.byteToken = Int32Array.from(
      { length: 256 },
      (_, byte) => idOf.get(String.fromCharCode(charOfByte[byte])) ?? -1,
    )
    let total = 0
    for (const token of tokens) if (token !== undefined) total += token.length * 3
    const arena = new Uint8Array(total)
    this.starts = new Int32Array(tokens.length)
    this.lengths = new Int32Array(tokens.length)
    this.pieceLengths = new Int32Array(tokens.length)
    let at = 0
    for (let id = 0; id < tokens.length; id++) {
      const token = tokens[id]
      this.starts[id] = at
      if (token === undefined) continue
      let width = alphabetToBytes(token, arena, at)
      if (width > 0) this.pieceLengths[id] = width
      // A token outside the byte alphabet represents its own text, as in the ByteLevel decoder.
      if (width < 0) width = new TextEncoder().encodeInto(token, arena.subarray(at)).written
      this.lengths[id] = width
      at += width
    }
    this.bytes = arena.slice(0, at)
  }

  /** Returns the bytes of a token; empty for an unused id. */
  bytesOf(id: number): Uint8Array {
    return this.bytes.subarray(this.starts[id], this.starts[id] + this.lengths[id])
  }
}

/** Creates a model from a list of tokens. Each merge is left id, right id and resulting id. */
export function modelFromTokens(tokens: readonly string[], merges: Int32Array): BpeModel {
  const idOf = new Map<string, number>()
  for (let id = 0; id < tokens.length; id++) idOf.set(tokens[id], id)
  if (idOf.size !== tokens.length) {
    throw new TokenizerError({ code: 'E_FORMAT', op: 'vocabulary', problem: 'two tokens have the same text' })
  }
  return new BpeModel(tokens, idOf, merges, { unknown: -1, fuseUnknown: false, ignoreMerges: false })
}
