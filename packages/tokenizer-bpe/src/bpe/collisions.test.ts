/** @file Vocabularies and texts whose pairs, tokens or pieces collide in the hash tables if their hashes have no random seed. */
import { expect, test } from 'vitest'
import { randomNumbers } from '../data/random.ts'
import { PieceCounter } from '../train/piece-counter.ts'
import { PADDING } from './encoder.ts'
import { hashLong } from './long-piece-cache.ts'
import { MergeTable, NO_RANK } from './merge-table.ts'
import { hashKey } from './piece-cache.ts'
import { TokenLookup } from './token-lookup.ts'

test('merges whose pairs would collide are found in linear time', () => {
  const ranks = 100_000
  const bits = Math.ceil(Math.log2(ranks * 2))
  const slotOf = (id: number, factor: number) => Math.imul(id, factor) >>> (32 - bits)
  // A right token for each slot, so that all pairs have the same one.
  const rightAt = new Int32Array(1 << bits).fill(-1)
  for (let right = 0; right < 1 << 20; right++) rightAt[slotOf(right, 0x85ebca6b)] = right
  const merges: number[] = []
  for (let left = 0; merges.length < 3 * ranks; left++) {
    const right = rightAt[slotOf(left, 0x9e3779b1)]
    if (right >= 0) merges.push(left, right, left)
  }
  const table = MergeTable.of(Int32Array.from(merges), new Int32Array(256).fill(-1), 1 << 20)
  for (let rank = 0; rank < ranks; rank++) expect(table.rank(merges[3 * rank], merges[3 * rank + 1])).toBe(rank)
  expect(table.rank(1 << 21, 1)).toBe(NO_RANK)
})

test('tokens whose bytes would collide are found in linear time', () => {
  const blocks = 18
  const width = 4
  const random = randomNumbers(3)
  const step = (h: number, byte: number) => Math.imul(h ^ byte, 0x01000193) + (h >>> 15)
  // Two blocks that lead to the same state, one after another: 2^18 tokens with the same hash.
  const pairs: (readonly [number[], number[]])[] = []
  let state = Math.imul(width * blocks, 0x9e3779b1)
  while (pairs.length < blocks) {
    const seen = new Map<number, number[]>()
    while (true) {
      const block = Array.from({ length: width }, () => Math.floor(random() * 256))
      const next = block.reduce(step, state) | 0
      const other = seen.get(next)
      seen.set(next, block)
      if (other === undefined || `${other}` === `${block}`) continue
      pairs.push([other, block])
      state = next
      break
    }
  }
  const count = 1 << blocks
  const bytes = new Uint8Array(count * blocks * width)
  for (let block = 0; block < count * blocks; block++) {
    const at = block % blocks
    bytes.set(pairs[at][(Math.floor(block / blocks) >> at) & 1], block * width)
  }
  const lengths = new Int32Array(count).fill(blocks * width)
  const starts = Int32Array.from(lengths, (length, id) => id * length)
  const lookup = new TokenLookup(bytes, starts, lengths)
  for (const id of [0, 1, 77_777, count - 1])
    expect(lookup.find(bytes, starts[id], starts[id] + blocks * width)).toBe(id)
})

test.each([
  ['short', 16],
  ['long', 20],
])('%s pieces that would collide are counted in linear time', (_, width) => {
  const pieces = 1 << 18
  const text = new Uint8Array(pieces * width + PADDING)
  const view = new DataView(text.buffer)
  // The last word of each piece cancels the hash of the others.
  for (let i = 0; i < pieces; i++) {
    let h = Math.imul(width === 16 ? i ^ 16 : 20, 0x9e3779b1)
    if (width === 16) {
      h = Math.imul(h ^ (h >>> 15), 0x85ebca6b)
      h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35)
      h = -(h ^ (h >>> 16))
    } else {
      for (const word of [i, 0, 0, 0]) {
        h = Math.imul(h ^ word, 0x85ebca6b)
        h ^= h >>> 15
      }
    }
    view.setInt32(i * width, i, true)
    view.setInt32((i + 1) * width - 4, h, true)
  }
  const unseeded = (at: number) =>
    width === 16 ? hashKey(view.getInt32(at, true), 0, 0, view.getInt32(at + 12, true), 16) : hashLong(view, at, 20, 0)
  expect(unseeded(77_777 * width)).toBe(unseeded(0))

  const counter = new PieceCounter()
  const ends = Int32Array.from({ length: pieces }, (_, i) => (i + 1) * width)
  counter.add(text, view, 0, ends, pieces)
  counter.add(text, view, 0, ends, pieces)
  expect(counter.size).toBe(pieces)
  expect(counter.counts.subarray(0, pieces).every(count => count === 2)).toBe(true)
  expect(Buffer.compare(counter.bytes.subarray(0, pieces * width), text.subarray(0, -PADDING))).toBe(0)
})
