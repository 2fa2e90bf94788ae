import { expect, test } from 'vitest'
import { LoadMonitor, summarizeLoad } from './index.ts'

test('batch MaxVio is high and global MaxVio 0 if single steps are imbalanced but their sum is balanced', () => {
  const monitor = new LoadMonitor({ topK: 1, groups: 2 })
  monitor.record('1', [8, 0, 0, 0])
  monitor.record('1', [0, 8, 0, 0])
  monitor.record('1', [0, 0, 8, 0])
  monitor.record('1', [0, 0, 0, 8], [-0.25, 0, 0.5, 0])
  const [report] = monitor.report()
  expect(report).toMatchObject({
    layer: '1',
    steps: 4,
    total: 32,
    batchMaxVio: 3,
    global: { maxVio: 0, variation: 0, dead: [], hot: [] },
    groupShare: [0.5, 0.5],
    bias: { min: -0.25, max: 0.5 },
    verdict: 'balanced',
  })
  expect(report.effectiveExperts).toBeCloseTo(4, 10)
})

test('the verdict is collapsed, uneven or balanced', () => {
  const verdictOf = (load: number[], topK = 2) => {
    const monitor = new LoadMonitor({ topK })
    monitor.record('x', load)
    return monitor.verdict
  }
  expect(verdictOf([50, 50, 0, 0, 0, 0, 0, 0])).toBe('collapsed')
  expect(verdictOf([50, 49, 1, 0, 0, 0, 0, 0])).toBe('collapsed')
  expect(verdictOf([30, 30, 40, 0, 0, 0, 0, 0])).toBe('collapsed')
  expect(verdictOf([30, 10, 10, 10, 10, 10, 10, 10])).toBe('uneven')
  expect(verdictOf([11, 10, 9, 10, 11, 10, 9, 10])).toBe('balanced')
  // With nothing to choose or nothing counted, the verdict is balanced.
  expect(verdictOf([5, 5], 2)).toBe('balanced')
  expect(verdictOf([0, 0, 0, 0])).toBe('balanced')
})

test('the verdict is that of the worst layer, over the steps in the window', () => {
  const monitor = new LoadMonitor({ topK: 1, window: 2 })
  monitor.record('a', [5, 5, 5, 5])
  monitor.record('b', [20, 0, 0, 0])
  expect(monitor.verdict).toBe('collapsed')
  monitor.record('b', [5, 5, 5, 5])
  monitor.record('b', [5, 5, 5, 5])
  expect(monitor.verdict).toBe('balanced')
  expect(monitor.report().map(({ layer, steps }) => [layer, steps])).toEqual([
    ['a', 1],
    ['b', 2],
  ])
  monitor.reset()
  expect(monitor.report()).toEqual([])
})

test('loads that were not read from the device are rejected', () => {
  const unread = { shape: [4] } as unknown as number[]
  expect(() => summarizeLoad(unread)).toThrow(
    /summarizeLoad: the loads are not a list of numbers; read the loads first/,
  )
  expect(() => summarizeLoad(undefined as unknown as number[])).toThrow(/the loads are undefined/)
  for (const wrong of [
    [1, Number.NaN],
    [1, -1],
    [1, '2'],
    [1, undefined],
  ] as number[][])
    expect(() => summarizeLoad(wrong)).toThrow(/the load of expert 1 is/)
  expect(() => summarizeLoad('12' as never)).toThrow(/the loads are not a list/)
  expect(() => new LoadMonitor({ topK: 2 }).record('1', unread)).toThrow(/LoadMonitor.record: the loads are not a list/)
})

test('invalid windows, groups and numbers of experts are rejected', () => {
  expect(() => new LoadMonitor({ topK: 2, window: 0 })).toThrow(/window = 0 is not a positive integer/)
  expect(() => new LoadMonitor({ topK: 0 })).toThrow(/topK = 0 is not a positive integer/)
  expect(() => new LoadMonitor({ topK: 2, groups: 1.5 })).toThrow(expect.objectContaining({ code: 'E_CONFIG' }))
  const monitor = new LoadMonitor({ topK: 2, groups: 2 })
  monitor.record('1', [1, 2, 3, 4])
  expect(() => monitor.record('1', [1, 2])).toThrow(/"1" had 4 experts before, now 2/)
  expect(() => monitor.record('2', [1, 2, 3])).toThrow(/the 3 experts of "2" are not divisible by 2 groups/)
  expect(monitor.report()).toMatchObject([{ layer: '1', steps: 1 }])
})
