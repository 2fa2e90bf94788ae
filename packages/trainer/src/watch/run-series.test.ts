import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { RunSeries, type SeriesPatch } from './run-series.ts'

/** Integers whose sums are exact and fit into seven digits, so that points can be compared exactly. */
const value = fc.integer({ min: -500, max: 500 })

const column = (patch: SeriesPatch, name: string) => patch.columns.find(one => one.name === name)!

/** Consecutive lines in groups of `size`. */
function chunks<T>(lines: readonly T[], size: number): T[][] {
  return Array.from({ length: Math.ceil(lines.length / size) }, (_, i) => lines.slice(i * size, (i + 1) * size))
}

const toSevenDigits = (number: number) => Number(number.toPrecision(7))

describe('reduction', () => {
  test('bounds the number of points, each with mean, minimum and maximum of its lines, and keeps first and last step', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 2, max: 9 }),
        fc.array(fc.record({ gap: fc.integer({ min: 1, max: 7 }), nll: value }), { minLength: 1, maxLength: 300 }),
        (points, lines) => {
          const series = new RunSeries(points)
          let step = 0
          const steps = lines.map(({ gap }) => {
            step += gap
            return step
          })
          lines.forEach(({ nll }, i) => {
            series.push(steps[i], { step: steps[i], nll })
          })
          const patch = series.patch()
          const expected = chunks(
            lines.map(({ nll }) => nll),
            patch.linesPerPoint,
          )
          expect(patch.steps.length).toBe(expected.length)
          expect(patch.steps.length).toBeLessThanOrEqual(2 * points)
          if (lines.length >= points) expect(patch.steps.length).toBeGreaterThanOrEqual(points)
          const { mean, min = mean, max = mean } = column(patch, 'nll')
          expect(mean).toEqual(expected.map(part => toSevenDigits(part.reduce((a, b) => a + b) / part.length)))
          expect(min).toEqual(expected.map(part => Math.min(...part)))
          expect(max).toEqual(expected.map(part => Math.max(...part)))
          expect(patch.steps[patch.steps.length - 1]).toBe(steps[steps.length - 1])
          if (patch.steps.length > 1) expect(patch.steps[0]).toBe(steps[0])
          for (const [i, part] of chunks(steps, patch.linesPerPoint).entries()) {
            expect(patch.steps[i]).toBeGreaterThanOrEqual(part[0])
            expect(patch.steps[i]).toBeLessThanOrEqual(part[part.length - 1])
          }
        },
      ),
    )
  })

  test('values that a line does not have are null, not zero', () => {
    const series = new RunSeries(2)
    series.push(1, { nll: 4 })
    series.push(2, { nll: 2, maxVio: 1, note: 'text', mtp: null })
    expect(series.patch().columns).toEqual([
      { name: 'nll', mean: [4, 2] },
      { name: 'maxVio', mean: [null, 1] },
    ])
    for (let step = 3; step <= 5; step++) series.push(step, { nll: 0 })
    expect(series.patch().columns).toEqual([
      { name: 'nll', mean: [3, 0, 0], min: [2, 0, 0], max: [4, 0, 0] },
      { name: 'maxVio', mean: [1, null, null], min: [1, null, null], max: [1, null, null] },
    ])
  })

  test('bounds the number of columns', () => {
    const series = new RunSeries(4)
    for (let step = 0; step < 100; step++) series.push(step, { nll: 1, [`name${step}`]: 1 })
    expect(series.patch().columns.length).toBe(64)
  })
})

describe('repeated steps', () => {
  const pushes = fc.array(fc.record({ step: fc.integer({ min: 0, max: 40 }), nll: value }), { minLength: 1 })

  test('replace the earlier line of the step and of all later steps', () => {
    fc.assert(
      fc.property(pushes, lines => {
        const series = new RunSeries(1000)
        let kept: typeof lines = []
        for (const line of lines) {
          series.push(line.step, line)
          kept = [...kept.filter(({ step }) => step < line.step), line]
        }
        const patch = series.patch()
        expect(patch.steps).toEqual(kept.map(({ step }) => step))
        expect(column(patch, 'nll').mean).toEqual(kept.map(({ nll }) => nll))
      }),
    )
  })

  test('leave no replaced line in a point', () => {
    fc.assert(
      fc.property(pushes, lines => {
        const series = new RunSeries(2)
        let kept = new Set<number>()
        lines.forEach(({ step }, i) => {
          series.push(step, { line: i })
          kept = new Set([...kept].filter(other => lines[other].step < step).concat(i))
        })
        const patch = series.patch()
        const { mean, min = mean, max = mean } = column(patch, 'line')
        for (const shown of [...min, ...max]) expect(kept).toContain(shown)
        expect(max[max.length - 1]).toBe(lines.length - 1)
        for (let i = 1; i < patch.steps.length; i++) expect(patch.steps[i]).toBeGreaterThan(patch.steps[i - 1])
      }),
    )
  })
})

test('a client that applies patches has the same series as a new client', () => {
  const pushes = fc.array(
    fc.record({ step: fc.integer({ min: 0, max: 60 }), forward: fc.boolean(), nll: value, read: fc.boolean() }),
    { minLength: 1, maxLength: 200 },
  )
  fc.assert(
    fc.property(fc.integer({ min: 1, max: 20 }), pushes, (points, lines) => {
      const series = new RunSeries(points)
      let mark: RunSeries['mark'] | undefined
      let steps: number[] = []
      let mean: Array<number | null> = []
      let last = 0
      for (const { step, forward, nll, read } of [...lines, { step: 1, forward: true, nll: 0, read: true }]) {
        last = forward ? last + 1 + (step % 3) : step
        series.push(last, { nll })
        if (!read) continue
        const patch = series.patch(mark)
        mark = series.mark
        steps = [...steps.slice(0, patch.from), ...patch.steps]
        mean = [...mean.slice(0, patch.from), ...column(patch, 'nll').mean]
      }
      expect(steps).toEqual(series.patch().steps)
      expect(mean).toEqual(column(series.patch(), 'nll').mean)
    }),
  )
})
