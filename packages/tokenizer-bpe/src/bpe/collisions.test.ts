/** @file Vocabularies whose pairs or tokens collide in the hash tables if their hashes have no random seed. */
import { expect, test } from 'vitest'
import { randomNumbers } from '../data/random.ts'
import { MergeTable, NO_RANK } from './merge-table.ts'
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
