/** @file Parses JSON and rejects duplicate keys, of which `JSON.parse` would silently keep the last. */

import { shown } from './checkpoint-error.ts'

/**
 * Parses UTF-8 JSON.
 *
 * @param depth maximum nesting depth
 * @throws {SyntaxError} for invalid UTF-8, invalid JSON, duplicate keys in an object, or nesting deeper than `depth`
 */
export function parseStrictJson(bytes: Uint8Array, depth: number): unknown {
  let text: string
  try {
    text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes)
  } catch {
    throw new SyntaxError('it is not valid UTF-8')
  }
  checkNesting(text, depth)
  const value: unknown = JSON.parse(text)
  checkDuplicateKeys(text)
  return value
}

/** Runs before `JSON.parse`, which is recursive: deeply nested brackets must not overflow the stack. */
function checkNesting(text: string, limit: number): void {
  let level = 0
  for (let i = 0; i < text.length; i++) {
    const c = text.charCodeAt(i)
    if (c === QUOTE) i = endOfString(text, i)
    else if (c === OPEN_BRACE || c === OPEN_BRACKET) {
      if (++level > limit) throw new SyntaxError(`it is nested deeper than ${limit} levels`)
    } else if (c === CLOSE_BRACE || c === CLOSE_BRACKET) level--
  }
}

/** `text` is valid JSON, so a string followed by a colon is a key of the innermost object. */
function checkDuplicateKeys(text: string): void {
  const open: Set<string>[] = []
  for (let i = 0; i < text.length; i++) {
    const c = text.charCodeAt(i)
    if (c === OPEN_BRACE || c === OPEN_BRACKET) open.push(new Set())
    else if (c === CLOSE_BRACE || c === CLOSE_BRACKET) open.pop()
    else if (c === QUOTE) {
      const end = endOfString(text, i)
      let after = end + 1
      while (text.charCodeAt(after) <= SPACE) after++
      if (text.charCodeAt(after) === COLON) {
        const key = JSON.parse(text.slice(i, end + 1)) as string
        const keys = open[open.length - 1]
        if (keys.has(key)) throw new SyntaxError(`duplicate key ${shown(key)}`)
        keys.add(key)
      }
      i = end
    }
  }
}

/** The index of the closing quote of the string that starts at `start`, or the end of the text if it is unterminated. */
function endOfString(text: string, start: number): number {
  let i = start + 1
  while (i < text.length && text.charCodeAt(i) !== QUOTE) i += text.charCodeAt(i) === BACKSLASH ? 2 : 1
  return i
}

const QUOTE = 0x22
const BACKSLASH = 0x5c
const COLON = 0x3a
const SPACE = 0x20
const OPEN_BRACE = 0x7b
const CLOSE_BRACE = 0x7d
const OPEN_BRACKET = 0x5b
const CLOSE_BRACKET = 0x5d
