import type { MoeError } from '@moe/core'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import {
  type Action,
  checkSchedule,
  drawSchedule,
  dualPipe,
  dualPipeV,
  interleaved,
  oneForwardOneBackward,
  type PipelineSchedule,
  partsOf,
  simulate,
  stagesOf,
  zeroBubbleH1,
  zeroBubbleH2,
  zeroBubbleV,
} from '../index.ts'
import { dualPipePhases } from './dual-pipe.ts'

const bubbles = (schedule: PipelineSchedule, durations = {}) =>
  simulate(schedule, durations).ranks.map(rank => rank.bubble)
const largest = (values: readonly number[]) => Math.max(...values)
const ranksOf = fc.integer({ min: 1, max: 10 })
const halves = fc.integer({ min: 1, max: 6 })
const extra = fc.integer({ min: 0, max: 12 })
/** Multiples of 1/4, so that sums are exact. */
const quarters = (min: number, max: number) => fc.integer({ min: 4 * min, max: 4 * max }).map(n => n / 4)

/** All kinds of schedules, with valid sizes. */
const anySchedule = fc.oneof(
  fc.tuple(ranksOf, extra).map(([p, m]) => oneForwardOneBackward(p, m + 1)),
  fc.tuple(halves, halves, fc.integer({ min: 1, max: 4 })).map(([p, k, v]) => interleaved(p, p * k, v)),
  fc.tuple(ranksOf, extra).map(([p, m]) => zeroBubbleH1(p, m + 1)),
  fc.tuple(ranksOf, extra).map(([p, m]) => zeroBubbleH2(p, 2 * p - 1 + m)),
  fc.tuple(ranksOf, extra).map(([p, m]) => zeroBubbleV(p, 2 * p - 1 + m)),
  fc.tuple(halves, extra).map(([h, m]) => dualPipe(2 * h, 4 * h + 2 * m)),
  fc.tuple(ranksOf, extra).map(([p, m]) => dualPipeV(p, 2 * p + m)),
)

test('bubbles of 1F1B, ZB-H1 and DualPipe for F = 1, B = 2, W = 1, F&B = 3', () => {
  const rows = [4, 8, 16].map(p =>
    [oneForwardOneBackward(p, 4 * p), zeroBubbleH1(p, 4 * p), dualPipe(p, 4 * p)].map(s => new Set(bubbles(s))),
  )
  expect(rows.map(row => row.map(ranks => [...ranks]))).toEqual([
    [[9], [3], [2]],
    [[21], [7], [6]],
    [[45], [15], [14]],
  ])
})

test("parameters and activations per rank are those of the table in DualPipe's README", () => {
  const column = (schedule: PipelineSchedule, name: 'stages' | 'held') =>
    largest(simulate(schedule).ranks.map(r => r[name]))
  for (const p of [2, 4, 8, 16]) {
    const schedules = [
      oneForwardOneBackward(p, 4 * p),
      zeroBubbleH1(p, 4 * p),
      dualPipe(p, 4 * p),
      dualPipeV(p / 2, 2 * p),
    ]
    expect(schedules.map(schedule => column(schedule, 'stages'))).toEqual([1, 1, 2, 2])
    expect(schedules.map(schedule => column(schedule, 'held'))).toEqual([p, p, p + 1, p + 1])
    expect(schedules.map(({ stages, ranks }) => [stages, ranks.length])).toEqual([
      [p, p],
      [p, p],
      [p, p],
      [p, p / 2],
    ])
  }
})

test('1F1B has a bubble of (p - 1)(F + B) for any durations, and activations of p - r micro-batches', () => {
  fc.assert(
    fc.property(ranksOf, extra, quarters(0, 5), quarters(0, 5), (p, m, forward, backward) => {
      const { ranks } = simulate(oneForwardOneBackward(p, p + m), { forward, backward })
      expect(ranks.map(({ bubble }) => bubble)).toEqual(ranks.map(() => (p - 1) * (forward + backward)))
      expect(ranks.map(({ activations }) => activations)).toEqual(ranks.map((_, r) => p - r))
    }),
  )
})

test('interleaved 1F1B has the bubble of 1F1B, in passes of its smaller stages', () => {
  fc.assert(
    fc.property(halves, halves, fc.integer({ min: 1, max: 4 }), (p, k, v) => {
      const schedule = interleaved(p, p * k, v)
      expect(largest(bubbles(schedule))).toBe(3 * (p - 1))
      expect(stagesOf(schedule, p - 1)).toEqual(Array.from({ length: v }, (_, i) => i * p + p - 1))
    }),
  )
})

test('ZB-H1 has a bubble of (p - 1)(F + B - 2W) if W is at most F and I, and the memory of 1F1B', () => {
  const durations = fc.record({ weight: quarters(0, 2), f: quarters(0, 2), i: quarters(0, 2) })
  fc.assert(
    fc.property(ranksOf, extra, durations, (p, m, { weight, f, i }) => {
      const times = { forward: weight + f, backward: 2 * weight + i, backwardWeight: weight }
      const { ranks } = simulate(zeroBubbleH1(p, 2 * p + m), times)
      const bubble = (p - 1) * (times.forward + times.backward - 2 * weight)
      expect(largest(ranks.map(rank => rank.bubble))).toBe(bubble)
      expect(ranks.map(({ held }) => held)).toEqual(ranks.map(() => p))
    }),
  )
})

test('with ZB-H2 and ZB-V, no rank waits between its first and its last action if F = I = W', () => {
  fc.assert(
    fc.property(ranksOf, extra, (p, m) => {
      const h2 = simulate(zeroBubbleH2(p, 2 * p - 1 + m)).ranks
      expect(h2.map(({ idle, held }) => [idle, held])).toEqual(h2.map(() => [0, 2 * p - 1]))
      // Each rank has two stages of half the size, so 2p of them take the memory of p with 1F1B.
      const v = simulate(zeroBubbleV(p, 2 * p + m)).ranks
      expect(v.map(({ idle, held, stages }) => [idle, held, stages])).toEqual(v.map(() => [0, 2 * p, 2]))
    }),
  )
})

test('DualPipe and DualPipeV have a bubble of (p/2 - 1)(F&B + B - 3W) if F = I = W, for any gain by overlapping', () => {
  fc.assert(
    fc.property(halves, extra, quarters(2, 3), (h, m, overlapped) => {
      const bubble = (h - 1) * (overlapped + 2 - 3)
      const [both, half] = [dualPipe(2 * h, 4 * h + 2 * m), dualPipeV(h, 2 * h + m)].map(s =>
        simulate(s, { overlapped }),
      )
      expect(largest(both.ranks.map(rank => rank.bubble))).toBe(bubble)
      expect(half.makespan).toBe(both.makespan)
      expect(both.ranks.map(({ held }) => held)).toEqual(both.ranks.map(() => 2 * h + 1))
    }),
  )
})

test('the eight phases of DualPipe have the counts of dualpipe.py', () => {
  fc.assert(
    fc.property(halves, extra, fc.nat(), (h, m, at) => {
      const r = at % h
      const n = 4 * h + 2 * m
      const phases = dualPipePhases(r, h, n / 2, (stage, microBatch) => ({ stage, microBatch }))
      const shape = (actions: Action[]) =>
        actions.map(action => {
          const [first, second] = partsOf(action)
          const letter = { forward: 'F', backward: 'B', backwardInput: 'I', backwardWeight: 'W' }[first.kind]
          if (first.kind === 'backwardWeight') return 'W'
          return second ? `F${first.stage}B${second.stage}` : `${letter}${first.stage}`
        })
      const times = (count: number, text: string) => Array.from({ length: count }, () => text.split(' ')).flat()
      const [first, second, third, fourth, fifth, sixth, seventh, eighth] = phases.map(shape)
      expect(first).toEqual(times(2 * (h - r - 1), 'F0'))
      expect(second).toEqual(times(r + 1, 'F0 F1'))
      expect(third).toEqual(times(h - r - 1, 'I1 W F1'))
      const main = times(n / 2 - 2 * h + r + 1, 'F0B1 F1B0')
      expect(fourth).toEqual(r === h - 1 ? ['F0', 'B1', ...main.slice(1)] : main)
      expect(fifth).toEqual(times(h - r - 1, 'B1 F1B0'))
      expect(sixth.map(name => name.slice(1))).toEqual(times(r + 1, '1 0'))
      expect(sixth.map(name => name[0])).toEqual([...times(r + 1, 'B'), ...times(r + 1, 'I')])
      expect(seventh).toEqual(times(h - r - 1, 'W I0'))
      expect(eighth).toEqual(times(r + 1, 'W'))
    }),
  )
})

test('every schedule contains each pass once, without deadlock, in the same order for each stage, and its times add up', () => {
  fc.assert(
    fc.property(anySchedule, quarters(0, 3), quarters(1, 3), (schedule, communication, forward) => {
      checkSchedule(schedule)
      const passes = schedule.ranks.flat().flatMap(partsOf)
      expect(passes.filter(({ kind }) => kind === 'forward').length).toBe(schedule.stages * schedule.microBatches)
      for (const [rank, actions] of schedule.ranks.entries()) {
        for (const stage of stagesOf(schedule, rank)) {
          const of = (kinds: string[]) =>
            actions
              .flatMap(partsOf)
              .filter(part => part.stage === stage && kinds.includes(part.kind))
              .map(({ microBatch }) => microBatch)
          expect(of(['backward', 'backwardInput'])).toEqual(of(['forward']))
          expect(of(['backwardWeight'])).toEqual(of(['backwardInput']))
        }
      }
      const { ranks, makespan } = simulate(schedule, { forward, backward: 2, communication })
      const load = (rank: number) => stagesOf(schedule, rank).length * schedule.microBatches * (forward + 2)
      const shared = schedule.name === 'DualPipe' ? 0.5 : 1
      for (const [rank, { busy, bubble, idle, timeline }] of ranks.entries()) {
        expect(busy).toBe(load(rank) * shared)
        expect(busy + bubble).toBe(makespan)
        expect(idle).toBeGreaterThanOrEqual(0)
        expect(timeline.slice(1).every(({ start }, i) => start >= timeline[i].end)).toBe(true)
      }
      // Communication time never shortens a schedule.
      expect(makespan).toBeGreaterThanOrEqual(simulate(schedule, { forward, backward: 2 }).makespan)
    }),
  )
})

test('communication takes time between ranks, but not between the two stages of the last rank of DualPipeV', () => {
  const { ranks } = simulate(dualPipeV(2, 4), { communication: 10 })
  const timed = ranks.flatMap(({ timeline }) => timeline)
  const starts = [0, 1, 2, 3].map(stage => {
    const first = timed.find(({ action }) => action.kind === 'forward' && action.stage === stage)
    return first?.start
  })
  expect(starts).toEqual([0, 11, 12, 23])
})

const pass = (kind: Action['kind'], stage: number, microBatch = 0) => ({ kind, stage, microBatch }) as Action
const scheduleOf = (...ranks: Action[][]): PipelineSchedule => ({ name: 'mine', stages: 2, microBatches: 1, ranks })
const errorOf = (schedule: PipelineSchedule) => {
  try {
    checkSchedule(schedule)
  } catch (error) {
    return (error as MoeError).message
  }
  return 'none'
}

test('checkSchedule finds missing, duplicate, misplaced and out-of-range passes', () => {
  const down = [pass('forward', 0), pass('backward', 0)]
  const up = [pass('forward', 1), pass('backward', 1)]
  expect(errorOf(scheduleOf(down, up))).toBe('none')
  expect(errorOf(scheduleOf(down, []))).toMatch(/missing forward of stage 1, micro-batch 0/)
  expect(errorOf(scheduleOf(down, [pass('forward', 1)]))).toMatch(/missing backward of stage 1, micro-batch 0/)
  expect(errorOf(scheduleOf([...down, ...down], up))).toMatch(/rank 0: duplicate forward of stage 0, micro-batch 0/)
  expect(errorOf(scheduleOf(down, [...up, pass('backwardInput', 1)]))).toMatch(/duplicate backwardInput of stage 1/)
  expect(errorOf(scheduleOf(down, [pass('forward', 1), pass('backwardInput', 1), pass('backward', 1)]))).toMatch(
    /duplicate backward of stage 1/,
  )
  expect(errorOf(scheduleOf([pass('backward', 0), pass('forward', 0)], up))).toMatch(
    /backward of stage 0.* without forward/,
  )
  expect(errorOf(scheduleOf([pass('forward', 0)], [...up, pass('backward', 0)]))).toMatch(
    /rank 1: backward of stage 0.* on this rank/,
  )
  expect(errorOf(scheduleOf([pass('forward', 0), pass('backwardInput', 0)], up))).toMatch(
    /missing backwardWeight of stage 0, micro-batch 0/,
  )
  expect(errorOf(scheduleOf([pass('forward', 0), pass('backwardWeight', 0)], up))).toMatch(/without backwardInput/)
  expect(errorOf(scheduleOf(down, [...up, pass('forward', 2)]))).toMatch(
    /stage 2, micro-batch 0 is out of range for 2 stages/,
  )
})

test('checkSchedule finds the two passes of one micro-batch in an overlapped pair', () => {
  const first = { stage: 0, microBatch: 0 }
  const ranks = [[{ kind: 'overlapped', forward: first, backward: first }]] as const
  expect(() => checkSchedule({ name: 'own', stages: 1, microBatches: 1, ranks })).toThrow(
    /rank 0: F0\.0\+B0\.0 overlaps the two passes of one micro-batch/,
  )
})

test('checkSchedule lists deadlocked ranks and what they wait for', () => {
  const twice = { ...scheduleOf(), microBatches: 2 }
  const first = [pass('forward', 0, 0), pass('backward', 0, 0), pass('forward', 0, 1), pass('backward', 0, 1)]
  const second = [pass('forward', 1, 1), pass('backward', 1, 1), pass('forward', 1, 0), pass('backward', 1, 0)]
  const message = errorOf({ ...twice, ranks: [first, second] })
  expect(message).toMatch(/rank 0 waits in B0\.0 for the gradient of stage 1, micro-batch 0/)
  expect(message).toMatch(/rank 1 waits in F1\.1 for the forward of stage 0, micro-batch 1/)
})

test('invalid sizes and durations are errors', () => {
  expect(() => dualPipe(5, 9)).toThrow(
    /ranks is 5, needs an even number; microBatches is 9, needs an even number; .*needs at least 2 \* ranks = 10/,
  )
  expect(() => dualPipeV(4, 7)).toThrow(/microBatches is 7, needs at least 2 \* ranks = 8/)
  expect(() => zeroBubbleV(4, 6)).toThrow(/needs at least 2 \* ranks - 1 = 7/)
  checkSchedule(zeroBubbleV(4, 7))
  expect(() => zeroBubbleH2(4, 6)).toThrow(/needs at least 2 \* ranks - 1 = 7/)
  expect(() => interleaved(4, 6, 2)).toThrow(/microBatches is 6, needs a multiple of ranks = 4/)
  expect(() => oneForwardOneBackward(0, 1.5)).toThrow(/ranks is 0, .*microBatches is 1\.5/)
  expect(() => simulate(oneForwardOneBackward(2, 2), { forward: -1, communication: Number.NaN })).toThrow(
    /forward is -1, communication is NaN/,
  )
  expect(() => simulate(oneForwardOneBackward(2, 2), { communication: -1 })).toThrow(/communication is -1/)
  expect(() => simulate(oneForwardOneBackward(2, 2), { backwardWeight: 3 })).toThrow(/longer than backward = 2/)
})

test('drawSchedule draws one line per rank', () => {
  expect(drawSchedule(simulate(zeroBubbleH1(2, 3)))).toBe(
    ['0 F0|F1|...I0|W0|F2|I1|W1|I2|W2|', '1 ...F0|I0|F1|I1|W0|F2|I2|W1|W2|'].join('\n'),
  )
  expect(drawSchedule(simulate(dualPipeV(1, 2), { overlapped: 2 }), { columns: 4 })).toBe(
    "0 F0-|F0'|F1-|B0'----|F1'B0--|B1'----|I1-|W1-|",
  )
  expect(drawSchedule(simulate(oneForwardOneBackward(1, 1)), { columns: 1 })).toBe('0 FB|')
})
