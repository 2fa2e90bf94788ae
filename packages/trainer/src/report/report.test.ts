import { existsSync, ftruncateSync, openSync, writeSync } from 'node:fs'
import { mkdir, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { stripVTControlCharacters } from 'node:util'
import { afterEach, describe, expect, test, vi } from 'vitest'
import type { StartEvent, StepEvent } from '../events.ts'
import { removeTemporaryFolders, temporaryFolder } from '../test-model.ts'
import { eventsLog } from './events-log.ts'
import { LogFile } from './log-file.ts'
import { type MetricsLine, metricsLine, readMetrics } from './metrics-log.ts'
import { type ProgressOptions, progress } from './progress.ts'
import { RecentMetrics } from './recent-metrics.ts'
import { writeSummary } from './summary.ts'

vi.mock('node:fs', { spy: true })
afterEach(removeTemporaryFolders)

const start: StartEvent = {
  type: 'start',
  backend: 'kernels-cpu',
  device: 'EPYC',
  precision: 'bf16',
  parameters: 12_500_000,
  steps: 40,
  fromStep: 0,
  fromTokens: 0,
  tokensPerStep: 2048,
  tokens: 40 * 2048,
  trainingTokens: 2_100_000,
  validationTokens: 9000,
  epochs: 0.04,
  out: undefined,
  rank: 0,
  settings: { lr: 1e-3, optimizer: 'muon' },
}

const step = (number: number): StepEvent => ({
  type: 'step',
  step: number,
  loss: 4.5,
  nll: 4.25,
  lr: 1e-3,
  gradNorm: 0.7,
  tokens: 2048 * number,
  tokensPerSecond: 1024,
  metrics: { maxVio: 0.256, mtp: 5 },
})

describe('progress', () => {
  function shown(
    options: Omit<ProgressOptions, 'stream'> & { isTTY?: boolean; columns?: number },
    steps = [1, 2, 3, 39, 40],
  ) {
    let text = ''
    const { isTTY, columns, ...rest } = options
    const listen = progress({ ...rest, stream: { write: part => (text += part), isTTY, columns } })
    listen(start)
    for (const number of steps) listen(step(number))
    return { text, listen, all: () => text }
  }

  test('writes a plain line every N steps without a terminal', () => {
    const { text } = shown({ every: 3 })
    expect(text.split('\n')).toEqual([
      '12.5M parameters on kernels-cpu (EPYC, bf16); 40 steps of 2,048 tokens, 0.0 epochs of 2.1M',
      'step  1/40  loss 4.250  1,024 tokens/s  MaxVio 0.26  ETA 1:18',
      'step  3/40  loss 4.250  1,024 tokens/s  MaxVio 0.26  ETA 1:14',
      'step 39/40  loss 4.250  1,024 tokens/s  MaxVio 0.26  ETA 0:02',
      'step 40/40  loss 4.250  1,024 tokens/s  MaxVio 0.26  ETA 0:00',
      '',
    ])
  })

  test('shows the tokens per step of the remaining steps', () => {
    const line = (event: Partial<StartEvent>) => {
      let text = ''
      progress({ stream: { write: part => (text += part) } })({ ...start, ...event })
      return text.slice(text.indexOf(';') + 2, text.indexOf(', 0.0 epochs'))
    }
    const resumed = { steps: 15, fromStep: 5, fromTokens: 5 * 1024, tokensPerStep: 256 }
    expect(line({ ...resumed, tokens: 5 * 1024 + 10 * 256 })).toBe('steps 6 to 15 of 256 tokens')
    expect(line({ ...resumed, tokens: 5 * 1024 + 10 * 300 })).toBe('steps 6 to 15 of on average 300 tokens')
    expect(line({ ...resumed, fromStep: 15, tokens: 5 * 1024 })).toBe('15 steps of 256 tokens')
    expect(line({ tokens: 40 * 3000 })).toBe('40 steps of on average 3,000 tokens')
  })

  test('redraws one line on a terminal at a limited rate, and clears it for other lines', () => {
    let clock = 0
    const { all, listen } = shown({ isTTY: true, columns: 120, color: false, now: () => (clock += 60) })
    // Draws are at least 100 ms apart, but the last line is always drawn.
    const draws = all().split('\r\x1b[2K')
    expect(draws.length).toBeLessThan(6)
    expect(draws.at(-1)).toBe(`${'━'.repeat(24)}  step 40/40  loss 4.250  1,024 tokens/s  MaxVio 0.26  ETA 0:00`)
    listen({ type: 'notice', message: 'hello' })
    expect(all().endsWith('\r\x1b[2Knote hello\n')).toBe(true)
  })

  test('shows the progress of an evaluation, without a terminal only if it takes long', () => {
    const linesOf = (isTTY: boolean) => {
      let clock = 0
      const { all, listen } = shown({ isTTY, columns: 120, color: false, now: () => clock }, [])
      for (let i = 1; i <= 100; i++) {
        clock += 250
        listen({ type: 'evaluating', step: 40, done: i / 100 })
      }
      return all()
        .split(/[\r\n]/)
        .filter(line => line.includes('evaluating'))
        .map(line => line.replace('\x1b[2K', ''))
    }
    expect(linesOf(false)).toEqual([40, 80].map(share => `step 40: evaluating, ${share} %`))
    expect(linesOf(true)).toHaveLength(100)
  })

  test('shows the evaluation of the weights, and of the EMA if there is one', () => {
    const { text, listen, all } = shown({ color: false }, [])
    const measured = { loss: 4, bitsPerByte: 1.5, tokens: 9000, seconds: 1 }
    const evaluation = { type: 'evaluation', step: 40, final: false, ...measured } as const
    listen(evaluation)
    listen({ ...evaluation, ema: { ...measured, loss: 3.5, bitsPerByte: 1.25 } })
    expect(all().slice(text.length).split('\n')).toEqual([
      'step 40: held-out loss 4.000, 1.500 bits per byte (9,000 tokens, 1.0 s)',
      'step 40: held-out loss 4.000, 1.500 bits per byte; EMA loss 3.500, 1.250 bits per byte (9,000 tokens, 2.0 s)',
      '',
    ])
  })

  test('keeps the last line when the run fails', () => {
    const { all, listen } = shown({ isTTY: true, columns: 120, color: false }, [40])
    listen({ type: 'fail', error: new Error('no') })
    expect(all().endsWith('ETA 0:00\n')).toBe(true)
  })

  test('never draws a line that wraps', () => {
    for (const columns of [1, 12, 30, 60, 80, 200]) {
      const last = shown({ isTTY: true, columns, color: true }, [40]).text.split('\r\x1b[2K').at(-1) ?? ''
      const line = stripVTControlCharacters(last.split('\n').at(-1) ?? '')
      expect(line.length).toBeLessThan(Math.max(2, columns))
    }
  })

  test('has colors on a terminal unless they are disabled', () => {
    expect(shown({ isTTY: true, color: true }).text).toContain('\x1b[32m')
    expect(shown({ isTTY: true, color: false }).text).not.toContain('\x1b[3')
    process.env['NO_COLOR'] = '1'
    try {
      expect(shown({ isTTY: true }).text).not.toContain('\x1b[3')
    } finally {
      delete process.env['NO_COLOR']
    }
  })

  test('shows where a stopped run was saved, if it was', () => {
    const { listen, all } = shown({}, [])
    listen({ type: 'stop', reason: 'interrupted', step: 7, steps: 40, checkpoint: 'runs/a/checkpoints/step-000007' })
    listen({ type: 'stop', reason: 'time', step: 8, steps: 40, checkpoint: undefined })
    expect(all()).toContain(
      'interrupted after step 7 of 40: saved runs/a/checkpoints/step-000007; run the same command with { resume: true }',
    )
    expect(all()).toContain('time limit reached after step 8 of 40: nothing was saved')
  })
})

describe('metrics.jsonl', () => {
  test('contains a line per step after a flush', async () => {
    const path = join(await temporaryFolder(), 'metrics.jsonl')
    const log = new LogFile(path)
    log.line(metricsLine(step(1)))
    log.line(metricsLine(step(2)))
    expect(readMetrics(path)).toEqual([])
    log.flush()
    log.flush()
    expect(readMetrics(path)).toEqual([metricsLine(step(1)), metricsLine(step(2))])
    expect((await readFile(path, 'utf8')).split('\n')[0]).toBe(
      '{"step":1,"loss":4.5,"nll":4.25,"lr":0.001,"gradNorm":0.7,"tokens":2048,"tokensPerSecond":1024,"maxVio":0.256,"mtp":5}',
    )
  })

  test('flushes automatically when many lines are buffered', async () => {
    const path = join(await temporaryFolder(), 'metrics.jsonl')
    const log = new LogFile(path)
    for (let i = 1; i <= 2000; i++) log.line(metricsLine(step(i)))
    expect(readMetrics(path).length).toBeGreaterThan(1000)
  })

  test('flushes automatically after a second', async () => {
    const path = join(await temporaryFolder(), 'metrics.jsonl')
    const clock = vi.spyOn(performance, 'now').mockReturnValue(5000)
    const log = new LogFile(path)
    const written = [5500, 5999, 6000, 6900, 7100].map(now => {
      clock.mockReturnValue(now)
      log.line(metricsLine(step(now)))
      return readMetrics(path).length
    })
    clock.mockRestore()
    expect(written).toEqual([0, 0, 3, 3, 5])
  })

  test('is truncated to complete lines when the disk is full, and lines stay buffered', async () => {
    vi.mocked(openSync).mockClear()
    const path = join(await temporaryFolder(), 'metrics.jsonl')
    const log = new LogFile(path)
    log.line(metricsLine(step(1)))
    log.flush()
    const before = await readFile(path, 'utf8')
    log.line(metricsLine(step(2)))
    const fs = await vi.importActual<typeof import('node:fs')>('node:fs')
    vi.mocked(writeSync)
      .mockImplementationOnce((file, bytes) => fs.writeSync(file, bytes.slice(0, 9)))
      .mockImplementationOnce(() => {
        throw new Error('ENOSPC: no space left on device')
      })
    // As on Windows, where a file opened for appending cannot be truncated.
    vi.mocked(ftruncateSync).mockImplementation((file, length) => {
      const { calls, results } = vi.mocked(openSync).mock
      const appending = calls.some(([, flags], i) => flags === 'a' && results[i].value === file)
      if (appending) throw new Error('EPERM: operation not permitted')
      fs.ftruncateSync(file, length)
    })
    expect(() => log.flush()).toThrow(/ENOSPC/)
    expect(await readFile(path, 'utf8')).toBe(before)
    log.flush()
    expect(readMetrics(path).map(line => line.step)).toEqual([1, 2])
  })

  test('buffers lines while another program locks the file, and retries on close', async () => {
    const path = join(await temporaryFolder(), 'metrics.jsonl')
    const log = new LogFile(path)
    const busy = () => {
      throw Object.assign(new Error('EBUSY: resource busy or locked, open'), { code: 'EBUSY' })
    }
    log.line(metricsLine(step(1)))
    vi.mocked(openSync).mockImplementationOnce(busy)
    log.flush()
    expect(readMetrics(path)).toEqual([])
    log.line(metricsLine(step(2)))
    vi.mocked(openSync).mockImplementationOnce(busy).mockImplementationOnce(busy)
    await log.close()
    expect(readMetrics(path).map(line => line.step)).toEqual([1, 2])
    log.line(metricsLine(step(3)))
    vi.mocked(openSync).mockImplementation(busy)
    await expect(log.close()).rejects.toMatchObject({ code: 'E_CHECKPOINT', op: path })
    vi.mocked(openSync).mockReset()
  })

  test('names the fix in errors of reading', async () => {
    const folder = await temporaryFolder()
    const error = (read: () => unknown, message: RegExp) =>
      expect(read).toThrow(expect.objectContaining({ name: 'MoeError', message: expect.stringMatching(message) }))
    error(() => readMetrics(folder), /this is a folder; pass the metrics.jsonl of a run/)
    error(() => readMetrics(undefined as unknown as string), /readMetrics: expected a path, got undefined/)
    expect(readMetrics(join(folder, 'nothing.jsonl'))).toEqual([])
  })

  test('names the file in errors of writing', async () => {
    const path = join(await temporaryFolder(), 'metrics.jsonl')
    await mkdir(path)
    const log = new LogFile(path)
    log.line(metricsLine(step(1)))
    expect(() => log.flush()).toThrow(expect.objectContaining({ code: 'E_CHECKPOINT', op: path }))
  })
})

test('the result has means over the last tenth of the steps, whichever step comes first', () => {
  for (const first of [1, 40]) {
    const recent = new RecentMetrics()
    recent.addBalanceNames(['maxVio'])
    const lines: MetricsLine[] = []
    for (let number = first; number <= 300; number++) {
      const line = { ...metricsLine(step(number)), nll: number ** 2, maxVio: -number }
      lines.push(line)
      recent.add(line)
      const last = lines.filter(({ step }) => step > number * 0.9)
      const mean = (name: 'nll' | 'maxVio') => last.reduce((sum, line) => sum + line[name], 0) / last.length
      expect(recent.trainingLoss).toBe(mean('nll'))
      expect(recent.balance).toEqual({ maxVio: mean('maxVio') })
    }
  }
})

test('summary.json is merged with new values, and stays intact after a failure', async () => {
  const out = join(await temporaryFolder(), 'deep', 'run')
  await writeSummary(out, { steps: 3, loss: Number.NaN })
  await writeSummary(pathToFileURL(out), { mtp: { acceptance: 0.5 } })
  const read = async () => JSON.parse(await readFile(join(out, 'summary.json'), 'utf8'))
  expect(await read()).toEqual({ steps: 3, loss: null, mtp: { acceptance: 0.5 } })
  await expect(writeSummary(undefined as unknown as string, {})).rejects.toMatchObject({ code: 'E_ATTR' })
  await expect(writeSummary(out, { big: 1n })).rejects.toMatchObject({ code: 'E_CHECKPOINT' })
  expect(await read()).toEqual({ steps: 3, loss: null, mtp: { acceptance: 0.5 } })
})

describe('events.jsonl', () => {
  const lines = async (path: string) =>
    (await readFile(path, 'utf8'))
      .trimEnd()
      .split('\n')
      .map(line => JSON.parse(line))

  test('contains all events except steps and progress, also of resumed runs, as soon as they occur', async () => {
    const path = join(await temporaryFolder(), 'events.jsonl')
    const listen = eventsLog(path)
    listen(start)
    listen(step(1))
    listen({ type: 'evaluating', step: 1, done: 0.5 })
    const evaluation = { type: 'evaluation', step: 1, final: false, loss: 4, bitsPerByte: Number.NaN } as const
    listen({ ...evaluation, tokens: 9, seconds: 1 })
    expect((await lines(path)).map(({ type }) => type)).toEqual(['start', 'evaluation'])
    const resumed = eventsLog(path)
    resumed({ ...start, fromStep: 1 })
    resumed({ type: 'fail', error: new TypeError('no') })
    const all = await lines(path)
    expect(all[0]).toEqual({ time: expect.stringMatching(/^\d{4}-.*Z$/), ...start, out: undefined })
    expect(all.slice(1)).toMatchObject([
      { type: 'evaluation', loss: 4, bitsPerByte: null },
      { type: 'start', fromStep: 1 },
      { type: 'fail', error: { name: 'TypeError', message: 'no' } },
    ])
  })

  test('does not contain a run that failed before its start', async () => {
    const path = join(await temporaryFolder(), 'events.jsonl')
    eventsLog(path)({ type: 'fail', error: new Error('another training writes there') })
    expect(existsSync(path)).toBe(false)
  })
})
