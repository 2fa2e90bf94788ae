import type { SequenceCache } from '@moe/attention-mla'
import { type Backend, fromHost, keep, Random, setDefaultBackend } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { createBackend } from '@moe/kernels-cpu'
import { afterAll, beforeEach, describe, expect, test } from 'vitest'
import { Drafter, DraftMemory } from './drafter.ts'
import { DeepSeek } from './index.ts'
import { tiny } from './test-tiny.ts'

const reference = referenceBackend()
const native = await createBackend()
beforeEach(() => setDefaultBackend(reference))
afterAll(() => native.dispose())

const random = new Random(7)
const below = (n: number) => Math.floor(random.uniform(1)[0] * n)

/** Adds `ids` to the cache, the same number to each sequence. */
function extend(model: DeepSeek, cache: SequenceCache, ids: readonly number[]) {
  const shape = [cache.batch, ids.length / cache.batch]
  return keep(model.infer(() => model.hidden(fromHost(Int32Array.from(ids), shape, 'i32', model.backend), { cache })))
}

/** The drafts after tokens that are processed in one pass, with a new cache. */
async function draftsFromScratch(model: DeepSeek, depth: number, tokens: readonly number[]): Promise<number[]> {
  const cache = model.makeCache({ depth })
  const drafter = new Drafter(model, depth, 'f32')
  const memory = new DraftMemory()
  const hidden = extend(model, cache, tokens.slice(0, -1))
  const [drafts] = await drafter.draft(cache, hidden, [{ tokens, confirmed: tokens.length - 1, memory }])
  for (const each of [cache, drafter, hidden]) each.dispose()
  memory.forget()
  return drafts
}

describe.each([
  ['the reference backend', () => reference as Backend],
  ['a backend that records', () => native as Backend],
])('on %s', (_, of) => {
  test.each([1, 2, 4])(
    'gives the same drafts as from scratch, whichever drafts are confirmed, with %i modules',
    async depth => {
      const { handles } = of().stats()
      const model = new DeepSeek({ ...tiny, num_nextn_predict_layers: depth }, { seed: 3, backend: of() })
      const cache = model.makePagedCache({ tokens: 1024, pageSize: 8, depth })
      const drafter = new Drafter(model, depth, 'f32')
      const texts = [1, 9, 14, 5].map(prompt => ({
        tokens: Array.from({ length: 60 }, () => below(40)),
        prompt,
        sequence: cache.start([]),
        memory: new DraftMemory(),
      }))
      // Prompts, one text at a time, in pieces.
      for (const { tokens, prompt, sequence, memory } of texts) {
        for (let start = 0; start < prompt; start += 5) {
          const end = Math.min(prompt, start + 5)
          cache.reserve(sequence, end)
          const batch = cache.batch([sequence])
          const hidden = extend(model, batch, tokens.slice(start, end))
          const known = tokens.slice(0, end === prompt ? prompt + 1 : prompt)
          await drafter.draft(batch, hidden, [{ tokens: known, confirmed: end - start, memory }])
          hidden.dispose()
        }
      }
      const pass = async (batched: typeof texts) => {
        const before = batched.map(({ sequence }) => sequence.length)
        const confirmed = batched.map(() => 1 + below(depth + 1))
        const ids = batched.flatMap(({ tokens }, b) => {
          const certain = tokens.slice(before[b], before[b] + confirmed[b])
          return [...certain, ...Array.from({ length: depth + 1 - certain.length }, () => below(40))]
        })
        for (const [b, { sequence }] of batched.entries()) cache.reserve(sequence, before[b] + depth + 1)
        const batch = cache.batch(batched.map(({ sequence }) => sequence))
        const hidden = extend(model, batch, ids)
        const ends = before.map((length, b) => length + confirmed[b])
        batch.truncate(ends)
        const known = batched.map(({ tokens }, b) => tokens.slice(0, ends[b] + 1))
        const drafts = await drafter.draft(
          batch,
          hidden,
          batched.map(({ memory }, b) => ({ tokens: known[b], confirmed: confirmed[b], memory })),
        )
        hidden.dispose()
        expect(batched.map(({ sequence }) => sequence.length)).toEqual(ends)
        expect(drafts).toEqual(await Promise.all(known.map(tokens => draftsFromScratch(model, depth, tokens))))
      }
      for (let i = 0; i < 7; i++) {
        // One text is absent in some passes.
        const present = texts.filter((_, b) => b !== 3 || i % 3 > 0)
        const kinds = new Set(present.map(({ memory }) => memory.kind))
        for (const kind of kinds) await pass(present.filter(({ memory }) => memory.kind === kind))
      }
      for (const { memory } of texts) memory.forget()
      // Texts that share a prefix with another one, which ends around the end of a page.
      const [, { tokens: first, sequence }] = texts
      cache.share(sequence, first.slice(0, sequence.length + 1))
      for (const shared of [8, 9, 10, 12, 15]) {
        const tokens = [...first.slice(0, shared), ...first.slice(shared, 20).map(id => 39 - id)]
        const own = cache.start(tokens)
        expect(own.length).toBe(shared >= 8 + depth ? 8 : 0)
        cache.reserve(own, 19)
        const batch = cache.batch([own])
        const memory = new DraftMemory()
        const confirmed = 19 - own.length
        const hidden = extend(model, batch, tokens.slice(own.length, 19))
        const drafts = await drafter.draft(batch, hidden, [{ tokens, confirmed, memory }])
        expect(drafts).toEqual([await draftsFromScratch(model, depth, tokens)])
        hidden.dispose()
        memory.forget()
      }
      for (const each of [drafter, cache, model]) each.dispose()
      expect(of().stats().handles).toBe(handles)
    },
  )
})
