/**
 * @file Converts regular expressions to deterministic automata, and these to grammar rules. The rules avoid two errors of @mlc-ai/web-xgrammar 0.1.27: it accepts wrong
 * strings for alternatives with a common prefix ("acaab" for "acab" or "aaab"), and it reads non-ASCII characters in classes by their last bytes.
 */

/** The symbols: control characters with a short escape in JSON, printable ASCII, and one symbol for all non-ASCII characters. */
const CONTROLS = [0x08, 0x09, 0x0a, 0x0c, 0x0d]
const ESCAPE_LETTERS = 'btnfr'
export const ASCII: readonly number[] = [...CONTROLS, ...Array.from({ length: 0x60 }, (_, i) => 0x20 + i)]
export const NON_ASCII = ASCII.length
const SYMBOL_COUNT = NON_ASCII + 1

/** Limits, since each state adds to the time to compile a grammar. */
const MAX_STATES = 1000
const MAX_NFA_STATES = 5000

/** Maximum effort for the patterns of a request, about a second, which blocks the server. */
const MAX_EFFORT = 2 ** 21

/** Thrown if a pattern is unsupported, too large, or matches nothing. */
export class PatternError extends Error {}

/** Limits the time that conversions take together: few states may have many predecessors in a nondeterministic automaton. */
export class Effort {
  #left = MAX_EFFORT

  /** @throws PatternError if nothing is left */
  spend(steps: number): void {
    this.#left -= steps
    if (this.#left < 0) throw new PatternError('too many states')
  }
}

export type Expression =
  /** One character: for each symbol, whether it matches. */
  | { readonly kind: 'set'; readonly has: readonly boolean[] }
  | { readonly kind: 'all'; readonly of: readonly Expression[] }
  | { readonly kind: 'either'; readonly of: readonly Expression[] }
  | { readonly kind: 'repeat'; readonly of: Expression; readonly least: number; readonly most: number }

/** A deterministic finite automaton. State 0 is the start. */
export interface Automaton {
  /** For each state and symbol, the next state, or -1 if the symbol is not allowed. */
  readonly next: ReadonlyArray<readonly number[]>
  /** For each state, whether a text may end there. */
  readonly ends: readonly boolean[]
}

/** Range of text lengths, in characters. */
export interface Lengths {
  readonly least: number
  readonly most: number
}

/** Converts an expression to an automaton. @throws PatternError if it is too large or matches nothing */
export function automatonOf(expression: Expression, effort: Effort): Automaton {
  const nfa = new Nfa(effort)
  const [first, last] = [nfa.addState(), nfa.addState()]
  nfa.connect(expression, first, last)
  const alike = equivalentSymbols(expression)
  return determinize(nfa.closure([first]), effort, set => {
    const behind = new Map([...new Set(alike)].map(symbol => [symbol, nfa.step(set, symbol)]))
    return { ends: set.includes(last), next: alike.map(symbol => behind.get(symbol) as number[]) }
  })
}

/** For each symbol, the first symbol that is in exactly the same sets. */
function equivalentSymbols(expression: Expression): number[] {
  const sets = new Set<readonly boolean[]>()
  const collect = (one: Expression): void => {
    if (one.kind === 'set') sets.add(one.has)
    else if (one.kind === 'repeat') collect(one.of)
    else one.of.forEach(collect)
  }
  collect(expression)
  const keys = Array.from({ length: SYMBOL_COUNT }, (_, symbol) => [...sets].map(has => Number(has[symbol])).join(''))
  return keys.map(key => keys.indexOf(key))
}

/** The intersection of two automata. @throws PatternError if it is empty or has too many states */
export function intersect(a: Automaton, b: Automaton, effort: Effort): Automaton {
  return determinize([0, 0], effort, ([p, q]) => {
    const pairs = new Map<number, number[]>()
    const pair = (to: number, other: number) => {
      const key = to * MAX_STATES + other
      const known = pairs.get(key) ?? [to, other]
      pairs.set(key, known)
      return known
    }
    const next = a.next[p].map((to, symbol) => {
      const other = b.next[q][symbol]
      return to < 0 || other < 0 ? [] : pair(to, other)
    })
    return { ends: a.ends[p] && b.ends[q], next }
  })
}

/** Accepts all texts of certain lengths. @throws PatternError if it needs too many states */
export function ofLength({ least, most }: Lengths, effort: Effort): Automaton {
  const any: Expression = { kind: 'set', has: new Array<boolean>(SYMBOL_COUNT).fill(true) }
  return automatonOf({ kind: 'repeat', of: any, least, most }, effort)
}

/** A nondeterministic finite automaton with epsilon transitions. */
class Nfa {
  readonly #steps: Array<Array<{ readonly has: readonly boolean[]; readonly to: number }>> = []
  readonly #epsilon: number[][] = []
  readonly #effort: Effort

  constructor(effort: Effort) {
    this.#effort = effort
  }

  addState(): number {
    this.#epsilon.push([])
    if (this.#steps.push([]) > MAX_NFA_STATES) throw new PatternError('too many states')
    return this.#steps.length - 1
  }

  connect(expression: Expression, from: number, to: number): void {
    if (expression.kind === 'set') {
      this.#steps[from].push({ has: expression.has, to })
    } else if (expression.kind === 'either') {
      for (const one of expression.of) this.connect(one, from, to)
    } else if (expression.kind === 'all') {
      let at = from
      for (const one of expression.of) at = this.#append(one, at)
      this.#epsilon[at].push(to)
    } else {
      const { of, least, most } = expression
      let at = from
      for (let i = 0; i < least; i++) at = this.#append(of, at)
      if (most === Infinity) {
        const loop = this.addState()
        this.#epsilon[at].push(loop)
        this.#epsilon[this.#append(of, loop)].push(loop)
        this.#epsilon[loop].push(to)
        return
      }
      this.#epsilon[at].push(to)
      for (let i = least; i < most; i++) {
        at = this.#append(of, at)
        this.#epsilon[at].push(to)
      }
    }
  }

  #append(expression: Expression, from: number): number {
    const to = this.addState()
    this.connect(expression, from, to)
    return to
  }

  /** The states reachable through epsilon transitions, sorted. */
  closure(states: readonly number[]): number[] {
    const found = new Set(states)
    for (const state of found) for (const next of this.#epsilon[state]) found.add(next)
    this.#effort.spend(found.size)
    return [...found].sort((a, b) => a - b)
  }

  step(states: readonly number[], symbol: number): number[] {
    return this.closure(
      states.flatMap(state => this.#steps[state].filter(({ has }) => has[symbol]).map(({ to }) => to)),
    )
  }
}

/**
 * The subset construction, without states from which no end can be reached.
 * @param follow whether a subset contains an end, and the subset after each symbol
 */
function determinize(
  first: number[],
  effort: Effort,
  follow: (part: readonly number[]) => { readonly ends: boolean; readonly next: readonly number[][] },
): Automaton {
  const parts = [first]
  const numbers = new Map([[first.join(), 0]])
  const ends: boolean[] = []
  const next: number[][] = []
  const before: Array<Set<number>> = [new Set()]
  for (let state = 0; state < parts.length; state++) {
    effort.spend(SYMBOL_COUNT)
    const behind = follow(parts[state])
    const known = new Map<readonly number[], number>()
    const numberOf = (part: number[]) => {
      const key = part.join()
      const number = numbers.get(key) ?? parts.push(part) - 1
      numbers.set(key, number)
      before[number] = (before[number] ?? new Set()).add(state)
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
    if (parts.length > MAX_STATES) throw new PatternError('too many states')
  }
  const alive = new Set(ends.flatMap((isEnd, state) => (isEnd ? [state] : [])))
  for (const state of alive) for (const one of before[state]) alive.add(one)
  if (!alive.has(0)) throw new PatternError('no text matches')
  const kept = [...alive].sort((a, b) => a - b)
  const renamed = new Map([...kept.entries()].map(([i, state]) => [state, i]))
  return {
    ends: kept.map(state => ends[state]),
    next: kept.map(state => next[state].map(to => renamed.get(to) ?? -1)),
  }
}

/** A grammar rule and the rules that it depends on. */
export interface Rule {
  readonly name: string
  readonly lines: readonly string[]
}

/**
 * Converts an automaton to grammar rules.
 * @param isString whether to write the texts as JSON strings, quoted and escaped
 * @param name name of the first rule, and prefix of the names of the others
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
      // Only negated classes can contain non-ASCII characters.
      const one =
        to[NON_ASCII] === target ? `[^${codes(rest(plain))}]` : plain.length > 0 ? `[${codes(plain)}]` : undefined
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
/** The character after the backslash. */
const letterOf = (point: number) => (point < 0x20 ? ESCAPE_LETTERS.charCodeAt(CONTROLS.indexOf(point)) : point)
const rest = (points: readonly number[]) => Array.from({ length: 0x80 }, (_, i) => i).filter(i => !points.includes(i))

/** The ranges of a character class, in order. */
function codes(points: readonly number[]): string {
  const sorted = [...points].sort((a, b) => a - b)
  const firsts = sorted.filter((point, i) => point - 1 !== sorted[i - 1])
  const lasts = sorted.filter((point, i) => point + 1 !== sorted[i + 1])
  const code = (point: number) => `\\u${point.toString(16).padStart(4, '0')}`
  return firsts.map((from, i) => (from === lasts[i] ? code(from) : `${code(from)}-${code(lasts[i])}`)).join('')
}

/** Converts a list of literal texts to grammar rules. */
export function ruleOfTexts(texts: readonly string[], name: string): Rule {
  const lines: string[] = []
  const add = (rests: readonly string[]): string => {
    const own = `${name}_${lines.length}`
    const at = lines.push('') - 1
    const groups = new Map<string, string[]>()
    for (const text of new Set(rests)) {
      const [first = ''] = text
      const group = groups.get(first)
      if (group) group.push(text.slice(first.length))
      else groups.set(first, [text.slice(first.length)])
    }
    const alternatives = [...groups].map(([first, behind]) => {
      if (first === '') return '""'
      const shared = commonPrefix(behind)
      return `${JSON.stringify(first + shared)} ${add(behind.map(text => text.slice(shared.length)))}`
    })
    lines[at] = `${own} ::= ${alternatives.join(' | ')}`
    return own
  }
  return { name: add(texts), lines }
}

/** The longest text that all texts start with. Never ends within a surrogate pair. */
function commonPrefix([first, ...others]: readonly string[]): string {
  let length = first.length
  for (const other of others) {
    let same = 0
    while (same < length && first[same] === other[same]) same++
    length = same
  }
  const isSplit = /[\ud800-\udbff]$/.test(first.slice(0, length))
  return first.slice(0, isSplit ? length - 1 : length)
}

/** Estimated time to compile the rules, as the equivalent number of arbitrary characters. */
export function compileCost({ next }: Automaton): number {
  const wide = next.filter(to => to[NON_ASCII] >= 0).length
  return wide + (next.length - wide) / 8
}
