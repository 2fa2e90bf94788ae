/**
 * @file Converts `pattern` of JSON Schema to an automaton: ECMA-262 regular expressions with the flag u that may match anywhere in a text. Unsupported syntax, such as
 * lookaround and backreferences, is rejected by name.
 */
import { ASCII, type Automaton, automatonOf, type Effort, type Expression, PatternError } from './automaton.ts'

/** Inclusive ranges of code points. */
type CharacterSet = ReadonlyArray<readonly [number, number]>

type Node =
  | Extract<Expression, { readonly kind: 'set' }>
  | { readonly kind: 'all'; readonly of: readonly Node[] }
  | { readonly kind: 'either'; readonly of: readonly Node[] }
  | { readonly kind: 'repeat'; readonly of: Node; readonly least: number; readonly most: number }
  | { readonly kind: 'anchor'; readonly at: '^' | '$' }

const LAST = 0x10ffff
const EVERYTHING: CharacterSet = [[0, LAST]]
const LINE_ENDS: CharacterSet = [
  [0x0a, 0x0a],
  [0x0d, 0x0d],
  [0x2028, 0x2029],
]
const DIGITS: CharacterSet = [[0x30, 0x39]]
const WORDS: CharacterSet = [
  [0x30, 0x39],
  [0x41, 0x5a],
  [0x5f, 0x5f],
  [0x61, 0x7a],
]
const SPACES: CharacterSet = [
  [0x09, 0x0d],
  [0x20, 0x20],
  [0xa0, 0xa0],
  [0x1680, 0x1680],
  [0x2000, 0x200a],
  [0x2028, 0x2029],
  [0x202f, 0x202f],
  [0x205f, 0x205f],
  [0x3000, 0x3000],
  [0xfeff, 0xfeff],
]

/**
 * Returns an automaton that accepts the texts in which a pattern matches.
 * @throws PatternError if the pattern is invalid or not supported
 */
export function patternAutomaton(source: string, effort: Effort): Automaton {
  return automatonOf({ kind: 'either', of: new Parser(source).alternatives().map(anchored) }, effort)
}

const anything: Expression = { kind: 'repeat', of: character(EVERYTHING), least: 0, most: Infinity }

/** An alternative, surrounded by arbitrary text on each side without an anchor. */
function anchored(parts: readonly Node[]): Expression {
  // Unwrap a group that is the whole alternative.
  if (parts.length === 1 && parts[0].kind === 'all') return anchored(parts[0].of)
  const isAnchor = (part: Node | undefined, at: string) => part?.kind === 'anchor' && part.at === at
  let [from, to] = [0, parts.length]
  while (isAnchor(parts[from], '^')) from++
  while (to > from && isAnchor(parts[to - 1], '$')) to--
  const of = parts.slice(from, to).map(withoutAnchors)
  return { kind: 'all', of: [...(from > 0 ? [] : [anything]), ...of, ...(to < parts.length ? [] : [anything])] }
}

function withoutAnchors(node: Node): Expression {
  if (node.kind === 'anchor') throw new PatternError('^ and $ are supported only at the ends of alternatives')
  if (node.kind === 'set') return node
  if (node.kind === 'repeat') return { ...node, of: withoutAnchors(node.of) }
  return { ...node, of: node.of.map(withoutAnchors) }
}

/** A character of a set, which must contain all or none of the non-ASCII characters. Non-ASCII white space may be missing. */
function character(set: CharacterSet): Expression & { readonly kind: 'set' } {
  const holds = (point: number) => set.some(([from, to]) => point >= from && point <= to)
  const beyond = complement([...complement(set), [0, 0x7f], [0xd800, 0xdfff]])
  const missing = complement([...set, [0, 0x7f], [0xd800, 0xdfff], ...SPACES])
  // A set whose only non-ASCII characters are white space, such as \s, is treated as ASCII only.
  const isNone = complement([...complement(beyond), ...SPACES]).length === 0
  if (!isNone && missing.length > 0)
    throw new PatternError('a set must contain all or none of the non-ASCII characters')
  return { kind: 'set', has: [...ASCII.map(holds), !isNone] }
}

/** Expressions of ASCII characters, shared by all their occurrences. */
const literals = new Map<string, ReturnType<typeof character>>()

function literal(one: string) {
  const known = literals.get(one)
  if (known) return known
  const expression = character(single(one))
  if (one < '\x80') literals.set(one, expression)
  return expression
}

function complement(set: CharacterSet): CharacterSet {
  const sorted = [...set].sort(([a], [b]) => a - b)
  const rest: Array<readonly [number, number]> = []
  let next = 0
  for (const [from, to] of sorted) {
    if (from > next) rest.push([next, from - 1])
    next = Math.max(next, to + 1)
  }
  return next <= LAST ? [...rest, [next, LAST]] : rest
}

const letters: Readonly<Record<string, CharacterSet>> = {
  d: DIGITS,
  D: complement(DIGITS),
  w: WORDS,
  W: complement(WORDS),
  s: SPACES,
  S: complement(SPACES),
}

const controls: Readonly<Record<string, number>> = { t: 0x09, n: 0x0a, v: 0x0b, f: 0x0c, r: 0x0d, '0': 0 }

class Parser {
  readonly #source: readonly string[]
  #at = 0
  #depth = 0

  /** @throws PatternError if the pattern is not valid, so that parentheses and brackets need no further checks */
  constructor(source: string) {
    try {
      new RegExp(source, 'u')
    } catch {
      // Without the flag u, more escapes are valid, and have the same meaning here.
      try {
        new RegExp(source)
      } catch (cause) {
        throw new PatternError((cause as Error).message)
      }
    }
    this.#source = [...source]
  }

  /** Parses alternatives, up to the end of the pattern or group. */
  alternatives(): Node[][] {
    const all = [this.#sequence()]
    while (this.#take('|')) all.push(this.#sequence())
    return all
  }

  #sequence(): Node[] {
    const parts: Node[] = []
    while (this.#at < this.#source.length && !this.#sees('|') && !this.#sees(')')) {
      const one = this.#atom()
      parts.push(one.kind === 'anchor' ? one : this.#repeated(one))
    }
    return parts
  }

  #sees(character: string): boolean {
    return this.#source[this.#at] === character
  }

  #take(character: string): boolean {
    const sees = this.#sees(character)
    if (sees) this.#at++
    return sees
  }

  #match(pattern: RegExp): string | undefined {
    const [found] = pattern.exec(this.#source.slice(this.#at, this.#at + 40).join('')) ?? []
    if (found !== undefined) this.#at += [...found].length
    return found
  }

  #atom(): Node {
    if (this.#take('(')) return this.#group()
    if (this.#take('[')) return character(this.#class())
    if (this.#take('.')) return character(complement(LINE_ENDS))
    if (this.#take('^')) return { kind: 'anchor', at: '^' }
    if (this.#take('$')) return { kind: 'anchor', at: '$' }
    if (this.#take('\\')) return character(this.#escape(false))
    return literal(this.#source[this.#at++])
  }

  #group(): Node {
    if (this.#take('?') && !this.#take(':') && this.#match(/^<[\p{ID_Start}$_][\p{ID_Continue}$]*>/u) === undefined) {
      throw new PatternError(`(?${this.#source[this.#at]}: lookaround and flags are not supported`)
    }
    if (++this.#depth > 50) throw new PatternError('groups are nested deeper than 50 levels')
    const all = this.alternatives()
    this.#depth--
    this.#at++ // the closing parenthesis
    const of = all.map((parts): Node => ({ kind: 'all', of: parts }))
    return of.length === 1 ? of[0] : { kind: 'either', of }
  }

  #repeated(of: Node): Node {
    const ahead = this.#sees('{') ? this.#source.slice(this.#at, this.#at + 40).join('') : ''
    const counts = /^\{(\d+)(,?)(\d*)\}/.exec(ahead)
    let bounds: readonly [number, number] | undefined
    if (this.#take('*')) bounds = [0, Infinity]
    else if (this.#take('+')) bounds = [1, Infinity]
    else if (this.#take('?')) bounds = [0, 1]
    else if (counts) {
      const [all, least, comma, most] = counts
      this.#at += all.length
      bounds = [Number(least), comma === '' ? Number(least) : most === '' ? Infinity : Number(most)]
    }
    if (bounds === undefined) return of
    // Greedy or not, the same texts match.
    this.#take('?')
    return { kind: 'repeat', of, least: bounds[0], most: bounds[1] }
  }

  #class(): CharacterSet {
    const isNegated = this.#take('^')
    const all: Array<readonly [number, number]> = []
    while (!this.#take(']')) {
      const from = this.#classAtom()
      const isRange = this.#sees('-') && this.#source[this.#at + 1] !== ']'
      if (!isRange || !isSingle(from)) {
        all.push(...from)
        continue
      }
      this.#at++
      const to = this.#classAtom()
      if (isSingle(to)) all.push([from[0][0], to[0][0]])
      else all.push(...from, ...single('-'), ...to)
    }
    return isNegated ? complement(all) : all
  }

  #classAtom(): CharacterSet {
    return this.#take('\\') ? this.#escape(true) : single(this.#source[this.#at++])
  }

  #escape(isInClass: boolean): CharacterSet {
    const hex =
      this.#match(/^u\{[0-9a-fA-F]+\}/) ?? this.#match(/^u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}/)
    if (hex !== undefined) {
      const [, given = ''] = /^u\{(.*)\}$/.exec(hex) ?? []
      return [at(given === '' ? surrogates(hex) : Number.parseInt(given, 16))]
    }
    const number = this.#match(/^(?:u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2})/)
    if (number !== undefined) return [at(Number.parseInt(number.slice(1), 16))]
    const control = this.#match(/^c[a-zA-Z]/)
    if (control !== undefined) return [at((control.codePointAt(1) as number) % 32)]
    const letter = this.#source[this.#at++]
    if (letter === '0' && /^\d/.test(this.#source[this.#at] ?? ''))
      throw new PatternError('\\0 followed by digits is not supported')
    if (Object.hasOwn(letters, letter)) return letters[letter]
    if (Object.hasOwn(controls, letter)) return [at(controls[letter])]
    if (letter === 'b' && isInClass) return [at(0x08)]
    if (/[a-zA-Z0-9]/.test(letter)) throw new PatternError(`\\${letter} is not supported`)
    return single(letter)
  }
}

const at = (point: number): readonly [number, number] => [point, point]
const single = (character: string): CharacterSet => [at(character.codePointAt(0) as number)]
const isSingle = (set: CharacterSet) => set.length === 1 && set[0][0] === set[0][1]

/** The code point of an escaped surrogate pair, for example `uD83D\uDE42`. */
const surrogates = (pair: string): number =>
  String.fromCharCode(Number.parseInt(pair.slice(1, 5), 16), Number.parseInt(pair.slice(7), 16)).codePointAt(
    0,
  ) as number
