import { setDefaultBackend } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import fc from 'fast-check'
import { beforeAll, describe, expect, test } from 'vitest'
import { evaluate } from '../evaluate.ts'
import type { EvaluationEvent, StartEvent, TrainEvent } from '../events.ts'
import { progress } from '../report/progress.ts'
import { BigramModel, letters, letterTexts } from '../test-model.ts'
import { train } from '../train.ts'
import { Interleaving } from './interleaving.ts'
import { mixture } from './mixture.ts'
import { TokenDataset } from './token-dataset.ts'
import { TrainingOrder } from './training-order.ts'

beforeAll(() => setDefaultBackend(referenceBackend()))

const weights = fc.array(fc.double({ min: 0.01, max: 1, noNaN: true }), { minLength: 1, maxLength: 9 })
const sharesOf = (list: readonly number[]) => list.map(weight => weight / list.reduce((sum, value) => sum + value, 0))

describe('interleaving', () => {
  test('gives each source its share of any range of places, up to rounding, and numbers its places', () => {
    fc.assert(
      fc.property(
        weights,
        fc.nat(1000),
        fc.nat(2 ** 31),
        fc.integer({ min: 1, max: 400 }),
        (list, seed, from, length) => {
          const shares = sharesOf(list)
          const interleaving = new Interleaving(shares, seed)
          const seen = interleaving.counts(from)
          for (let place = from; place < from + length; place++) {
            const { source, index } = interleaving.at(place)
            expect(index).toBe(seen[source]++)
          }
          expect(seen).toEqual(interleaving.counts(from + length))
          const before = interleaving.counts(from)
          // Sources are divided in halves repeatedly. Each division deviates by less than one place per range.
          const maximum = 2 * Math.ceil(Math.log2(list.length) || 0) + 1e-6
          for (const [i, count] of seen.entries())
            expect(Math.abs(count - before[i] - shares[i] * length)).toBeLessThanOrEqual(maximum)
        },
      ),
      { numRuns: 200 },
    )
  })
})

const texts = { web: letterTexts(30, 60, 3), code: letterTexts(8, 45, 4) }
const heldOut = { web: letterTexts(4, 50, 5), code: letterTexts(3, 70, 6) }
const streams = (of: typeof texts) => ({
  web: TokenDataset.fromTexts(of.web, letters),
  code: TokenDataset.fromTexts(of.code, letters),
})
const [training, validation] = [streams(texts), streams(heldOut)]
const data = () =>
  mixture({
    web: { data: { training: training.web, validation: validation.web }, weight: 3 },
    code: { data: { training: training.code, validation: validation.code }, weight: 1 },
  })
const sizes = { sequenceLength: 8, lookahead: 1, batchSize: 2, seed: 5 }

describe('a mixture', () => {
  test('distributes rows of all sources over ranks, and uses each source once per epoch of that source', () => {
    const numbers = (from: number, length: number) =>
      TokenDataset.fromTokens([Array.from({ length }, (_, i) => from + i)])
    const parts = { web: numbers(0, 1900), code: numbers(5000, 366) }
    const mixed = mixture({
      web: { data: { training: parts.web }, weight: 3 },
      code: { data: { training: parts.code }, weight: 1 },
    }).training
    const rows = (world: number, steps: number) => {
      const orders = Array.from({ length: world }, (_, rank) => {
        return new TrainingOrder(mixed, { ...sizes, batchSize: 4 / world, rank, world })
      })
      return Array.from({ length: steps }, (_, step) => orders.flatMap(order => order.step(step))).flatMap(batches =>
        batches.flatMap(({ tokens, length }) =>
          Array.from({ length: tokens.length / length }, (_, r) => tokens.slice(r * length, (r + 1) * length).join()),
        ),
      )
    }
    const one = rows(1, 200)
    expect(rows(2, 200)).toEqual(one)
    const rowsOf = (stream: TokenDataset) => {
      const order = new TrainingOrder(stream, { ...sizes, batchSize: 1 })
      return Array.from({ length: order.windows }, (_, step) => order.step(step)[0].tokens.join())
    }
    const [web, code] = [rowsOf(parts.web), rowsOf(parts.code)]
    const ofCode = one.filter(row => code.includes(row))
    const ofWeb = one.filter(row => web.includes(row))
    expect(ofCode.length + ofWeb.length).toBe(800)
    expect(Math.abs(ofCode.length - 200)).toBeLessThanOrEqual(1)
    // Each epoch of the smaller source contains all its windows, in another order.
    const epochs = [0, 1].map(epoch => ofCode.slice(epoch * code.length, (epoch + 1) * code.length))
    for (const epoch of epochs) expect([...epoch].sort()).toEqual([...code].sort())
    expect(epochs[0]).not.toEqual(epochs[1])
    const used = new TrainingOrder(mixed, { ...sizes, batchSize: 4 }).sources(200)
    expect(used.map(({ name, windows }) => [name, windows])).toEqual([
      ['web', ofWeb.length],
      ['code', ofCode.length],
    ])
    expect(used[1].epochs).toBe(ofCode.length / code.length)
  })

  test('reports the epochs of each source at the start and in the result, and evaluates each source', async () => {
    const events: TrainEvent[] = []
    const lines: string[] = []
    const drawn = progress({ stream: { write: text => lines.push(text) }, color: false })
    const onEvent = (event: TrainEvent) => events.push(event)
    const options = { data: data(), steps: 30, batchSize: 2, sequenceLength: 8, evalEvery: 10, evalTokens: 40 }
    const run = await train(new BigramModel(), { ...options, tokenizer: letters, progress: drawn, onEvent })
    const start = events[0] as StartEvent
    expect(start.trainingTokens).toBe(training.web.length + training.code.length)
    expect(start.validationTokens).toBe(validation.web.length + validation.code.length)
    expect(start.sources).toMatchObject({
      web: { share: 0.75, size: training.web.length },
      code: { share: 0.25, tokens: 120 },
    })
    expect(start.sources?.['code'].epochs).toBe(15 / Math.ceil((training.code.length - 1) / 8))
    expect(run.sources).toEqual(start.sources)
    const evaluations = events.filter((event): event is EvaluationEvent => event.type === 'evaluation')
    expect(evaluations.map(({ final }) => final)).toEqual([false, false, true])
    for (const { sources } of evaluations) expect(Object.keys(sources ?? {})).toEqual(['web', 'code'])
    expect(evaluations[0].tokens).toBeLessThan(evaluations[2].tokens)
    expect(run.validation.sources).toEqual(evaluations[2].sources)
    expect(lines.join('')).toMatch(/sources: web 75.0 % \(.* epochs of .*\), code 25.0 %/)
    expect(lines.join('')).toMatch(/bits per byte \(web \d\.\d+, code \d\.\d+\)/)
  })

  test('is evaluated by source and overall', async () => {
    const model = new BigramModel()
    const options = { sequenceLength: 8, batchSize: 2 }
    const all = await evaluate(model, validation, options)
    const [web, code] = [
      await evaluate(model, validation.web, options),
      await evaluate(model, validation.code, options),
    ]
    expect(all.sources).toEqual({
      web: { loss: web.loss, bitsPerByte: web.bitsPerByte, tokens: web.tokens },
      code: { loss: code.loss, bitsPerByte: code.bitsPerByte, tokens: code.tokens },
    })
    expect(all.tokens).toBe(web.tokens + code.tokens)
    expect(all.loss).toBeCloseTo((web.loss * web.tokens + code.loss * code.tokens) / all.tokens, 12)
    const bytes = [heldOut.web.join('').length, heldOut.code.join('').length]
    expect(all.bitsPerByte).toBeCloseTo(
      (web.bitsPerByte * bytes[0] + code.bitsPerByte * bytes[1]) / (bytes[0] + bytes[1]),
      12,
    )
    // Documents of one token: nothing is predicted.
    const none = TokenDataset.fromTokens([Int32Array.of(1), Int32Array.of(2)])
    const withNothing = await evaluate(model, { ...validation, none }, options)
    expect(withNothing).toMatchObject({ loss: all.loss, bitsPerByte: all.bitsPerByte, tokens: all.tokens })
    expect(withNothing.sources?.['none']).toEqual({ loss: NaN, bitsPerByte: NaN, tokens: 0 })
  })

  test('has other settings with other weights, and rejects invalid sources by name', async () => {
    const start = async (weight: number) => {
      let settings: StartEvent['settings'] = {}
      const changed = mixture({
        web: { data: trainingOf('web'), weight },
        code: { data: trainingOf('code'), weight: 1 },
      })
      const onEvent = (event: TrainEvent) => {
        if (event.type === 'start') settings = event.settings
      }
      await train(new BigramModel(), {
        data: changed,
        steps: 1,
        batchSize: 1,
        sequenceLength: 8,
        progress: false,
        onEvent,
      })
      return settings['data']
    }
    const trainingOf = (name: 'web' | 'code') => ({ training: training[name] })
    expect(await start(1)).toBe(await start(1))
    expect(await start(1)).not.toBe(await start(2))
    const expectError = (parts: unknown, message: RegExp) =>
      expect(() => mixture(parts as Parameters<typeof mixture>[0])).toThrow(
        expect.objectContaining({ code: 'E_CONFIG', message: expect.stringMatching(message) }),
      )
    expectError({}, /sources is/)
    expectError({ web: { data: trainingOf('web'), weight: 0 } }, /weight of web is 0/)
    expectError({ web: { data: texts.web, weight: 1 } }, /data of web has no tokens/)
    expectError({ web: { data: trainingOf('web'), weights: 1 } }, /weights/)
  })
})
