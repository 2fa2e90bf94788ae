import { appendFile, rename, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import fc from 'fast-check'
import { afterEach, describe, expect, test } from 'vitest'
import { removeTemporaryFolders, temporaryFolder } from '../test-model.ts'
import { LineIndex } from './line-index.ts'
import { WatchedLog } from './watched-log.ts'

afterEach(removeTemporaryFolders)

interface Line {
  readonly step: number
  readonly value: number
}

/** Lines of a log in which steps may be repeated. */
const logs = fc
  .array(fc.record({ step: fc.integer({ min: 0, max: 60 }), forward: fc.nat(9), text: fc.nat(5) }), { maxLength: 120 })
  .map(parts => {
    let last = 0
    return parts.map(({ step, forward, text }, value) => {
      last = forward === 0 ? step : last + forward
      return { step: last, value, text: 'x'.repeat(text * text) }
    })
  })

/** The lines that count: a later line replaces those of its own and later steps. */
function countingLines<L extends Line>(lines: readonly L[]): L[] {
  const kept: L[] = []
  for (const line of lines) {
    while ((kept.at(-1)?.step ?? -1) >= line.step) kept.pop()
    kept.push(line)
  }
  return kept
}

describe('the index', () => {
  const ranges = fc.record({
    from: fc.integer({ min: -2, max: 600 }),
    width: fc.nat(300),
    blocks: fc.integer({ min: 1, max: 9 }),
  })

  test('returns, for any range of steps, a byte range of complete lines that contains all lines that count', () => {
    fc.assert(
      fc.property(logs, ranges, (lines, { from, width, blocks }) => {
        const index = new LineIndex(blocks)
        const ends: number[] = []
        let end = 0
        for (const line of lines) {
          const at = end
          end += JSON.stringify(line).length + 1
          ends.push(end)
          index.push(line.step, at, end)
        }
        const kept = countingLines(lines)
        expect(index.span).toEqual(kept.length === 0 ? null : { first: kept[0].step, last: kept.at(-1)?.step })
        const range = index.between(from, from + width)
        if (range.to > 0) expect(ends).toContain(range.to)
        expect([0, ...ends]).toContain(range.from)
        for (const { step, value } of kept) {
          if (step < from || step > from + width) continue
          expect(value === 0 ? 0 : ends[value - 1]).toBeGreaterThanOrEqual(range.from)
          expect(ends[value]).toBeLessThanOrEqual(range.to)
        }
        const most = 1 + (width % 7)
        const spread = index.spread(from, from + width, most)
        expect(spread.length).toBeLessThanOrEqual(most)
        for (const step of spread) expect(kept.map(line => line.step)).toContain(step)
      }),
    )
  })

  test('has a bounded number of blocks, and a short range has few bytes', () => {
    const index = new LineIndex(100)
    const count = 1_000_000
    for (let i = 0; i < count; i++) index.push(i, 10 * i, 10 * i + 10)
    expect(index.spread(0, count, count).length).toBeLessThanOrEqual(200)
    const { from, to } = index.between(500_000, 500_010)
    // A block is at most a hundredth of the file.
    expect(to - from).toBeLessThanOrEqual((2 * 10 * count) / 100)
  })
})

async function watched(lines: readonly object[], blocks?: number) {
  const path = join(await temporaryFolder(), 'log.jsonl')
  await writeFile(path, lines.map(line => `${JSON.stringify(line)}\n`).join(''))
  const log = new WatchedLog(path, blocks)
  const refresh = async () => {
    const seen: Line[] = []
    let resets = 0
    const line = (fields: object) => seen.push(fields as Line)
    while (await log.refresh(line, () => resets++));
    return { seen, resets }
  }
  return { path, log, refresh }
}

describe('lines that are read again', () => {
  const blockCounts = fc.constantFrom(1, 3, 1000)

  test('are those that count', async () => {
    await fc.assert(
      fc.asyncProperty(
        logs,
        fc.integer({ min: 0, max: 300 }),
        fc.nat(200),
        blockCounts,
        async (lines, from, width, blocks) => {
          const { log, refresh } = await watched(lines, blocks)
          expect((await refresh()).seen).toEqual(lines)
          const kept = countingLines(lines)
          let read: Line[] = []
          await log.between(
            from,
            from + width,
            line => {
              while ((read.at(-1)?.step ?? -1) >= line.step) read.pop()
              read.push(line as unknown as Line)
            },
            () => {
              read = []
            },
          )
          expect(read).toEqual(kept.filter(({ step }) => step >= from && step <= from + width))
          expect(await log.at(from)).toEqual(kept.find(({ step }) => step >= from) ?? kept.at(-1))
          const spread = await log.spread(from, from + width, 1000)
          if (blocks > lines.length) expect(spread).toEqual(read)
          for (const line of spread) expect(read).toContainEqual(line)
          expect((await log.spread(from, from + width, 3)).at(-1)).toEqual(spread.at(-1))
        },
      ),
      { numRuns: 150 },
    )
  })

  test('never come from a log that was replaced or removed', async () => {
    const { path, log, refresh } = await watched([{ step: 1 }, { step: 2 }])
    await refresh()
    await appendFile(path, 'no line\n{"step":"3"}\n{"step":3,"nll"')
    expect((await refresh()).seen).toEqual([])
    expect(log.badLines).toBe(2)
    await writeFile(`${path}.tmp`, '{"step":1,"other":1}\n')
    await rename(`${path}.tmp`, path)
    // Before the next refresh.
    await log.at(2)
    expect(await refresh()).toEqual({ seen: [{ step: 1, other: 1 }], resets: 1 })
    expect(await log.at(2)).toEqual({ step: 1, other: 1 })
    expect(log.badLines).toBe(0)
    await rm(path)
    expect(await log.at(2)).toBe(undefined)
    expect(await refresh()).toEqual({ seen: [], resets: 1 })
    expect([log.span, await log.at(2), await log.spread(0, 9, 9)]).toEqual([null, undefined, []])
  })
})
