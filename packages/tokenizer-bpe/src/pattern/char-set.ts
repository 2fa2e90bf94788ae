/** @file Sets of code points: as sorted ranges for set operations, and as a bitmap for matching. */
import { TokenizerError } from '../errors.ts'
import * as unicode from '../unicode/classes.ts'

/** First and last code point of each range, in ascending order; ranges neither overlap nor touch. */
export type Ranges = readonly number[]

const LAST = unicode.CODE_POINTS - 1

/** Sorts and merges ranges. */
export function normalize(ranges: Ranges): Ranges {
  const pairs: [number, number][] = []
  for (let i = 0; i < ranges.length; i += 2) pairs.push([ranges[i], ranges[i + 1]])
  pairs.sort((a, b) => a[0] - b[0])
  const out: number[] = []
  for (const [first, last] of pairs) {
    if (out.length > 0 && first <= out[out.length - 1] + 1) out[out.length - 1] = Math.max(out[out.length - 1], last)
    else out.push(first, last)
  }
  return out
}

export function negate(ranges: Ranges): Ranges {
  const out: number[] = []
  let next = 0
  for (let i = 0; i < ranges.length; i += 2) {
    if (ranges[i] > next) out.push(next, ranges[i] - 1)
    next = ranges[i + 1] + 1
  }
  if (next <= LAST) out.push(next, LAST)
  return out
}

export function intersect(a: Ranges, b: Ranges): Ranges {
  return negate(normalize([...negate(a), ...negate(b)]))
}

/** Returns the code points that pass a test. */
export function collect(test: (code: number) => boolean): Ranges {
  const out: number[] = []
  let first = -1
  for (let code = 0; code <= LAST + 1; code++) {
    const holds = code <= LAST && test(code)
    if (holds && first < 0) first = code
    else if (!holds && first >= 0) {
      out.push(first, code - 1)
      first = -1
    }
  }
  return out
}

const byClass = (...kinds: number[]) => collect(code => kinds.includes(unicode.classOf[code]))
const { UPPER, TITLE, LOWER, MODIFIER, LETTER } = unicode

const PINNED: Record<string, () => Ranges> = {
  l: () => byClass(UPPER, TITLE, LOWER, MODIFIER, LETTER),
  lu: () => byClass(UPPER),
  lt: () => byClass(TITLE),
  ll: () => byClass(LOWER),
  lm: () => byClass(MODIFIER),
  lo: () => byClass(LETTER),
  m: () => byClass(unicode.MARK),
  n: () => byClass(unicode.NUMBER),
  p: () => byClass(unicode.PUNCTUATION),
  s: () => byClass(unicode.SYMBOL),
  letter: () => property('l'),
  mark: () => property('m'),
  number: () => property('n'),
  punctuation: () => property('p'),
  symbol: () => property('s'),
  lc: () => byClass(UPPER, TITLE, LOWER),
  'l&': () => property('lc'),
  any: () => [0, LAST],
  space: () => byClass(unicode.SPACE, unicode.NEWLINE),
  alpha: () => property('alphabetic'),
  digit: () => property('nd'),
  upper: () => property('uppercase'),
  lower: () => property('lowercase'),
  alnum: () => normalize([...property('alphabetic'), ...property('nd')]),
  punct: () => property('p'),
  cntrl: () => property('cc'),
  xdigit: () => HEX,
  // Oniguruma's `\w` outside of brackets also matches the fractions and superscripts of Latin-1.
  word: () => normalize([...property('inner_word'), 0xb2, 0xb3, 0xb9, 0xb9, 0xbc, 0xbe]),
  inner_word: () => normalize([...property('alnum'), ...property('m'), ...property('pc')]),
  inner_punct: () => normalize([...property('p'), ...property('s')]),
}

export const HEX: Ranges = [0x30, 0x39, 0x41, 0x46, 0x61, 0x66]

const cache = new Map<string, Ranges>()

/**
 * Returns the set of `\p{name}`. The general categories that pre-tokenizers use are those of Unicode 16.0; other
 * properties (scripts, `Nd`, binary properties) are those of the runtime.
 * @throws TokenizerError E_PATTERN for an unknown property
 */
export function property(name: string): Ranges {
  const key = name.toLowerCase().replace(/[ -]/g, '_')
  let ranges = cache.get(key)
  if (ranges === undefined) {
    ranges = Object.hasOwn(PINNED, key) ? PINNED[key]() : fromRuntime(key, name)
    cache.set(key, ranges)
  }
  return ranges
}

function fromRuntime(key: string, name: string): Ranges {
  const capital = key.replace(/(^|_)[a-z]/g, letter => letter.toUpperCase())
  for (const value of [capital, `Script=${capital}`, capital.replace(/^In_/, 'Script=')]) {
    let test: RegExp
    try {
      test = new RegExp(`\\p{${value}}`, 'u')
    } catch {
      continue
    }
    return collect(code => test.test(String.fromCodePoint(code)))
  }
  throw new TokenizerError({ code: 'E_PATTERN', op: 'pattern', problem: `unknown property \\p{${name}}` })
}

/** A set with a fast test: a table for the first 65,536 code points, binary search beyond. */
export class CharSet {
  readonly #low = new Uint8Array(0x10000)
  readonly #high: Ranges

  constructor(ranges: Ranges) {
    const high: number[] = []
    for (let i = 0; i < ranges.length; i += 2) {
      const [first, last] = [ranges[i], ranges[i + 1]]
      if (first < 0x10000) this.#low.fill(1, first, Math.min(last, 0xffff) + 1)
      if (last >= 0x10000) high.push(Math.max(first, 0x10000), last)
    }
    this.#high = high
  }

  has(code: number): boolean {
    if (code < 0x10000) return this.#low[code] === 1
    const high = this.#high
    let low = 0
    let top = high.length >> 1
    while (low < top) {
      const middle = (low + top) >> 1
      if (high[middle * 2 + 1] < code) low = middle + 1
      else top = middle
    }
    return low * 2 < high.length && high[low * 2] <= code
  }
}

let foldings: Map<string, number[]> | undefined

/** Returns the same key for characters that only differ in case, for example `ß` and `ẞ`. `ı` does not match `I`. */
const foldKey = (code: number) =>
  code === 0x131 ? 'ı' : String.fromCodePoint(code).toUpperCase().toLowerCase().toUpperCase()

/** Adds the characters that match if case is ignored. Uses simple folding: a character matches single characters. */
export function foldCase(ranges: Ranges): Ranges {
  if (foldings === undefined) {
    foldings = new Map()
    for (let code = 0; code < 0x1f000; code++) {
      if (code === 0x3400) code = 0xa000
      if (code === 0xac00) code = 0xe000
      const key = foldKey(code)
      const group = foldings.get(key)
      if (group) group.push(code)
      else foldings.set(key, [code])
    }
  }
  const out = [...ranges]
  for (let i = 0; i < ranges.length; i += 2) {
    for (let code = ranges[i]; code <= ranges[i + 1] && code < 0x1f000; code++) {
      for (const other of foldings.get(foldKey(code)) ?? []) if (other !== code) out.push(other, other)
    }
  }
  return normalize(out)
}
