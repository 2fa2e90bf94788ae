/**
 * @file Pre-tokenizers that no hand-written scanner covers, interpreted step by step: Split with any pattern and
 * behaviour, Digits, Whitespace, WhitespaceSplit, Punctuation, Metaspace, ByteLevel. Each step refines a list of
 * pieces; some drop or rewrite text.
 */
import { PADDING } from '../bpe/encoder.ts'
import { Pattern } from '../pattern/pattern.ts'
import type { PreTokenizer } from '../pre-tokenizer.ts'
import { scanGpt2 } from '../scan/gpt2.ts'
import { classOf, isSpace, NUMBER, PUNCTUATION } from '../unicode/classes.ts'
import { codePointAt, widthOf } from '../unicode/utf8.ts'
import { asArray, asFlag, asObject, asString, describe, invalid, type JsonObject, unsupported } from './check.ts'

/** Pieces of a text: piece i is `bytes[spans[2i]..spans[2i+1])`. */
export interface Pieces {
  bytes: Uint8Array
  spans: number[]
  /** Index of each byte in the original text, if the bytes were rewritten. */
  origin: Int32Array | undefined
  /** Whether the text is the start of the input, without an added token before it. */
  readonly first: boolean
}

/** Splits or rewrites the pieces. */
export type Step = (pieces: Pieces) => void

const BEHAVIORS = ['Removed', 'Isolated', 'MergedWithPrevious', 'MergedWithNext', 'Contiguous'] as const
type Behavior = (typeof BEHAVIORS)[number]

/** Returns start and end of each match within `bytes[start..end)`. */
type Matcher = (bytes: Uint8Array, start: number, end: number) => number[]

/**
 * Returns the steps of a `pre_tokenizer` of tokenizer.json.
 * @throws TokenizerError E_UNSUPPORTED, naming the step, and for vocabularies that are not byte-level
 */
export function readSteps(json: unknown): Step[] {
  const steps: Step[] = []
  let byteLevel = false
  const walk = (value: unknown, where: string): void => {
    const step = asObject(value, where)
    if (step.type === 'Sequence') {
      asArray(step.pretokenizers, `${where}.pretokenizers`).forEach((inner, i) => {
        walk(inner, `${where}.pretokenizers[${i}]`)
      })
      return
    }
    if (byteLevel) throw unsupported(where, `${describe(step.type)} after ByteLevel`)
    if (step.type === 'ByteLevel') byteLevel = true
    steps.push(...readStep(step, where))
  }
  if (json === undefined || json === null)
    throw unsupported('pre_tokenizer', 'none', 'only byte-level vocabularies can be read')
  walk(json, 'pre_tokenizer')
  if (!byteLevel)
    throw unsupported('pre_tokenizer', 'a vocabulary without ByteLevel', 'only byte-level vocabularies can be read')
  return steps
}

function readStep(step: JsonObject, where: string): Step[] {
  switch (step.type) {
    case 'Split': {
      const pattern = asObject(step.pattern, `${where}.pattern`)
      const matcher =
        pattern.Regex === undefined
          ? literalMatcher(asString(pattern.String, `${where}.pattern.String`))
          : patternMatcher(asString(pattern.Regex, `${where}.pattern.Regex`))
      return [splitBy(matcher, readBehavior(step.behavior, where), asFlag(step.invert, `${where}.invert`, false))]
    }
    case 'Digits': {
      const single = asFlag(step.individual_digits, `${where}.individual_digits`, false)
      return [
        splitBy(
          classMatcher(code => classOf[code] === NUMBER),
          single ? 'Isolated' : 'Contiguous',
          false,
        ),
      ]
    }
    case 'Punctuation': {
      const behavior = step.behavior === undefined ? 'Isolated' : readBehavior(step.behavior, where)
      return [splitBy(classMatcher(isPunctuation), behavior, false)]
    }
    case 'Whitespace':
      // The word characters of Rust's regex crate include joiners.
      return [splitBy(patternMatcher('[\\w\\u200c\\u200d]+|[^\\w\\u200c\\u200d\\s]+'), 'Removed', true)]
    case 'WhitespaceSplit':
      return [splitBy(classMatcher(isSpace), 'Removed', false)]
    case 'Metaspace': {
      const replacement = asString(step.replacement ?? '▁', `${where}.replacement`)
      const scheme = step.prepend_scheme ?? (asFlag(step.add_prefix_space, where, true) ? 'always' : 'never')
      if (scheme !== 'always' && scheme !== 'first' && scheme !== 'never')
        throw invalid(`${where}.prepend_scheme`, describe(scheme))
      const mark = new TextEncoder().encode(replacement)
      const steps = [replaceSpaces(mark, scheme)]
      if (asFlag(step.split, `${where}.split`, true))
        steps.push(splitBy(literalMatcher(replacement), 'MergedWithNext', false))
      return steps
    }
    case 'ByteLevel': {
      const steps: Step[] = []
      if (asFlag(step.add_prefix_space, `${where}.add_prefix_space`, true)) steps.push(prefixSpace)
      if (asFlag(step.use_regex, `${where}.use_regex`, true)) steps.push(splitGpt2)
      return steps
    }
    default:
      throw unsupported(`${where}.type`, describe(step.type))
  }
}

function readBehavior(value: unknown, where: string): Behavior {
  const name = asString(value, `${where}.behavior`).toLowerCase().replaceAll('_', '')
  const behavior = BEHAVIORS.find(item => item.toLowerCase() === name)
  if (behavior === undefined) throw invalid(`${where}.behavior`, `${describe(value)} is not a behaviour`)
  return behavior
}

/** Runs the steps and concatenates the resulting pieces. */
export function runSteps(steps: readonly Step[], bytes: Uint8Array, start: number, end: number, first: boolean) {
  const pieces: Pieces = { bytes, spans: start < end ? [start, end] : [], origin: undefined, first }
  for (const step of steps) step(pieces)
  let length = 0
  for (let i = 0; i < pieces.spans.length; i += 2) length += pieces.spans[i + 1] - pieces.spans[i]
  const out = new Uint8Array(length + PADDING)
  const ends = new Int32Array(pieces.spans.length >> 1)
  const origin = new Int32Array(length)
  let at = 0
  for (let i = 0; i < pieces.spans.length; i += 2) {
    const [from, to] = [pieces.spans[i], pieces.spans[i + 1]]
    out.set(pieces.bytes.subarray(from, to), at)
    for (let b = from; b < to; b++) origin[at + b - from] = pieces.origin ? pieces.origin[b] : b
    at += to - from
    ends[i >> 1] = at
  }
  return { bytes: out, length, ends, origin }
}

function splitBy(matcher: Matcher, behavior: Behavior, invert: boolean): Step {
  return pieces => {
    const out: number[] = []
    for (let i = 0; i < pieces.spans.length; i += 2) {
      const start = pieces.spans[i]
      const end = pieces.spans[i + 1]
      const matches = matcher(pieces.bytes, start, end)
      // Matches and the text between them, in order: start, end, and 1 for a match.
      const parts: number[] = []
      let done = start
      for (let m = 0; m < matches.length; m += 2) {
        if (matches[m] > done) parts.push(done, matches[m], invert ? 1 : 0)
        parts.push(matches[m], matches[m + 1], invert ? 0 : 1)
        done = matches[m + 1]
      }
      if (done < end) parts.push(done, end, invert ? 1 : 0)
      combine(parts, behavior, out)
    }
    pieces.spans = out
  }
}

/** Applies a behaviour. Empty parts take part in merging, but are omitted from the result. */
function combine(parts: readonly number[], behavior: Behavior, out: number[]): void {
  const spans: number[] = []
  let wasMatch = 0
  if (behavior === 'MergedWithNext') {
    // From right to left: a match is joined with the part after it.
    for (let i = parts.length - 3; i >= 0; i -= 3) {
      if (parts[i + 2] && !wasMatch && spans.length > 0) spans[spans.length - 2] = parts[i]
      else spans.push(parts[i], parts[i + 1])
      wasMatch = parts[i + 2]
    }
    for (let i = spans.length - 2; i >= 0; i -= 2) if (spans[i] < spans[i + 1]) out.push(spans[i], spans[i + 1])
    return
  }
  for (let i = 0; i < parts.length; i += 3) {
    const isMatch = parts[i + 2]
    const joins =
      behavior === 'MergedWithPrevious' ? isMatch && !wasMatch : behavior === 'Contiguous' && isMatch === wasMatch
    if (joins && spans.length > 0) spans[spans.length - 1] = parts[i + 1]
    else if (!isMatch || behavior !== 'Removed') spans.push(parts[i], parts[i + 1])
    wasMatch = isMatch
  }
  for (let i = 0; i < spans.length; i += 2) if (spans[i] < spans[i + 1]) out.push(spans[i], spans[i + 1])
}

function patternMatcher(source: string): Matcher {
  const pattern = new Pattern(source)
  return (bytes, start, end) => pattern.matches(bytes, start, end)
}

function literalMatcher(text: string): Matcher {
  const literal = new TextEncoder().encode(text)
  return (bytes, start, end) => {
    const found: number[] = []
    if (literal.length === 0) return found
    for (let at = start; at + literal.length <= end; ) {
      let same = 0
      while (same < literal.length && bytes[at + same] === literal[same]) same++
      if (same === literal.length) {
        found.push(at, at + same)
        at += same
      } else at++
    }
    return found
  }
}

function classMatcher(test: (code: number) => boolean): Matcher {
  return (bytes, start, end) => {
    const found: number[] = []
    for (let at = start; at < end; ) {
      const next = at + widthOf(bytes[at])
      if (test(codePointAt(bytes, at))) found.push(at, next)
      at = next
    }
    return found
  }
}

function isPunctuation(code: number): boolean {
  return classOf[code] === PUNCTUATION || '$+<=>^`|~'.includes(String.fromCodePoint(code))
}

/** Copies all pieces to new bytes with a function that writes one piece. */
function rewrite(
  pieces: Pieces,
  write: (start: number, end: number, put: (byte: number, from: number) => void) => void,
): void {
  let bytes = new Uint8Array(pieces.bytes.length + 64)
  let origin = new Int32Array(bytes.length)
  let at = 0
  const put = (byte: number, from: number) => {
    if (at === bytes.length) {
      const more = new Uint8Array(at * 2)
      more.set(bytes)
      bytes = more
      const moreOrigin = new Int32Array(at * 2)
      moreOrigin.set(origin)
      origin = moreOrigin
    }
    bytes[at] = byte
    origin[at++] = pieces.origin ? pieces.origin[from] : from
  }
  const spans: number[] = []
  for (let i = 0; i < pieces.spans.length; i += 2) {
    const start = at
    write(pieces.spans[i], pieces.spans[i + 1], put)
    spans.push(start, at)
  }
  pieces.bytes = bytes
  pieces.origin = origin
  pieces.spans = spans
}

function prefixSpace(pieces: Pieces): void {
  const old = pieces.bytes
  rewrite(pieces, (start, end, put) => {
    if (old[start] !== 0x20) put(0x20, start)
    for (let i = start; i < end; i++) put(old[i], i)
  })
}

function replaceSpaces(mark: Uint8Array, scheme: 'always' | 'first' | 'never'): Step {
  return pieces => {
    const { bytes: old, origin } = pieces
    const isMark = (at: number) => mark.every((byte, i) => old[at + i] === byte)
    rewrite(pieces, (start, end, put) => {
      const first = pieces.first && (origin ? origin[start] : start) === 0
      if ((first ? scheme !== 'never' : scheme === 'always') && old[start] !== 0x20 && !isMark(start))
        for (const byte of mark) put(byte, start)
      for (let i = start; i < end; i++) {
        if (old[i] === 0x20) for (const byte of mark) put(byte, i)
        else put(old[i], i)
      }
    })
  }
}

function splitGpt2(pieces: Pieces): void {
  const out: number[] = []
  const ends = new Int32Array(1024)
  for (let i = 0; i < pieces.spans.length; i += 2) {
    let pos = pieces.spans[i]
    while (pos < pieces.spans[i + 1]) {
      const count = scanGpt2(pieces.bytes, pos, pieces.spans[i + 1], ends)
      for (let e = 0; e < count; e++) {
        out.push(pos, ends[e])
        pos = ends[e]
      }
    }
  }
  pieces.spans = out
}

/** Creates a pre-tokenizer that runs the steps in `prepare`; its scanner returns the resulting pieces. */
function compileSteps(json: unknown): PreTokenizer {
  const steps = readSteps(json)
  let prepared = new Int32Array(0)
  let next = 0
  return {
    name: 'steps',
    prepare: (bytes, start, end, first) => {
      const text = runSteps(steps, bytes, start, end, first)
      prepared = text.ends
      next = 0
      return text
    },
    scanner: (_bytes, _pos, _end, ends) => {
      const count = Math.min(ends.length, prepared.length - next)
      for (let i = 0; i < count; i++) ends[i] = prepared[next + i]
      next += count
      return count
    },
  }
}

export const features = { steps: compileSteps }
