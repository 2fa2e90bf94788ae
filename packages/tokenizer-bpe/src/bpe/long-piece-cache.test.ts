import { expect, it } from 'vitest'
import { randomNumbers } from '../data/random.ts'
import { hashLong, LONG_KEY, LongPieceCache } from './long-piece-cache.ts'

it('a piece put twice is found with its tokens, until the cache is cleared', () => {
  const random = randomNumbers(7)
  const below = (n: number) => Math.floor(random() * n)
  const cache = new LongPieceCache()
  const find = (piece: Uint8Array, view: DataView) => {
    const at = cache.find(view, 0, piece.length, hashLong(view, 0, piece.length, 0))
    return at < 0 ? undefined : cache.pool.slice(at, at + cache.found)
  }
  // Enough words to fill the pool more than once.
  const count = 24_000
  const pieces = Array.from({ length: count }, (_, i) => {
    const bytes = new Uint8Array(256).map(() => 97 + below(3))
    const view = new DataView(bytes.buffer)
    view.setInt32(0, i)
    const piece = bytes.subarray(0, 17 + below(LONG_KEY - 16))
    return { piece, view, tokens: Int32Array.from({ length: 1 + below(piece.length) }, () => below(1 << 22)) }
  })
  let found = 0
  for (const [i, { piece, view, tokens }] of pieces.entries()) {
    expect(find(piece, view)).toBeUndefined()
    for (let time = 0; time < 2; time++)
      cache.put(view, 0, piece.length, hashLong(view, 0, piece.length, 0), tokens, 0, tokens.length)
    if (i % 8 !== 0) continue
    for (const known of [pieces[i], pieces[i >> 1], pieces[Math.max(0, i - 3)]]) {
      const cached = find(known.piece, known.view)
      if (cached === undefined) continue
      found++
      expect(cached).toEqual(known.tokens)
    }
  }
  expect(found / ((3 * count) / 8)).toBeGreaterThan(0.7)
  expect(cache.pool.length).toBe(1 << 21)
})
