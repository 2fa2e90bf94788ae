/** @file Reads rank files of tiktoken: tokens and ranks, from which merges are derived. */

import { MergeTable } from './bpe/merge-table.ts'
import { PieceMerger } from './bpe/piece-merger.ts'
import { bytesToAlphabet } from './byte-alphabet.ts'
import { TokenizerError } from './errors.ts'
import { describe } from './json/check.ts'
import { BpeModel, MAX_ID } from './model.ts'
import { toOniguruma } from './pattern/tiktoken-pattern.ts'
import { type PreTokenizerName, patternOf, preTokenizerJson } from './pre-tokenizers.ts'
import { validation } from './validation.ts'

/** Settings that a rank file does not contain. */
export interface TiktokenOptions {
  /**
   * Pre-tokenizer: the name of one, or a regular expression whose matches are pieces. A RegExp is read in Oniguruma
   * syntax, `pattern` in tiktoken's (its `pat_str`).
   */
  readonly preTokenizer: 'gpt2' | 'cl100k' | 'o200k' | RegExp | { readonly pattern: string }
  /** Ids of special tokens, by text. Default: none. */
  readonly specialTokens?: Readonly<Record<string, number>> | undefined
}

const NAMES = ['gpt2', 'cl100k', 'o200k']

function invalid(line: number, problem: string): TokenizerError {
  return new TokenizerError({
    code: 'E_FORMAT',
    op: `tiktoken ranks, line ${line}`,
    problem,
    fix: 'each line is a token in base64, a space and its rank',
  })
}

/** Parses the text of a `.tiktoken` file. */
function parseRanks(text: string): Map<number, Uint8Array> {
  const ranks = new Map<number, Uint8Array>()
  let line = 0
  for (const entry of text.split('\n')) {
    line++
    if (entry.trim() === '') continue
    const match = /^([A-Za-z0-9+/]*={0,2}) (\d{1,8})\r?$/.exec(entry)
    if (match === null) throw invalid(line, `is invalid: ${JSON.stringify(entry.slice(0, 40))}`)
    const rank = Number(match[2])
    if (rank >= MAX_ID) throw invalid(line, `rank ${rank} is not below ${MAX_ID}`)
    if (ranks.has(rank)) throw invalid(line, `duplicate rank ${rank}`)
    let decoded: string
    try {
      decoded = atob(match[1])
    } catch (cause) {
      throw new TokenizerError({
        code: 'E_FORMAT',
        op: `tiktoken ranks, line ${line}`,
        problem: 'is not base64',
        cause,
      })
    }
    ranks.set(
      rank,
      Uint8Array.from(decoded, char => char.charCodeAt(0)),
    )
  }
  return ranks
}

/**
 * Creates the model of a set of ranks. tiktoken merges adjacent parts whose concatenation is a token, lowest rank
 * first. What happens between two positions that are never merged across depends only on the bytes between them, so a
 * token always results from the same two parts: those that its bytes reduce to with all shorter tokens. These are its
 * merge. Tokens that reduce to more parts occur only as whole pieces, which tiktoken checks first (`ignore_merges`).
 */
function modelFromRanks(ranks: ReadonlyMap<number, Uint8Array>): BpeModel {
  const ids = [...ranks.keys()].sort((a, b) => a - b)
  const tokens: (string | undefined)[] = []
  const idOf = new Map<string, number>()
  const byteToken = new Int32Array(256).fill(-1)
  for (const id of ids) {
    const bytes = ranks.get(id)!
    const text = bytesToAlphabet(bytes)
    if (idOf.has(text)) {
      throw new TokenizerError({
        code: 'E_FORMAT',
        op: 'tiktoken ranks',
        problem: `ranks ${idOf.get(text)} and ${id} are the same token`,
      })
    }
    while (tokens.length < id) tokens.push(undefined)
    tokens.push(text)
    idOf.set(text, id)
    if (bytes.length === 1) byteToken[bytes[0]] = id
  }
  const missing = byteToken.indexOf(-1)
  if (missing >= 0) {
    throw new TokenizerError({
      code: 'E_FORMAT',
      op: 'tiktoken ranks',
      problem: `byte ${missing} has no token`,
      fix: 'the file is incomplete',
    })
  }
  const table = new MergeTable(ids.length, byteToken, tokens.length)
  const merger = new PieceMerger(table, byteToken, -1, false)
  const mergeOf: (readonly number[] | undefined)[] = ids.map(() => undefined)
  const lengthOf = (rank: number) => ranks.get(ids[rank])!.length
  for (const rank of [...ids.keys()].sort((a, b) => lengthOf(a) - lengthOf(b))) {
    const id = ids[rank]
    const bytes = ranks.get(id)!
    if (bytes.length < 2 || merger.merge(bytes, 0, bytes.length) !== 2) continue
    const [left, right] = merger.out
    table.add(rank, left, right, id)
    mergeOf[rank] = [left, right, id]
  }
  const merges = mergeOf.flatMap(merge => merge ?? [])
  return new BpeModel(tokens, idOf, Int32Array.from(merges), { unknown: -1, fuseUnknown: false, ignoreMerges: true })
}

/**
 * Returns the components of a tokenizer: the model, and `added_tokens` and `pre_tokenizer` as in tokenizer.json.
 * @param patternsOf returns the patterns of a named pre-tokenizer
 */
export function readTiktoken(
  ranks: string | Uint8Array | ReadonlyMap<number, Uint8Array>,
  options: TiktokenOptions,
  patternsOf: (name: PreTokenizerName) => readonly string[],
) {
  validation.check?.('fromTiktoken', options, ranks)
  const text = ranks instanceof Uint8Array ? new TextDecoder().decode(ranks) : ranks
  const model = modelFromRanks(typeof text === 'string' ? parseRanks(text) : text)
  const choice = options.preTokenizer
  if (typeof choice === 'string' && !NAMES.includes(choice)) {
    throw new TokenizerError({
      code: 'E_CONFIG',
      op: 'fromTiktoken',
      problem: `unknown preTokenizer ${describe(choice)}`,
      fix: `use one of ${NAMES.join(', ')}, a RegExp or { pattern: text }`,
    })
  }
  return {
    model,
    added: Object.entries(options.specialTokens ?? {}).map(([content, id]) => ({ id, content, special: true })),
    // tiktoken's own pattern for cl100k differs from the one in tokenizer.json files.
    preTokenizer: preTokenizerJson(
      typeof choice === 'string'
        ? patternsOf(choice === 'cl100k' ? 'cl100k-tiktoken' : choice)
        : [choice instanceof RegExp ? patternOf(choice) : toOniguruma(choice.pattern)],
    ),
  }
}

export const features = { tiktoken: readTiktoken }
