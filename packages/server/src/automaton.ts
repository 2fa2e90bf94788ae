/**
 * @file Sets of texts as automata that know at each character what may follow, and these as rules of grammars. @mlc-ai/web-xgrammar 0.1.27 reads alternatives that begin
 * alike as more than they are ("acab" or "aaab" as "acaab", too), and characters beyond ASCII in classes by their last bytes: rules here have neither.
 */

/** What can be written: control characters that JSON has letters for, ASCII, and all beyond it as one. */
const CONTROLS = [0x08, 0x09, 0x0a, 0x0c, 0x0d]
const LETTERS = 'btnfr'
export const ASCII: readonly number[] = [...CONTROLS, ...Array.from({ length: 0x60 }, (_, i) => 0x20 + i)]
export const BEYOND = ASCII.length
const SYMBOLS = BEYOND + 1

/** Each takes part of the time that a grammar takes. */
const MOST_STATES = 1000
const MOST_PLACES = 5000

/** Why there is none. */
export class PatternError extends Error {}

export type Expression =
  /** A character, by whether it may be each of what can be written. */
  | { readonly kind: 'set'; readonly has: readonly boolean[] }
  | { readonly kind: 'all'; readonly of: readonly Expression[] }
  | { readonly kind: 'either'; readonly of: readonly Expression[] }
  | { readonly kind: 'repeat'; readonly of: Expression; readonly least: number; readonly most: number }

/** State 0 is the first. */
export interface Automaton {
  /** The state behind each that can be written; -1 where it may not. */
  readonly next: ReadonlyArray<readonly number[]>
  /** Whether a text may end there. */
  readonly ends: readonly boolean[]
}

/** Lengths of a text, in characters. */
export interface Lengths {
  readonly least: number
  readonly most: number
}

/** @throws PatternError where it is too large, or nothing is left */
export function automatonOf(expression: Expression): Automaton {
  const places = new Places()
  const [first, last] = [places.add(), places.add()]
  places.connect(expression, first, last)
  const alike = symbolsAlike(expression)
  return determined(places.behind([first]), set => {
    const behind = new Map([...new Set(alike)].map(symbol => [symbol, places.step(set, symbol)]))
    return { ends: set.includes(last), next: alike.map(symbol => behind.get(symbol) as number[]) }
  })
}

/** For each that can be written the first that is in the same sets. */
function symbolsAlike(expression: Expression): number[] {
  const sets = new Set<readonly boolean[]>()
  const collect = (one: Expression): void => {
    if (one.kind === 'set') sets.add(one.has)
    else if (one.kind === 'repeat') collect(one.of)
    else one.of.forEach(collect)
  }
  collect(expression)
  const keys = Array.from({ length: SYMBOLS }, (_, symbol) => [...sets].map(has => Number(has[symbol])).join(''))
  return keys.map(key => keys.indexOf(key))
}

/** The texts of both. @throws PatternError where there are none, or too many states */
export function both(a: Automaton, b: Automaton): Automaton {
  return determined([0, 0], ([p, q]) => ({
    ends: a.ends[p] && b.ends[q],
    next: a.next[p].map((to, symbol) => (to < 0 || b.next[q][symbol] < 0 ? [] : [to, b.next[q][symbol]])),
  }))
}

/** All texts of some length. @throws PatternError where it counts too far */
export function ofLength({ least, most }: Lengths): Automaton {
  const any: Expression = { kind: 'set', has: new Array<boolean>(SYMBOLS).fill(true) }
  return automatonOf({ kind: 'repeat', of: any, least, most })
}

/** Places between characters, some of which are as good as others. */
class Places {
  readonly #steps: Array<Array<{ readonly has: readonly boolean[]; readonly to: number }>> = []
  readonly #same: number[][] = []

  add(): number {
    this.#same.push([])
    if (this.#steps.push([]) > MOST_PLACES) throw new PatternError('it is too large')
    return this.#steps.length - 1
  }

  connect(expression: Expression, from: number, to: number): void {
    if (expression.kind === 'set') {
      this.#steps[from].push({ has: expression.has, to })
    } else if (expression.kind === 'either') {
      for (const one of expression.of) this.connect(one, from, to)
    } else if (expression.kind === 'all') {
      let at = from
      for (const one of expression.of) at = this.#behind(one, at)
      this.#same[at].push(to)
    } else {
      const { of, least, most } = expression
      let at = from
      for (let i = 0; i < least; i++) at = this.#behind(of, at)
      if (most === Infinity) {
        const loop = this.add()
        this.#same[at].push(loop)
        this.#same[this.#behind(of, loop)].push(loop)
        this.#same[loop].push(to)
        return
      }
      this.#same[at].push(to)
      for (let i = least; i < most; i++) {
        at = this.#behind(of, at)
        this.#same[at].push(to)
      }
    }
  }

  #behind(expression: Expression, from: number): number {
    const to = this.add()
    this.connect(expression, from, to)
    return to
  }

  /** These and all that are as good, in order. */
  behind(places: readonly number[]): number[] {
    const found = new Set(places)
    for (const place of found) for (const same of this.#same[place]) found.add(same)
    return [...found].sort((a, b) => a - b)
  }

  step(places: readonly number[], symbol: number): number[] {
    return this.behind(places.flatMap(place => this.#steps[place].filter(({ has }) => has[symbol]).map(({ to }) => to)))
  }
}

/** From what states are made of to states, without those from which no text ends. */
function determined(
  first: number[],
  follow: (part: readonly number[]) => { readonly ends: boolean; readonly next: readonly number[][] },
): Automaton {
  const parts = [first]
  const numbers = new Map([[first.join(), 0]])
  const ends: boolean[] = []
  const next: number[][] = []
  const before: number[][] = [[]]
  for (let state = 0; state < parts.length; state++) {
    const behind = follow(parts[state])
    const known = new Map<readonly number[], number>()
    const numberOf = (part: number[]) => {
      const key = part.join()
      const number = numbers.get(key) ?? parts.push(part) - 1
      numbers.set(key, number)
      before[number] = [...(before[number] ?? []), state]
      return number
    }
    ends.push(behind.ends)
    next.push(
      behind.next.map(part => {
        const number = part.length === 0 ? -1 : (known.get(part) ?? numberOf(part))
        known.set(part, number)
        return number
      }),
    )
    if (parts.length > MOST_STATES) throw new PatternError('it is too large')
  }
  const alive = new Set(ends.flatMap((isEnd, state) => (isEnd ? [state] : [])))
  for (const state of alive) for (const one of before[state]) alive.add(one)
  if (!alive.has(0)) throw new PatternError('there is no text of it')
  const kept = [...alive].sort((a, b) => a - b)
  const renamed = new Map([...kept.entries()].map(([i, state]) => [state, i]))
  return {
    ends: kept.map(state => ends[state]),
    next: kept.map(state => next[state].map(to => renamed.get(to) ?? -1)),
  }
}

/** A rule of a grammar, and those that it needs. */
export interface Rule {
  readonly name: string
  readonly lines: readonly string[]
}

/**
 * @param isString whether its texts are those of JSON strings, between quotes and escaped where they have to be
 * @param name of its first rule; others begin with it
 */
export function ruleOf({ next, ends }: Automaton, isString: boolean, name: string): Rule {
  const stateName = (state: number) => `${name}_${state}`
  const lines = [`${name} ::= ${isString ? '"\\"" ' : ''}${stateName(0)}`]
  for (const [state, to] of next.entries()) {
    const alternatives: string[] = ends[state] ? [isString ? '"\\""' : '""'] : []
    const escapes: string[] = []
    for (const target of new Set(to.filter(one => one >= 0))) {
      const points = ASCII.filter((_, symbol) => to[symbol] === target)
      const plain = points.filter(point => point >= 0x20 && !(isString && isEscaped(point)))
      const escaped = isString ? points.filter(point => isEscaped(point)) : []
      // Only a class that leaves out has characters beyond ASCII.
      const one =
        to[BEYOND] === target ? `[^${codes(rest(plain))}]` : plain.length > 0 ? `[${codes(plain)}]` : undefined
      if (one) alternatives.push(`${one} ${stateName(target)}`)
      if (escaped.length > 0) escapes.push(`[${codes(escaped.map(letterOf))}] ${stateName(target)}`)
    }
    if (escapes.length > 0) {
      alternatives.push(`"\\\\" ${stateName(state)}_escaped`)
      lines.push(`${stateName(state)}_escaped ::= ${escapes.join(' | ')}`)
    }
    lines.push(`${stateName(state)} ::= ${alternatives.join(' | ')}`)
  }
  return { name, lines }
}

const isEscaped = (point: number) => point < 0x20 || point === 0x22 || point === 0x5c
/** That stands behind the backslash. */
const letterOf = (point: number) => (point < 0x20 ? LETTERS.charCodeAt(CONTROLS.indexOf(point)) : point)
const rest = (points: readonly number[]) => Array.from({ length: 0x80 }, (_, i) => i).filter(i => !points.includes(i))

/** In a class, in order. */
function codes(points: readonly number[]): string {
  const sorted = [...points].sort((a, b) => a - b)
  const firsts = sorted.filter((point, i) => point - 1 !== sorted[i - 1])
  const lasts = sorted.filter((point, i) => point + 1 !== sorted[i + 1])
  const code = (point: number) => `\\u${point.toString(16).padStart(4, '0')}`
  return firsts.map((from, i) => (from === lasts[i] ? code(from) : `${code(from)}-${code(lasts[i])}`)).join('')
}

/** Some texts as they are. */
export function ruleOfTexts(texts: readonly string[], name: string): Rule {
  const lines: string[] = []
  const add = (rests: readonly string[]): string => {
    const own = `${name}_${lines.length}`
    const at = lines.push('') - 1
    const groups = new Map<string, string[]>()
    for (const text of new Set(rests)) {
      const [first = ''] = text
      groups.set(first, [...(groups.get(first) ?? []), text.slice(first.length)])
    }
    const alternatives = [...groups].map(([first, behind]) => {
      if (first === '') return '""'
      const shared = behind.length === 1 ? behind[0] : ''
      return `${JSON.stringify(first + shared)} ${add(behind.map(text => text.slice(shared.length)))}`
    })
    lines[at] = `${own} ::= ${alternatives.join(' | ')}`
    return own
  }
  return { name: add(texts), lines }
}

/** How much time it takes to make a grammar of it, in characters that may be any. */
export function weightOf({ next }: Automaton): number {
  const wide = next.filter(to => to[BEYOND] >= 0).length
  return wide + (next.length - wide) / 8
}
