/** @file Every way to merge a piece against the plainest one, on vocabularies of random merges, whose ranks rise or not. */
import { expect, test } from 'vitest'
import { randomNumbers } from '../data/random.ts'
import { CutTable } from './cut-table.ts'
import { Encoder, IdBuffer } from './encoder.ts'
import { PieceMerger } from './merge-piece.ts'
import { MergeTable } from './merge-table.ts'

const LETTERS = 3

/** Tokens 0, 1, 2 are single letters; merges join random tokens, in random order. */
function randomVocabulary(random: () => number, rising: boolean) {
  const text = ['a', 'b', 'c']
  const idOf = new Map(text.map((token, id) => [token, id]))
  const pairs: number[][] = []
  for (let i = 0; i < 40; i++) {
    const left = Math.floor(random() * text.length)
    const right = Math.floor(random() * text.length)
    const joined = text[left] + text[right]
    if (joined.length > 12 || pairs.some(pair => pair[0] === left && pair[1] === right)) continue
    let id = idOf.get(joined)
    if (id === undefined) {
      id = text.length
      text.push(joined)
      idOf.set(joined, id)
    }
    pairs.push([left, right, id])
  }
  if (!rising)
    for (let i = pairs.length - 1; i > 0; i--) {
      const other = Math.floor(random() * (i + 1))
      ;[pairs[i], pairs[other]] = [pairs[other], pairs[i]]
    }
  return { text, pairs }
}

function plain(symbols: number[], pairs: number[][]): number[] {
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

test.each([true, false])('short, long and cut pieces merge alike (rising ranks: %s)', rising => {
  const random = randomNumbers(rising ? 1 : 2)
  for (let round = 0; round < 150; round++) {
    const { text, pairs } = randomVocabulary(random, rising)
    const byteToken = new Int32Array(256).fill(-1)
    for (let letter = 0; letter < LETTERS; letter++) byteToken[97 + letter] = letter
    // Complete, so that cuts are made: all other bytes stand for an id that never comes.
    const all = byteToken.map(id => (id < 0 ? text.length : id))
    const table = MergeTable.of(Int32Array.from(pairs.flat()), byteToken, text.length)
    const merger = new PieceMerger(table, all, -1, false)
    const bytes = new TextEncoder().encode(text.join(''))
    const lengths = Int32Array.from(text, token => token.length)
    const starts = Int32Array.from(text, (_, id) => text.slice(0, id).join('').length)
    const encoder = new Encoder(
      merger,
      (_b, _p, end, ends) => {
        ends[0] = end
        return 1
      },
      undefined,
      () => new CutTable(bytes, starts, lengths),
    )
    for (const length of [1, 5, 30, 96, 97, 200]) {
      const periodic = random() < 0.3
      const symbols = Array.from({ length }, (_, i) =>
        periodic ? [0, 0, 1, 0][i % 4] : Math.floor(random() * LETTERS),
      )
      const piece = new Uint8Array(length + 16)
      piece.set(symbols.map(symbol => 97 + symbol))
      const expected = plain(symbols, pairs)
      const count = merger.merge(piece, 0, length)
      expect([...merger.out.subarray(0, count)]).toEqual(expected)
      const out = new IdBuffer()
      for (let again = 0; again < 2; again++) {
        out.length = 0
        encoder.encode(piece, new DataView(piece.buffer), 0, length, out)
        expect([...out.ids.subarray(0, out.length)]).toEqual(expected)
      }
    }
  }
})
