/** @file Compares all methods of merging a piece with the simplest one, on vocabularies of random merges. */
import { expect, test } from 'vitest'
import { randomNumbers } from '../data/random.ts'
import { BoundaryTable } from './boundary-table.ts'
import { Encoder, IdBuffer, PADDING } from './encoder.ts'
import { MergeTable } from './merge-table.ts'
import { PieceMerger } from './piece-merger.ts'

/**
 * Tokens are strings of bytes. The first are the bytes of the alphabet. Merges join random tokens; their ranks are in
 * the order of creation if `rising`, otherwise random. With `whole`, characters of several bytes become tokens first,
 * and words mostly consist of them; otherwise tokens often start or end within a character.
 */
function randomVocabulary(random: () => number, alphabet: readonly string[], rising: boolean, whole: boolean) {
  const text = [...new Set(alphabet.flatMap(char => [...bytesOf(char)]))]
  const idOf = new Map(text.map((token, id) => [token, id]))
  const pairs: number[][] = []
  const add = (left: number, right: number) => {
    const joined = text[left] + text[right]
    if (joined.length > 15 || pairs.some(pair => pair[0] === left && pair[1] === right)) return
    let id = idOf.get(joined)
    if (id === undefined) {
      id = text.length
      text.push(joined)
      idOf.set(joined, id)
    }
    pairs.push([left, right, id])
  }
  const first = text.length
  if (whole) {
    for (const char of alphabet) {
      const bytes = bytesOf(char)
      // Some characters remain incomplete.
      for (let i = 1; i < bytes.length && random() < 0.75; i++) add(idOf.get(bytes.slice(0, i))!, idOf.get(bytes[i])!)
    }
  }
  for (let i = 0; i < 40; i++) {
    const from = whole && random() < 0.9 ? first : 0
    add(from + Math.floor(random() * (text.length - from)), from + Math.floor(random() * (text.length - from)))
  }
  if (!rising)
    for (let i = pairs.length - 1; i > 0; i--) {
      const other = Math.floor(random() * (i + 1))
      ;[pairs[i], pairs[other]] = [pairs[other], pairs[i]]
    }
  return { text, pairs }
}

/** Returns UTF-8 as a string with one character per byte. */
function bytesOf(text: string): string {
  return String.fromCharCode(...new TextEncoder().encode(text))
}

/** Repeatedly merges the pair of lowest rank. */
function reference(symbols: number[], pairs: number[][]): number[] {
  const list = [...symbols]
  while (true) {
    let best = -1
    let at = -1
    for (let i = 0; i + 1 < list.length; i++) {
      const rank = pairs.findIndex(pair => pair[0] === list[i] && pair[1] === list[i + 1])
      if (rank >= 0 && (best < 0 || rank < best)) {
        best = rank
        at = i
      }
    }
    if (best < 0) return list
    list.splice(at, 2, pairs[best][2])
  }
}

const LATIN = ['a', 'b', 'c']
const CHINESE = ['人', '民', '仆', '的', '，']
const MIXED = ['人', '仆', 'é', 'a', '🙂']

test.each([
  ['Latin letters, rising ranks', LATIN, true, false],
  ['Latin letters, any ranks', LATIN, false, false],
  ['Chinese, whole characters', CHINESE, true, true],
  ['Chinese, any bytes', CHINESE, true, false],
  ['Chinese, whole characters, any ranks', CHINESE, false, true],
  ['several scripts', MIXED, true, true],
  ['several scripts, any bytes', MIXED, true, false],
])('pieces of any length, merged whole or split, give the reference tokens: %s', (_name, alphabet, rising, whole) => {
  const random = randomNumbers(rising ? 1 : 2)
  for (let round = 0; round < 100; round++) {
    const { text, pairs } = randomVocabulary(random, alphabet, rising, whole)
    const byteToken = new Int32Array(256).fill(-1)
    text.forEach((token, id) => {
      if (token.length === 1) byteToken[token.charCodeAt(0)] = id
    })
    // Every byte has a token, so that pieces are split: bytes outside of the alphabet have an id that does not occur.
    const all = byteToken.map(id => (id < 0 ? text.length : id))
    const table = MergeTable.of(Int32Array.from(pairs.flat()), byteToken, text.length + 1)
    const merger = new PieceMerger(table, all, -1, false)
    const bytes = Uint8Array.from(text.join(''), char => char.charCodeAt(0))
    const lengths = Int32Array.from(text, token => token.length)
    const starts = Int32Array.from(text, (_, id) => text.slice(0, id).join('').length)
    const encoder = new Encoder(
      merger,
      (_b, _p, end, ends) => {
        ends[0] = end
        return 1
      },
      undefined,
      () => new BoundaryTable(bytes, starts, lengths),
    )
    for (const length of [1, 5, 30, 96, 97, 130]) {
      const periodic = random() < 0.3
      const chars = Array.from(
        { length },
        (_, i) => alphabet[periodic ? [0, 0, 1, 0][i % 4] : Math.floor(random() * alphabet.length)],
      )
      const content = new TextEncoder().encode(chars.join(''))
      const piece = new Uint8Array(content.length + PADDING)
      piece.set(content)
      const expected = reference(
        Array.from(content, byte => byteToken[byte]),
        pairs,
      )
      const count = merger.merge(piece, 0, content.length)
      expect([...merger.out.subarray(0, count)]).toEqual(expected)
      const out = new IdBuffer()
      for (let again = 0; again < 3; again++) {
        out.length = 0
        encoder.encode(piece, new DataView(piece.buffer), 0, content.length, out)
        expect([...out.ids.subarray(0, out.length)]).toEqual(expected)
      }
    }
  }
})
