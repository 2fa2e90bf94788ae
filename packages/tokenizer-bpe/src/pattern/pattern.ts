/**
 * @file Matches regular expressions on UTF-8 in bounded time, with a backtracking machine and an explicit stack. After
 * a number of steps in proportion to the text, a search memoizes the (instruction, position) pairs that failed, which
 * makes nested repetition linear.
 */
import { TokenizerError } from '../errors.ts'
import { codePointAt, previous, widthOf } from '../unicode/utf8.ts'
import { CharSet, property, type Ranges } from './char-set.ts'
import { type Node, parsePattern } from './parse.ts'

const MATCH = 0
const SET = 1 // set
const RUN = 2 // set, minimum, maximum: greedy repetition of a set
const SPLIT = 3 // first choice, second choice
const JUMP = 4 // target
const ATOMIC = 5 // end: matches the instructions up to it, without backtracking into them
const LOOKAHEAD = 6 // end, negated
const LOOKBEHIND = 7 // end, negated, characters
const ASSERT = 8 // index in ASSERTS

/** Number of words of each instruction. */
const SIZE = [1, 2, 4, 3, 2, 2, 3, 4, 2]
const MAX_CODE = 50_000
const UNBOUNDED = 0x7fffffff
const ASSERTS = ['line-start', 'line-end', 'start', 'end', 'last-line-end', 'word', 'not-word'] as const
/** Steps per byte after which failures are memoized. */
const MEMO_STEPS = 16
/** Steps per byte after which a search throws. */
const MAX_STEPS = 100

export class Pattern {
  readonly source: string
  readonly #code: Int32Array
  readonly #sets: CharSet[] = []
  readonly #indexOf = new Map<Ranges | string, number>()
  // State of the current search.
  #bytes: Uint8Array = new Uint8Array(0)
  #start = 0
  #end = 0
  #steps = 0
  #limit = 0
  /** Number of steps until failures are memoized or the search throws. */
  #budget = 0
  /** A bit for each (position, instruction) that failed, once failures are memoized. */
  #failed: Uint8Array | undefined
  #stack = new Int32Array(256)

  /** @throws TokenizerError E_PATTERN */
  constructor(source: string) {
    this.source = source
    const code: number[] = []
    this.#compile(parsePattern(source), code)
    code.push(MATCH)
    this.#code = Int32Array.from(code)
  }

  /**
   * Returns start and end of all matches in `bytes[start..end)`, which is the whole text for assertions. An empty match
   * counts unless it is adjacent to the previous match.
   * @throws TokenizerError E_PATTERN if the search takes too many steps
   */
  matches(bytes: Uint8Array, start: number, end: number): number[] {
    this.#bytes = bytes
    this.#start = start
    this.#end = end
    this.#steps = 0
    this.#budget = (end - start) * MEMO_STEPS + 20_000
    this.#limit = (end - start) * MAX_STEPS + 1_000_000
    this.#failed = undefined
    const found: number[] = []
    let lastEnd = -1
    let at = start
    while (at <= end) {
      const stop = this.#run(0, at, 0)
      if (stop < 0 || (stop === at && lastEnd === at)) {
        at += at < end ? widthOf(bytes[at]) : 1
        continue
      }
      found.push(at, stop)
      lastEnd = stop
      at = stop
    }
    this.#failed = undefined
    if (this.#stack.length > 1 << 16) this.#stack = new Int32Array(256)
    return found
  }

  /** Returns the end of a match of the code at `pc` that starts at `at`, or -1. `base` is the bottom of its stack. */
  #run(pc: number, at: number, base: number): number {
    const code = this.#code
    const bytes = this.#bytes
    const end = this.#end
    let top = base
    while (true) {
      if (++this.#steps > this.#budget) this.#overBudget()
      let ok = false
      switch (code[pc]) {
        case MATCH:
          return at
        case SET:
          if (at < end && this.#sets[code[pc + 1]].has(codePointAt(bytes, at))) {
            at += widthOf(bytes[at])
            pc += 2
            ok = true
          }
          break
        case RUN: {
          const set = this.#sets[code[pc + 1]]
          const min = code[pc + 2]
          const max = code[pc + 3]
          let count = 0
          let low = at
          while (count < max && at < end && set.has(codePointAt(bytes, at))) {
            if (count >= min && this.#failed !== undefined && max === UNBOUNDED && this.#hasFailed(pc, at)) break
            at += widthOf(bytes[at])
            count++
            if (count === min) low = at
          }
          this.#steps += count
          if (count < min) break
          if (at > low) top = this.#push(top, pc, at, low)
          pc += 4
          ok = true
          break
        }
        case SPLIT:
          if (this.#failed === undefined) {
            top = this.#push(top, code[pc + 2], at, -1)
            pc = code[pc + 1]
            ok = true
          } else if (!this.#hasFailed(pc, at)) {
            top = this.#push(top, pc, at, -2)
            top = this.#push(top, code[pc + 2], at, -1)
            pc = code[pc + 1]
            ok = true
          }
          break
        case JUMP:
          pc = code[pc + 1]
          ok = true
          break
        case ATOMIC: {
          const stop = this.#run(pc + 2, at, top)
          if (stop >= 0) {
            at = stop
            pc = code[pc + 1]
            ok = true
          }
          break
        }
        case LOOKAHEAD:
          if (this.#run(pc + 3, at, top) >= 0 === (code[pc + 2] === 0)) {
            pc = code[pc + 1]
            ok = true
          }
          break
        case LOOKBEHIND: {
          let from = at
          let left = code[pc + 3]
          while (left > 0 && from > this.#start) {
            from = previous(bytes, from)
            left--
          }
          const holds = left === 0 && this.#run(pc + 4, from, top) === at
          if (holds === (code[pc + 2] === 0)) {
            pc = code[pc + 1]
            ok = true
          }
          break
        }
        case ASSERT:
          if (this.#isTrue(code[pc + 1], at)) {
            pc += 2
            ok = true
          }
          break
      }
      if (ok) continue
      // Backtrack to the last choice with an alternative left.
      while (true) {
        if (top === base) return -1
        const stack = this.#stack
        const low = stack[top - 1]
        at = stack[top - 2]
        pc = stack[top - 3]
        if (low === -2) {
          this.#markFailed(pc, at)
          top -= 3
          continue
        }
        if (low < 0) {
          top -= 3
          break
        }
        // A run gives back one character at a time. If it gave back all, no start within the run can match.
        if (this.#failed !== undefined && code[pc + 3] === UNBOUNDED) this.#markFailed(pc, at)
        at = previous(bytes, at)
        if (at > low) stack[top - 2] = at
        else top -= 3
        pc += 4
        break
      }
    }
  }

  /** Pushes a choice. `low` is the minimum end of a run, -1 for an alternative, or -2 to mark (pc, at) as failed. */
  #push(top: number, pc: number, at: number, low: number): number {
    if (top + 3 > this.#stack.length) {
      const grown = new Int32Array(this.#stack.length * 2)
      grown.set(this.#stack)
      this.#stack = grown
    }
    this.#stack[top] = pc
    this.#stack[top + 1] = at
    this.#stack[top + 2] = low
    return top + 3
  }

  /** Starts to memoize failures, or throws. */
  #overBudget(): void {
    const length = this.#end - this.#start + 1
    if (this.#failed === undefined && length * this.#code.length < 0x4_0000_0000) {
      this.#failed = new Uint8Array(((length * this.#code.length) >>> 3) + 1)
      this.#budget = this.#limit
      return
    }
    throw new TokenizerError({
      code: 'E_PATTERN',
      op: 'pattern',
      problem: `${JSON.stringify(this.source.slice(0, 120))} takes more than ${this.#steps - 1} steps on a text of ${length - 1} bytes`,
      fix: 'use a pattern without nested repetition',
    })
  }

  #hasFailed(pc: number, at: number): boolean {
    const bit = (at - this.#start) * this.#code.length + pc
    return (this.#failed![Math.floor(bit / 8)] & (1 << (bit % 8))) !== 0
  }

  #markFailed(pc: number, at: number): void {
    if (this.#failed === undefined) return
    const bit = (at - this.#start) * this.#code.length + pc
    this.#failed[Math.floor(bit / 8)] |= 1 << (bit % 8)
  }

  /** Whether an assertion is true at `at`. */
  #isTrue(which: number, at: number): boolean {
    const bytes = this.#bytes
    switch (ASSERTS[which]) {
      case 'start':
        return at === this.#start
      case 'end':
        return at === this.#end
      case 'line-start':
        return at === this.#start || (bytes[at - 1] === 10 && at < this.#end)
      case 'line-end':
        return at === this.#end || bytes[at] === 10
      case 'last-line-end':
        return at === this.#end || (at === this.#end - 1 && bytes[at] === 10)
      default: {
        const word = wordSet()
        const before = at > this.#start && word.has(codePointAt(bytes, previous(bytes, at)))
        const after = at < this.#end && word.has(codePointAt(bytes, at))
        return (before !== after) === (ASSERTS[which] === 'word')
      }
    }
  }

  /** Returns the index of a set, adding it if it is new. */
  #setIndex(ranges: Ranges): number {
    const key = ranges.length > 2 ? ranges : `${ranges}`
    const index = this.#indexOf.get(key) ?? this.#sets.push(new CharSet(ranges)) - 1
    this.#indexOf.set(key, index)
    return index
  }

  #compile(node: Node, code: number[]): void {
    if (code.length > MAX_CODE) {
      throw new TokenizerError({
        code: 'E_PATTERN',
        op: 'pattern',
        problem: 'too large: compiles to more than 50,000 instructions',
      })
    }
    switch (node.type) {
      case 'set':
        code.push(SET, this.#setIndex(node.ranges))
        return
      case 'sequence':
        for (const item of node.nodes) this.#compile(item, code)
        return
      case 'choice':
        this.#compileChoice(node.nodes, code)
        return
      case 'assert':
        code.push(ASSERT, ASSERTS.indexOf(node.at))
        return
      case 'atomic':
      case 'look': {
        const start = code.length
        if (node.type === 'atomic') code.push(ATOMIC, 0)
        else if (node.ahead) code.push(LOOKAHEAD, 0, node.negated ? 1 : 0)
        else code.push(LOOKBEHIND, 0, node.negated ? 1 : 0, fixedLength(node.node))
        this.#compile(node.node, code)
        code.push(MATCH)
        code[start + 1] = code.length
        return
      }
      case 'repeat':
        this.#compileRepeat(node, code)
    }
  }

  #compileChoice(nodes: readonly Node[], code: number[]): void {
    const jumps: number[] = []
    nodes.forEach((item, i) => {
      const last = i === nodes.length - 1
      const split = code.length
      if (!last) code.push(SPLIT, split + SIZE[SPLIT], 0)
      this.#compile(item, code)
      if (last) return
      jumps.push(code.length + 1)
      code.push(JUMP, 0)
      code[split + 2] = code.length
    })
    for (const jump of jumps) code[jump] = code.length
  }

  #compileRepeat(node: Extract<Node, { type: 'repeat' }>, code: number[]): void {
    const { min, max, lazy } = node
    if (node.node.type === 'set' && !lazy) {
      code.push(RUN, this.#setIndex(node.node.ranges), min, max === Number.POSITIVE_INFINITY ? UNBOUNDED : max)
      return
    }
    if (max === Number.POSITIVE_INFINITY && isNullable(node.node)) {
      throw new TokenizerError({
        code: 'E_PATTERN',
        op: 'pattern',
        problem: 'unbounded repetition of a pattern that can match the empty string',
        fix: 'remove the inner or the outer repetition',
      })
    }
    for (let i = 0; i < min; i++) this.#compile(node.node, code)
    const optional = (split: number) => {
      // A greedy repetition first tries to continue, a lazy one to stop.
      code[split + (lazy ? 2 : 1)] = split + SIZE[SPLIT]
      code[split + (lazy ? 1 : 2)] = code.length
    }
    if (max === Number.POSITIVE_INFINITY) {
      const split = code.length
      code.push(SPLIT, 0, 0)
      this.#compile(node.node, code)
      code.push(JUMP, split)
      optional(split)
    } else {
      const splits: number[] = []
      for (let i = min; i < max; i++) {
        splits.push(code.length)
        code.push(SPLIT, 0, 0)
        this.#compile(node.node, code)
      }
      for (const split of splits) optional(split)
    }
  }
}

let words: CharSet | undefined
function wordSet(): CharSet {
  words ??= new CharSet(property('word'))
  return words
}

/** Whether a pattern can match the empty string. */
function isNullable(node: Node): boolean {
  switch (node.type) {
    case 'set':
      return false
    case 'sequence':
      return node.nodes.every(isNullable)
    case 'choice':
      return node.nodes.some(isNullable)
    case 'repeat':
      return node.min === 0 || isNullable(node.node)
    case 'atomic':
      return isNullable(node.node)
    default:
      return true
  }
}

/** Returns the number of characters that a lookbehind covers. */
function fixedLength(node: Node): number {
  switch (node.type) {
    case 'set':
      return 1
    case 'sequence':
      return node.nodes.reduce((sum, item) => sum + fixedLength(item), 0)
    case 'choice': {
      const lengths = node.nodes.map(fixedLength)
      if (lengths.every(length => length === lengths[0])) return lengths[0]
      break
    }
    case 'repeat':
      if (node.min === node.max) return node.min * fixedLength(node.node)
      break
    case 'atomic':
      return fixedLength(node.node)
    default:
      return 0
  }
  throw new TokenizerError({
    code: 'E_PATTERN',
    op: 'pattern',
    problem: 'lookbehind of variable length is not supported',
  })
}
