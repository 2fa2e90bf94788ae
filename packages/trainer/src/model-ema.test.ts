/** @file The EMA of the weights: its values, evaluation, checkpoints and resumption, and that it does not change the training. */
import { existsSync } from 'node:fs'
import { readFile, rm, truncate } from 'node:fs/promises'
import { join } from 'node:path'
import { openCheckpoint, stateSource } from '@moe/checkpoint'
import { disposeModule, loadStateDict, type MoeError, Parameter, Random, stateDict, tensor } from '@moe/core'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { evaluate } from './evaluate.ts'
import type { EvaluationEvent, TrainEvent } from './events.ts'
import { modelFolder } from './index.ts'
import { Ema } from './optim/ema.ts'
import type { TrainOptions } from './options.ts'
import { BigramModel, temporaryFolder } from './test-model.ts'
import { data, numbersOf, run, settings, stopAfter } from './test-run.ts'
import { train } from './train.ts'

type Weights = Readonly<Record<string, readonly number[]>>

async function weightsOf(model: BigramModel): Promise<Weights> {
  const all = stateDict(model).map(async ({ name, data }) => [name, Array.from(await data())] as const)
  return Object.fromEntries(await Promise.all(all))
}

/** Trains a new model, and also returns the weights after each step. */
async function runWithWeights(options: Partial<TrainOptions> = {}) {
  const model = new BigramModel()
  const weights: Weights[] = []
  const onEvent: TrainOptions['onEvent'] = async (event, reporter) => {
    if (event.type === 'step') weights.push(await weightsOf(model))
    return options.onEvent?.(event, reporter)
  }
  return { ...(await run({ ...options, model, onEvent })), weights }
}

const evaluations = (events: readonly TrainEvent[]) =>
  events.flatMap(event => (event.type === 'evaluation' ? [event] : []))

async function storedWeights(folder: string): Promise<Weights> {
  const model = new BigramModel()
  await using checkpoint = await openCheckpoint(folder)
  await loadStateDict(model, stateSource(checkpoint))
  const weights = await weightsOf(model)
  disposeModule(model)
  return weights
}

/** The EMA in float64 of the weights after each step. */
function emaOf(weights: readonly Weights[], decay: number): Weights {
  const names = ['embed_tokens.weight', 'lm_head.weight']
  return Object.fromEntries(
    names.map(name => {
      let total = 0
      const sums = new Float64Array(weights[0][name].length)
      for (const step of weights) {
        total = decay * total + 1
        for (const [i, value] of step[name].entries()) sums[i] = decay * sums[i] + value
      }
      return [name, Array.from(sums, sum => sum / total)]
    }),
  )
}

function expectClose(actual: Weights, expected: Weights): void {
  for (const [name, values] of Object.entries(expected)) {
    for (const [i, value] of values.entries()) expect(actual[name][i]).toBeCloseTo(value, 5)
  }
}

describe('Ema', () => {
  test('equals a float64 computation for any decay, over the weights since its first update', async () => {
    const decays = fc.double({ min: 0.01, max: 0.9999, noNaN: true })
    await fc.assert(
      fc.asyncProperty(decays, fc.integer({ min: 1, max: 40 }), fc.integer(), async (decay, steps, seed) => {
        const random = new Random(seed >>> 0)
        const parameter = new Parameter(tensor(random.normal(3)))
        const buffer = new Parameter(tensor([1]), { trainable: false })
        const ema = new Ema(
          [
            { name: 'weight', parameter },
            { name: 'buffer', parameter: buffer },
          ],
          { decay },
        )
        const [sums, values] = [new Float64Array(3), random.normal(3)]
        let total = 0
        for (let step = 0; step < steps; step++) {
          values.set(random.normal(3))
          parameter.assign(tensor(values))
          ema.update()
          total = decay * total + 1
          for (let i = 0; i < 3; i++) sums[i] = decay * sums[i] + values[i]
        }
        expect(ema.steps).toBe(steps)
        ema.swap()
        const average = await parameter.values()
        for (let i = 0; i < 3; i++) expect(average[i]).toBeCloseTo(sums[i] / total, 5)
        ema.swap()
        expect(await parameter.values()).toEqual(values)
        ema.dispose()
        for (const each of [parameter, buffer]) each.dispose()
      }),
      { numRuns: 30 },
    )
  })

  test('rejects an invalid decay', () => {
    const parameter = new Parameter(tensor([1]))
    for (const decay of [0, 1, 1.5, Number.NaN, '0.9'] as number[])
      expect(() => new Ema([{ name: 'weight', parameter }], { decay })).toThrow(/expected a number between 0 and 1/)
    parameter.dispose()
  })
})

describe('a run with ema', () => {
  test('takes the same steps as without, and the EMA equals a float64 computation', async () => {
    const [without, out] = [await temporaryFolder(), await temporaryFolder()]
    const plain = await runWithWeights({ out: without, evalEvery: 4 })
    const { result, events, weights } = await runWithWeights({ out, evalEvery: 4, ema: 0.8, checkpointEvery: 5 })
    expect(weights).toEqual(plain.weights)
    expect(result.ema?.loss).not.toBe(result.validation.loss)
    expect(evaluations(events).map(({ loss }) => loss)).toEqual(evaluations(plain.events).map(({ loss }) => loss))
    for (const step of [10, 12]) {
      const folder = join(out, 'checkpoints', `step-0000${step}`)
      const { offset, ...average } = await storedWeights(join(folder, 'ema'))
      const { offset: now, ...own } = await storedWeights(join(folder, 'model'))
      expectClose(average, emaOf(weights.slice(0, step), 0.8))
      expect(average).not.toEqual(own)
      // Buffers are not averaged.
      expect(offset).toEqual(now)
    }
  })

  test('reports the evaluation of the EMA next to that of the weights', async () => {
    const out = await temporaryFolder()
    const { result, events } = await run({ out, evalEvery: 5, evalTokens: 60, ema: 0.7 })
    const model = new BigramModel()
    await using checkpoint = await openCheckpoint(modelFolder(out, { ema: true }))
    await loadStateDict(model, stateSource(checkpoint))
    const { seconds: _, ...measured } = await evaluate(model, data.validation, { sequenceLength: 8, batchSize: 3 })
    disposeModule(model)
    expect(result.ema).toMatchObject(measured)
    const all = evaluations(events)
    expect(all.map(({ step, ema }) => [step, ema !== undefined])).toEqual([5, 10, 12].map(step => [step, true]))
    expect(all.at(-1)?.ema).toEqual(result.ema)
    const summary = JSON.parse(await readFile(join(out, 'summary.json'), 'utf8'))
    expect(summary.ema.bitsPerByte).toBe(result.ema?.bitsPerByte)
    const lines = (await readFile(join(out, 'events.jsonl'), 'utf8')).trim().split('\n')
    const written = lines.map(line => JSON.parse(line) as EvaluationEvent).filter(({ type }) => type === 'evaluation')
    expect(written.map(({ ema }) => ema?.loss)).toEqual(all.map(({ ema }) => ema?.loss))
    // The evaluation of the weights is the first half, that of the EMA the second.
    const shares = events.flatMap(event => (event.type === 'evaluating' && event.step === 12 ? [event.done] : []))
    expect(shares).toEqual([...shares].sort((a, b) => a - b))
    expect(shares).toContain(0.5)
    expect(shares.at(-1)).toBe(1)
  })

  test('is the weights themselves until a step is averaged', async () => {
    const [stopped, done] = [await temporaryFolder(), await temporaryFolder()]
    await run({ out: stopped, ema: 0.9, signal: AbortSignal.abort() })
    expect(await storedWeights(modelFolder(stopped, { ema: true }))).toEqual(await storedWeights(modelFolder(stopped)))
    const whole = await runWithWeights({ ema: 0.9 })
    const resumed = await run({ out: stopped, ema: 0.9, resume: true })
    expect(resumed.result.ema?.loss).toBe(whole.result.ema?.loss)
    await run({ out: done })
    const { result } = await run({ out: done, ema: 0.9, resume: true, allowChanges: true })
    expect(result.ema?.loss).toBe(result.validation.loss)
  })

  test('restores the weights when an evaluation is interrupted', async () => {
    const controller = new AbortController()
    const model = new BigramModel()
    let last: Weights = {}
    const onEvent = async (event: TrainEvent) => {
      if (event.type === 'step') last = await weightsOf(model)
      if (event.type === 'evaluating' && event.done > 0.6) controller.abort()
    }
    const result = await train(model, { ...settings, ema: 0.9, signal: controller.signal, onEvent })
    expect(result).toMatchObject({ stopped: 'interrupted', steps: 12 })
    expect(result.ema).toBeUndefined()
    expect(await weightsOf(model)).toEqual(last)
    disposeModule(model)
  })

  test('rejects an invalid decay', async () => {
    const model = new BigramModel()
    await expect(train(model, { ...settings, ema: 1 })).rejects.toThrow(
      'ema is 1, expected a number between 0 and 1, for example 0.999',
    )
    disposeModule(model)
  })
})

describe('a resumed run', () => {
  test('continues the EMA bit for bit', async () => {
    const [reference, out] = [await temporaryFolder(), await temporaryFolder()]
    const uninterrupted = await run({ out: reference, ema: 0.9 })
    await run({ out, ema: 0.9, ...stopAfter(5) })
    const { result } = await run({ out, ema: 0.9, resume: true })
    expect(numbersOf(out)).toEqual(numbersOf(reference))
    expect(await storedWeights(modelFolder(out, { ema: true }))).toEqual(
      await storedWeights(modelFolder(reference, { ema: true })),
    )
    expect(result.ema?.loss).toBe(uninterrupted.result.ema?.loss)
    const checkpoint = result.checkpoint as string
    for (const ema of [false, true]) expect(modelFolder(checkpoint, { ema })).toBe(modelFolder(out, { ema }))
  })

  test('changes the decay, or starts or ends the EMA, only if changes are allowed', async () => {
    const out = await temporaryFolder()
    await run({ out, ...stopAfter(5) })
    const differences = async (options: Partial<TrainOptions>) => {
      const error = await run({ out, resume: true, ...options }).catch((error: MoeError) => error)
      return (error as MoeError).details['differences']
    }
    expect(await differences({ ema: 0.9 })).toEqual(['ema: saved with nothing, now 0.9'])
    const allowed = { out, resume: true, allowChanges: true }
    const begun = await runWithWeights({ ...allowed, ema: 0.9, ...stopAfter(8) })
    expectClose(await storedWeights(modelFolder(out, { ema: true })), emaOf(begun.weights, 0.9))
    expect(await differences({ ema: 0.8 })).toEqual(['ema: saved with 0.9, now 0.8'])
    expect(await differences({})).toEqual(['ema: saved with 0.9, now nothing'])
    // The EMA still starts with step 6.
    const rest = await runWithWeights({ out, resume: true, ema: 0.9 })
    const all = [...begun.weights, ...rest.weights]
    expectClose(await storedWeights(modelFolder(out, { ema: true })), emaOf(all, 0.9))
    await run({ ...allowed, steps: 14 })
    expect(existsSync(join(out, 'checkpoints', 'step-000014', 'ema'))).toBe(false)
    expect(() => modelFolder(out, { ema: true })).toThrow(/step-000014 has no averaged weights; omit ema/)
  })

  test.each(['truncated', 'missing'])('rejects an EMA that is %s', async state => {
    const out = await temporaryFolder()
    const { result } = await run({ out, ema: 0.9, checkpointEvery: 6 })
    const file = join(result.checkpoint as string, 'ema', 'model.safetensors')
    if (state === 'missing') await rm(file)
    else await truncate(file, 100)
    await expect(run({ out, ema: 0.9, resume: true })).rejects.toThrow(/step-000006 is intact; pass it as resume/)
  })
})
