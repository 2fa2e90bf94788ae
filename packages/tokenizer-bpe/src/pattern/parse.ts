/** @file Parses regular expressions in the syntax of tokenizer.json (Oniguruma's Ruby syntax) to a syntax tree. */
import { TokenizerError } from '../errors.ts'
import { foldCase, HEX, intersect, negate, normalize, property, type Ranges } from './char-set.ts'

export type Node =
  | { readonly type: 'set'; readonly ranges: Ranges }
  | { readonly type: 'sequence'; readonly nodes: readonly Node[] }
  | { readonly type: 'choice'; readonly nodes: readonly Node[] }
  | { readonly type: 'repeat'; readonly node: Node; readonly min: number; readonly max: number; readonly lazy: boolean }
  | { readonly type: 'atomic'; readonly node: Node }
  | { readonly type: 'look'; readonly node: Node; readonly ahead: boolean; readonly negated: boolean }
  | {
      readonly type: 'assert'
      readonly at: 'line-start' | 'line-end' | 'start' | 'end' | 'last-line-end' | 'word' | 'not-word'
    }

interface Flags {
  readonly ignoreCase: boolean
  readonly dotAll: boolean
  readonly extended: boolean
}

/** Maximum nesting of groups and brackets. */
const MAX_DEPTH = 100
/** Maximum number of repetition operators on one item. */
const MAX_STACKED = 10
/** Maximum number of characters. Patterns of tokenizers have a few hundred. */
const MAX_LENGTH = 1 << 15
/** Control characters by their escapes. */
const CONTROL: Record<string, number> = { t: 9, n: 10, v: 11, f: 12, r: 13, a: 7, e: 27 }

/**
 * @throws TokenizerError E_PATTERN for an invalid pattern or an unsupported feature (backreferences, recursion,
 * conditionals)
 */
export function parsePattern(source: string): Node {
  return new Parser(source).parse()
}

class Parser {
  readonly #source: string
  readonly #chars: readonly string[]
  #at = 0
  #depth = 0

  constructor(source: string) {
    this.#source = source
    this.#chars = [...source]
  }

  parse(): Node {
    if (this.#chars.length > MAX_LENGTH) throw this.#error('too long')
    const node = this.#choice({ ignoreCase: false, dotAll: false, extended: false })
    if (this.#at < this.#chars.length) throw this.#error('unmatched )')
    return node
  }

  #error(problem: string): TokenizerError {
    const source = this.#source.length > 120 ? `${this.#source.slice(0, 120)}…` : this.#source
    return new TokenizerError({
      code: 'E_PATTERN',
      op: 'pattern',
      problem: `${problem} at character ${this.#at} of ${JSON.stringify(source)}`,
      details: { pattern: this.#source, at: this.#at },
    })
  }

  #peek(text: string): boolean {
    for (let i = 0; i < text.length; i++) if (this.#chars[this.#at + i] !== text[i]) return false
    return true
  }

  #take(text: string): boolean {
    if (!this.#peek(text)) return false
    this.#at += text.length
    return true
  }

  #next(): string {
    const char = this.#chars[this.#at++]
    if (char === undefined) throw this.#error('unexpected end')
    return char
  }

  #choice(flags: Flags): Node {
    if (++this.#depth > MAX_DEPTH) throw this.#error('groups are nested too deeply')
    const nodes: Node[] = []
    let current = flags
    do {
      const items: Node[] = []
      while (this.#at < this.#chars.length && !this.#peek('|') && !this.#peek(')')) {
        const changed = this.#inlineFlags(current)
        if (changed !== undefined) {
          current = changed
          continue
        }
        const item = this.#repeated(current)
        if (item !== undefined) items.push(item)
      }
      nodes.push(items.length === 1 ? items[0] : { type: 'sequence', nodes: items })
    } while (this.#take('|'))
    this.#depth--
    return nodes.length === 1 ? nodes[0] : { type: 'choice', nodes }
  }

  /** Parses flags such as `(?i)`, which apply to the end of the group. */
  #inlineFlags(flags: Flags): Flags | undefined {
    if (!this.#peek('(?')) return undefined
    const start = this.#at
    this.#at += 2
    const changed = this.#flagLetters(flags)
    if (changed !== undefined && this.#take(')')) return changed
    this.#at = start
    return undefined
  }

  #flagLetters(flags: Flags): Flags | undefined {
    let result = flags
    let on = true
    let any = false
    for (; ; this.#at++) {
      const char = this.#chars[this.#at]
      if (char === '-') on = false
      else if (char === 'i') result = { ...result, ignoreCase: on }
      else if (char === 'm' || char === 's') result = { ...result, dotAll: on }
      else if (char === 'x') result = { ...result, extended: on }
      else if (char !== 'u') return any ? result : undefined
      any = true
    }
  }

  #repeated(flags: Flags): Node | undefined {
    let node = this.#atom(flags)
    if (node === undefined) return undefined
    for (let stacked = 0; ; stacked++) {
      if (stacked > MAX_STACKED) throw this.#error('too many repetition operators')
      let min: number
      let max: number
      let braces = false
      if (this.#take('*')) [min, max] = [0, Number.POSITIVE_INFINITY]
      else if (this.#take('+')) [min, max] = [1, Number.POSITIVE_INFINITY]
      else if (this.#take('?')) [min, max] = [0, 1]
      else {
        const counts = this.#counts()
        if (counts === undefined) return node
        ;[min, max] = counts
        braces = true
      }
      if (node.type === 'assert') throw this.#error('repeated assertion')
      const lazy = this.#take('?')
      node = { type: 'repeat', node, min, max, lazy }
      // In Ruby syntax, a plus after a count is another repetition.
      if (!lazy && !braces && this.#take('+')) node = { type: 'atomic', node }
    }
  }

  #counts(): [number, number] | undefined {
    const match = /^\{(\d{0,6})(,?)(\d{0,6})\}/.exec(this.#chars.slice(this.#at, this.#at + 16).join(''))
    if (match === null || (match[1] === '' && match[3] === '')) return undefined
    this.#at += match[0].length
    const min = match[1] === '' ? 0 : Number(match[1])
    const max = match[2] === '' ? min : match[3] === '' ? Number.POSITIVE_INFINITY : Number(match[3])
    if (max < min) throw this.#error(`invalid count {${min},${max}}`)
    return [min, max]
  }

  #atom(flags: Flags): Node | undefined {
    const char = this.#next()
    switch (char) {
      case '(':
        return this.#group(flags)
      case '[':
        return this.#set(this.#bracket(flags), flags)
      case '.':
        return { type: 'set', ranges: flags.dotAll ? property('any') : negate([10, 10]) }
      case '^':
        return { type: 'assert', at: 'line-start' }
      case '$':
        return { type: 'assert', at: 'line-end' }
      case '\\':
        return this.#escape(flags)
      case '*':
      case '+':
      case '?':
        throw this.#error(`nothing to repeat before ${char}`)
    }
    if (flags.extended) {
      if (/\s/.test(char)) return undefined
      if (char === '#') {
        while (this.#at < this.#chars.length && this.#next() !== '\n');
        return undefined
      }
    }
    return this.#literal(char.codePointAt(0)!, flags)
  }

  #literal(code: number, flags: Flags): Node {
    return this.#set([code, code], flags)
  }

  #set(ranges: Ranges, flags: Flags): Node {
    return { type: 'set', ranges: flags.ignoreCase ? foldCase(ranges) : ranges }
  }

  #group(flags: Flags): Node {
    let wrap = (node: Node): Node => node
    let inner = flags
    if (this.#take('?')) {
      if (this.#take('#')) {
        while (this.#next() !== ')');
        return { type: 'sequence', nodes: [] }
      }
      if (this.#take('=')) wrap = node => ({ type: 'look', node, ahead: true, negated: false })
      else if (this.#take('!')) wrap = node => ({ type: 'look', node, ahead: true, negated: true })
      else if (this.#take('<=')) wrap = node => ({ type: 'look', node, ahead: false, negated: false })
      else if (this.#take('<!')) wrap = node => ({ type: 'look', node, ahead: false, negated: true })
      else if (this.#take('>')) wrap = node => ({ type: 'atomic', node })
      else if (this.#take('<') || this.#take('P<')) {
        while (this.#next() !== '>');
      } else if (!this.#take(':')) {
        const changed = this.#flagLetters(flags)
        if (changed === undefined || !this.#take(':')) throw this.#error('unsupported group')
        inner = changed
      }
    }
    const node = this.#choice(inner)
    if (!this.#take(')')) throw this.#error('unclosed group')
    return wrap(node)
  }

  #escape(flags: Flags): Node {
    const char = this.#chars[this.#at]
    const asserts: Record<string, Extract<Node, { type: 'assert' }>['at']> = {
      A: 'start',
      z: 'end',
      Z: 'last-line-end',
      b: 'word',
      B: 'not-word',
    }
    if (char !== undefined && Object.hasOwn(asserts, char)) {
      this.#at++
      return { type: 'assert', at: asserts[char] }
    }
    if (char === 'R') {
      this.#at++
      const newline: Node = { type: 'set', ranges: [10, 13, 0x85, 0x85, 0x2028, 0x2029] }
      const crlf: Node = {
        type: 'sequence',
        nodes: [
          { type: 'set', ranges: [13, 13] },
          { type: 'set', ranges: [10, 10] },
        ],
      }
      return { type: 'atomic', node: { type: 'choice', nodes: [crlf, newline] } }
    }
    if (char !== undefined && /[1-9kgGKXyYN]/.test(char)) throw this.#error(`\\${char} is not supported`)
    const ranges = this.#escapedSet('word')
    // `(?i)` does not apply to classes outside of brackets.
    return ranges[0] === ranges[ranges.length - 1] ? this.#set(ranges, flags) : { type: 'set', ranges }
  }

  /**
   * Parses an escape after its backslash, in or outside of brackets.
   * @param word name of the property for `\w`
   */
  #escapedSet(word: string): Ranges {
    const char = this.#next()
    switch (char) {
      case 'p':
      case 'P': {
        let name = this.#next()
        let negated = char === 'P'
        if (name === '{') {
          name = ''
          for (let part = this.#next(); part !== '}'; part = this.#next()) name += part
          if (name.startsWith('^')) {
            negated = !negated
            name = name.slice(1)
          }
        }
        const ranges = property(name.replace(/^(?:Script|sc|General_Category|gc)=/, ''))
        return negated ? negate(ranges) : ranges
      }
      case 's':
        return property('space')
      case 'S':
        return negate(property('space'))
      case 'd':
        return property('nd')
      case 'D':
        return negate(property('nd'))
      case 'w':
        return property(word)
      case 'W':
        return negate(property(word))
      case 'h':
        return HEX
      case 'H':
        return negate(HEX)
    }
    const code = this.#escapedCode(char)
    return [code, code]
  }

  /** Parses an escaped character. */
  #escapedCode(char: string): number {
    if (Object.hasOwn(CONTROL, char)) return CONTROL[char]
    if (char === '0') return 0
    if (char === 'x' || char === 'u') {
      const digits = this.#take('{') ? this.#until('}') : this.#fixed(char === 'x' ? 2 : 4)
      const code = /^[0-9a-fA-F]+$/.test(digits) ? Number.parseInt(digits, 16) : -1
      if (code < 0 || code > 0x10ffff) throw this.#error(`\\${char} needs hexadecimal digits`)
      return code
    }
    if (/[a-zA-Z1-9]/.test(char)) throw this.#error(`\\${char} is not supported`)
    return char.codePointAt(0)!
  }

  #until(end: string): string {
    let text = ''
    for (let char = this.#next(); char !== end; char = this.#next()) text += char
    return text
  }

  #fixed(length: number): string {
    let text = ''
    while (text.length < length) text += this.#next()
    return text
  }

  /** Parses a bracket expression after its `[`: ranges, escapes, POSIX classes, nested brackets and `&&`. */
  #bracket(flags: Flags): Ranges {
    if (++this.#depth > MAX_DEPTH) throw this.#error('brackets are nested too deeply')
    const negated = this.#take('^')
    let left: Ranges | undefined
    let ranges: number[] = []
    for (let first = true; ; first = false) {
      if (this.#at >= this.#chars.length) throw this.#error('unclosed bracket')
      if (!first && this.#take(']')) break
      if (this.#take('&&')) {
        const part = normalize(ranges)
        left = left ? intersect(left, part) : part
        ranges = []
        continue
      }
      if (this.#peek('[:')) {
        const posix = /^\[:(\^?)(\w+):\]/.exec(this.#chars.slice(this.#at, this.#at + 20).join(''))
        if (posix) {
          this.#at += posix[0].length
          const named = property(posix[2].replace(/^(word|punct)$/, 'inner_$1'))
          ranges.push(...(posix[1] ? negate(named) : named))
          continue
        }
      }
      if (this.#take('[')) {
        ranges.push(...this.#bracket(flags))
        continue
      }
      const low = this.#bracketItem()
      if (low.length === 2 && low[0] === low[1] && this.#peek('-') && this.#chars[this.#at + 1] !== ']') {
        this.#at++
        const high = this.#bracketItem()
        if (high.length !== 2 || high[0] !== high[1] || high[0] < low[0]) throw this.#error('range out of order')
        ranges.push(low[0], high[0])
      } else ranges.push(...low)
    }
    this.#depth--
    let result = normalize(ranges)
    if (left) result = intersect(left, result)
    if (negated && flags.ignoreCase) result = foldCase(result)
    return negated ? negate(result) : result
  }

  #bracketItem(): Ranges {
    const char = this.#next()
    if (char === '\\') {
      if (this.#take('b')) return [8, 8]
      return this.#escapedSet('inner_word')
    }
    const code = char.codePointAt(0)!
    return [code, code]
  }
}
