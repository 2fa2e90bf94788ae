import { writeSync } from 'node:fs'
import { readdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterEach, describe, expect, test, vi } from 'vitest'
import type { StartEvent, StepEvent, TrainReporter } from '../events.ts'
import { removeTemporaryFolders, temporaryFolder } from '../test-model.ts'
import { tensorBoard } from './tensor-board.ts'
import { crc32c, eventRecord, hyperparameters, scalar, text } from './tensor-board-records.ts'

vi.mock('node:fs', { spy: true })
afterEach(removeTemporaryFolders)

const start: StartEvent = {
  type: 'start',
  backend: 'reference',
  device: 'cpu',
  precision: 'f32',
  parameters: 12,
  steps: 4,
  fromStep: 0,
  fromTokens: 0,
  tokensPerStep: 8,
  tokens: 0,
  trainingTokens: 100,
  validationTokens: 10,
  epochs: 1,
  out: undefined,
  rank: 0,
  settings: { lr: 1e-3 },
}

const step = (number: number): StepEvent => ({
  type: 'step',
  step: number,
  loss: 3,
  nll: 2.5,
  lr: 1e-3,
  gradNorm: 1,
  tokens: 8 * number,
  tokensPerSecond: 100,
  metrics: { maxVio: 0.25 },
})

/** The printable texts in a file, such as tags and settings. */
const printable = (bytes: Buffer) => bytes.toString('latin1').match(/[ -~]{3,}/g) ?? []

async function eventFiles(folder: string) {
  const names = (await readdir(folder)).filter(name => name.startsWith('events.out.tfevents.')).sort()
  return Promise.all(names.map(name => readFile(join(folder, name))))
}

/** The data of the records in a file. Throws if a record is incomplete. */
function recordsOf(bytes: Buffer): Buffer[] {
  const records: Buffer[] = []
  for (let at = 0; at < bytes.length; ) {
    const length = Number(bytes.readBigUInt64LE(at))
    if (at + length + 16 > bytes.length) throw new RangeError('a torn record')
    records.push(bytes.subarray(at + 12, at + 12 + length))
    at += length + 16
  }
  return records
}

describe('records', () => {
  test('have the checksum of RFC 3720, B.4', () => {
    expect(crc32c(Buffer.alloc(32))).toBe(0x8a9136aa)
    expect(crc32c(Buffer.alloc(32, 0xff))).toBe(0x62a8ab43)
    expect(crc32c(Uint8Array.from({ length: 32 }, (_, i) => i))).toBe(0x46dd794e)
    expect(crc32c(Uint8Array.from({ length: 32 }, (_, i) => 31 - i))).toBe(0x113fdb5c)
  })

  test("equal those of TensorBoard's writer, byte for byte", async () => {
    const startSeconds = 1764230400.25
    const parts = [
      { fileVersion: 'brain.Event:2' },
      { step: 201, sessionStart: true },
      {
        step: 200,
        values: [text('settings', '| lr | 0.01 |\n| Größe | 2 |'), hyperparameters({ lr: 0.01 }, startSeconds)],
      },
      { step: 300, values: [scalar('train/nll', 2.5), scalar('model/maxVio', 0.1)] },
      { step: 2 ** 40 + 1, values: [scalar('train/lr', -1e-38)] },
      {
        values: [{ optimizer: 'muon' }, { clipped: true }, { seed: 0 }].map(one => hyperparameters(one, startSeconds)),
      },
    ]
    const written = parts.map((part, i) => eventRecord({ wallTime: startSeconds + i, ...part }))
    const expected = await readFile(new URL('../../fixtures/events.tfevents', import.meta.url))
    expect(Buffer.concat(written).toString('hex')).toBe(expected.toString('hex'))
  })
})

const noticesInto = (list: string[]): TrainReporter => ({ notify: message => void list.push(message), log: () => {} })

describe('the listener', () => {
  test('writes settings, steps and evaluations into the folder of the run', async () => {
    const out = join(await temporaryFolder(), 'run')
    const listen = tensorBoard()
    listen({ ...start, out })
    listen(step(1))
    const evaluation = { loss: 2, bitsPerByte: Number.NaN, tokens: 9, seconds: 1 }
    listen({ type: 'evaluation', step: 1, final: true, ...evaluation, ema: { ...evaluation, bitsPerByte: 1 } })
    listen({ type: 'evaluation', step: 2, final: true, ...evaluation, sources: { web: evaluation } })
    const [bytes] = await eventFiles(out)
    const records = recordsOf(bytes)
    expect(records).toHaveLength(6)
    expect(printable(records[0]).join()).toContain('brain.Event:2')
    expect(records[2].toString()).toContain('| lr | 0.001 |')
    expect(records[3].toString('latin1').match(/(train|model)\/\w+/g)).toEqual([
      'train/loss',
      'train/nll',
      'train/lr',
      'train/gradNorm',
      'train/tokensPerSecond',
      'model/maxVio',
    ])
    const names = records.slice(4).map(record => record.toString('latin1').match(/(validation|ema)\/[\w/]+/g))
    expect(names).toEqual([
      ['validation/loss', 'ema/loss', 'ema/bitsPerByte'],
      ['validation/loss', 'validation/web/loss'],
    ])
  })

  test('writes the balance of the experts of each layer', async () => {
    const folder = await temporaryFolder()
    const listen = tensorBoard(folder)
    listen(start)
    const layers = [
      { name: 'layers.1', groups: 2, load: [6, 0, 3, 3], stepMaxVio: 1.5, bias: [-0.5, 0.25, 0, 0] },
      { name: 'layers.2', load: [1, 1, 1, 1], stepMaxVio: 0, dropped: 1 },
    ]
    listen({ type: 'loads', step: 10, steps: 10, layers })
    listen({ type: 'evaluating', step: 10, done: 0 })
    const [bytes] = await eventFiles(folder)
    const values = [
      scalar('experts/layers.1/maxVio', 1),
      scalar('experts/layers.1/stepMaxVio', 1.5),
      scalar('experts/layers.1/deadExperts', 1),
      scalar('experts/layers.1/leastBias', -0.5),
      scalar('experts/layers.1/largestBias', 0.25),
      scalar('experts/layers.2/maxVio', 0),
      scalar('experts/layers.2/stepMaxVio', 0),
      scalar('experts/layers.2/deadExperts', 0),
      scalar('experts/layers.2/dropped', 0.25),
    ]
    const expected = recordsOf(eventRecord({ wallTime: 0, step: 10, values }))[0]
    // After the 9 bytes of the time.
    expect(recordsOf(bytes)[3].subarray(9).toString('latin1')).toBe(expected.subarray(9).toString('latin1'))
  })

  test('starts a new file for a resumed run, with its first step', async () => {
    const folder = await temporaryFolder()
    for (const fromStep of [0, 2]) {
      const listen = tensorBoard(folder)
      listen({ ...start, fromStep })
      listen(step(fromStep + 1))
      listen({ type: 'fail', error: new Error('no') })
    }
    const sessions = (await eventFiles(folder)).map(bytes => recordsOf(bytes)[1].subarray(9).toString('hex'))
    // Field 7 is START. In the second file, field 2 before it is step 3.
    expect(sessions).toEqual(['3a020801', '10033a020801'])
  })

  test('writes values that listeners log, with their names', async () => {
    const folder = await temporaryFolder()
    const listen = tensorBoard(folder)
    listen(start)
    listen({ type: 'log', step: 7, values: { 'lambada/acc': 0.25, missing: Number.NaN } })
    const [bytes] = await eventFiles(folder)
    const expected = recordsOf(eventRecord({ wallTime: 0, step: 7, values: [scalar('lambada/acc', 0.25)] }))[0]
    // After the 9 bytes of the time.
    expect(recordsOf(bytes)[3].subarray(9).toString('latin1')).toBe(expected.subarray(9).toString('latin1'))
  })

  test('writes only on rank 0', async () => {
    const folder = await temporaryFolder()
    const listen = tensorBoard(folder)
    listen({ ...start, rank: 1 })
    listen(step(1))
    listen({ type: 'stop', reason: 'time', step: 1, steps: 4, checkpoint: undefined })
    expect(await readdir(folder)).toEqual([])
  })

  test('requires a folder', () => {
    expect(() => tensorBoard()(start)).toThrow(expect.objectContaining({ code: 'E_CONFIG' }))
  })

  test('warns once of a full disk, and writes the buffered records later', async () => {
    const folder = await temporaryFolder()
    const notices: string[] = []
    const reporter = noticesInto(notices)
    const listen = tensorBoard(folder)
    listen(start, reporter)
    vi.mocked(writeSync).mockImplementation(() => {
      throw new Error('ENOSPC: no space left on device')
    })
    for (let i = 1; i <= 1000; i++) listen(step(i), reporter)
    listen({ type: 'evaluating', step: 1, done: 0 }, reporter)
    vi.mocked(writeSync).mockReset()
    expect(notices).toEqual([
      'TensorBoard files cannot be written; records are buffered and training continues: writing failed: ENOSPC: no space left on device',
    ])
    listen({ type: 'evaluating', step: 1, done: 1 }, reporter)
    expect(recordsOf((await eventFiles(folder))[0])).toHaveLength(1003)
    expect(notices).toHaveLength(1)
  })

  test('stops writing, with a notice, if too much is buffered or the folder cannot be created', async () => {
    const folder = await temporaryFolder()
    const notices: string[] = []
    const reporter = noticesInto(notices)
    const listen = tensorBoard(folder)
    listen(start)
    vi.mocked(writeSync).mockImplementation(() => {
      throw new Error('ENOSPC')
    })
    const metrics = Object.fromEntries(Array.from({ length: 10_000 }, (_, i) => [`metric-${i}-${'m'.repeat(500)}`, i]))
    for (let i = 1; i <= 5; i++) listen({ ...step(i), metrics }, reporter)
    vi.mocked(writeSync).mockReset()
    expect(notices).toHaveLength(2)
    expect(notices[1]).toMatch(/^TensorBoard files are no longer written/)

    const path = join(folder, 'file')
    await writeFile(path, '')
    const other = tensorBoard(join(path, 'below'))
    other(start, reporter)
    other(step(1), reporter)
    expect(notices[2]).toMatch(/^TensorBoard files are not written: /)
    expect(notices).toHaveLength(3)
  })
})
