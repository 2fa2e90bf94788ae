import { mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { disposeModule, Module, MoeError, type NamedParameter, namedParameters, stateDict, tensor } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { TrainingOrder } from './data/training-order.ts'
import { evaluate } from './evaluate.ts'
import type { LossOutput, TrainableModel } from './model.ts'
import { AdamW } from './optim/adamw.ts'
import type { TrainOptions } from './options.ts'
import { BigramModel, letterData, letters, temporaryFolder } from './test-model.ts'
import { checkpointsOf, data, errorOf, numbersOf, run, settings } from './test-run.ts'
import { train } from './train.ts'
import { trainingStep } from './training-step.ts'

describe('failures lose nothing', () => {
  const full = Object.assign(new Error('ENOSPC: no space left on device, write'), { code: 'ENOSPC' })

  /** Fails at save number `at`, after a partial write. */
  class FullDisk extends BigramModel {
    saves = 0
    readonly at: number
    constructor(at: number) {
      super()
      this.at = at
    }
    async save(folder: string): Promise<void> {
      const complete = ++this.saves !== this.at
      const { saveCheckpoint } = await import('@moe/checkpoint')
      if (complete) await saveCheckpoint(folder, stateDict(this))
      else {
        await writeFile(join(folder, 'model.safetensors'), 'half')
        throw full
      }
    }
  }

  test('a full disk is an error that names the previous checkpoint, from which the run resumes', async () => {
    const [whole, out] = [await temporaryFolder(), await temporaryFolder()]
    await run({ out: whole })
    const error = await errorOf(run({ out, checkpointEvery: 4, model: new FullDisk(2) }))
    expect(error).toMatchObject({ code: 'E_CHECKPOINT', details: { step: 8 } })
    expect(error.message).toMatch(/saving step 8 failed: ENOSPC.*step-000004 is intact.*resume/)
    expect(await checkpointsOf(out)).toEqual(['latest', 'step-000004'])
    await run({ out, checkpointEvery: 4, resume: true })
    expect(numbersOf(out)).toEqual(numbersOf(whole))
  })

  /** The data, except that reading fails while `broken` is above 0, which every failure decreases. */
  function unreliable() {
    const state = { broken: 0, failures: 0 }
    const { training, validation } = letterData()
    const whole = training.read.bind(training)
    training.read = (from, count) => {
      if (state.broken === 0) return whole(from, count)
      state.broken--
      state.failures++
      throw new MoeError({ code: 'E_DATA', op: 'tokenFiles', problem: 'tokens.bin: cannot read the file' })
    }
    return { state, data: { training, validation } }
  }

  test('data that becomes unreadable stops the run after saving the steps done, and it resumes from there', async () => {
    const [whole, out] = [await temporaryFolder(), await temporaryFolder()]
    await run({ out: whole })
    const { state, data } = unreliable()
    const onEvent: TrainOptions['onEvent'] = event => {
      if (event.type === 'step' && event.step === 6) state.broken = Number.POSITIVE_INFINITY
    }
    // The rows of step 7 were read before; those of step 8 are not readable.
    expect(await errorOf(run({ out, data, onEvent }))).toMatchObject({ code: 'E_DATA' })
    expect(await checkpointsOf(out)).toEqual(['latest', 'step-000007'])
    state.broken = 0
    await run({ out, data, resume: true })
    expect(numbersOf(out)).toEqual(numbersOf(whole))
  })

  test('a run survives data that cannot be read ahead of time, but can be when it is needed', async () => {
    const [whole, out] = [await temporaryFolder(), await temporaryFolder()]
    await run({ out: whole })
    const { state, data } = unreliable()
    const onEvent: TrainOptions['onEvent'] = event => {
      if (event.type === 'step' && event.step === 6) state.broken = 1
    }
    await run({ out, data, onEvent })
    expect(state.failures).toBe(1)
    expect(numbersOf(out)).toEqual(numbersOf(whole))
  })

  test('an error that already names a fix gets no second one', async () => {
    const out = await temporaryFolder()
    class Unwritable extends BigramModel {
      async save(folder: string): Promise<void> {
        await mkdir(join(folder, 'model.safetensors'))
        const { saveCheckpoint } = await import('@moe/checkpoint')
        await saveCheckpoint(folder, stateDict(this))
      }
    }
    const { message, cause } = await errorOf(run({ out, checkpointEvery: 4, model: new Unwritable() }))
    expect((cause as Error).message).toMatch(/model\.safetensors: writing failed: .*free disk space/)
    expect(message).toMatch(/step-000004: saving step 4 failed: model\.safetensors: writing failed: /)
    expect(message.match(/free (some|disk) space/g)).toHaveLength(1)
  })

  test('an error that is not one of the file system keeps its fix', async () => {
    const out = await temporaryFolder()
    class Unready extends BigramModel {
      async save(): Promise<void> {
        throw new MoeError({ code: 'E_CONFIG', op: 'save', problem: 'no name is set', fix: 'set model.name' })
      }
    }
    const { message } = await errorOf(run({ out, checkpointEvery: 4, model: new Unready() }))
    expect(message).toMatch(
      /saving step 4 failed: save: no name is set; the run has no earlier checkpoint; set model\.name$/,
    )
  })

  test('a full disk at the first checkpoint leaves an empty list', async () => {
    const out = await temporaryFolder()
    const error = await errorOf(run({ out, checkpointEvery: 4, model: new FullDisk(1) }))
    expect(error.message).toMatch(/no earlier checkpoint/)
    expect(await checkpointsOf(out)).toEqual([])
  })

  test('NaN in a weight stops the run with an error that names step and parameter, and keeps the checkpoint', async () => {
    const out = await temporaryFolder()
    const model = new BigramModel()
    const failures: unknown[] = []
    const poison: TrainOptions['onEvent'] = event => {
      if (event.type === 'fail') failures.push(event.error)
      if (event.type !== 'step' || event.step !== 6) return
      const values = new Float32Array(72).fill(0.1)
      values[17] = Number.NaN
      model.lm_head.weight.assign(tensor(values, [12, 6]))
    }
    const error = await errorOf(run({ out, checkpointEvery: 4, model, onEvent: poison }))
    expect(failures).toEqual([error])
    expect(error).toMatchObject({ code: 'E_NAN', details: { step: 7, parameter: 'lm_head.weight', kind: 'value' } })
    expect(error.message).toMatch(/step 7 .*lm_head\.weight: 1 of 72 elements/)
    expect(await checkpointsOf(out)).toEqual(['latest', 'step-000004'])
    expect(numbersOf(out)).toHaveLength(6)
  })

  test('a model that an update made infinite is not saved', async () => {
    const out = await temporaryFolder()
    const model = new BigramModel()
    const poison: TrainOptions['onEvent'] = event => {
      if (event.type === 'step' && event.step === 8)
        model.offset.assign(tensor(new Float32Array(12).fill(Number.POSITIVE_INFINITY)))
    }
    const error = await errorOf(run({ out, checkpointEvery: 4, model, onEvent: poison }))
    expect(error).toMatchObject({ code: 'E_NAN', details: { step: 8, parameter: 'offset' } })
    expect(await checkpointsOf(out)).toEqual(['latest', 'step-000004'])
  })

  test('a step with an infinite gradient changes no weight', async () => {
    const model = new BigramModel()
    const broken = Object.assign(model, {
      loss: (batch: Parameters<BigramModel['loss']>[0]) => {
        const output = BigramModel.prototype.loss.call(model, batch)
        return { ...output, loss: output.loss.mul(1e38).mul(1e38) }
      },
    })
    const parameters = namedParameters(broken)
    const optimizer = new AdamW(parameters)
    const before = await model.lm_head.weight.values()
    const order = new TrainingOrder(data.training, { sequenceLength: 8, lookahead: 1, batchSize: 2 })
    const error = await errorOf(trainingStep(broken, parameters, optimizer, order.step(0), { lr: 1, step: 1 }))
    expect(error).toMatchObject({ code: 'E_NAN' })
    expect(await model.lm_head.weight.values()).toEqual(before)
    expect(model.lm_head.weight.grad).toBeNull()
    optimizer.dispose()
    disposeModule(model)
  })

  test('all invalid options are reported at once', async () => {
    const model = new BigramModel()
    const error = await errorOf(train(model, { ...settings, steps: 0, batchSize: 1.5, lr: Number.NaN, resume: true }))
    expect(error).toMatchObject({ code: 'E_CONFIG' })
    for (const text of ['steps is 0', 'batchSize is 1.5', 'lr is NaN', 'resume is given without out'])
      expect(error.message).toContain(text)
    const wrong = { ...settings, schedule: 5, data: undefined } as unknown as TrainOptions
    const more = await errorOf(train(model, wrong))
    for (const text of ['schedule is 5, expected a function', 'data is missing']) expect(more.message).toContain(text)
    const slow = { ...settings, moments: 'bf16', betas: [0.9, 0.999] } as const
    expect((await errorOf(train(model, slow))).message).toMatch(/decay rate of 0\.999/)
    const others = { ...settings, data: ['text'], betas: 0.9, out: 3, signal: new AbortController(), progress: 'yes' }
    const { message } = await errorOf(train(model, others as unknown as TrainOptions))
    for (const name of [
      'data has no training part',
      'betas is 0.9',
      'out is 3',
      'pass its .signal',
      'progress is "yes"',
    ]) {
      expect(message).toContain(name)
    }
    const numbers = { ...settings, eps: 0, weightDecay: Number.NaN, timeLimitSeconds: '60' }
    const ofNumbers = await errorOf(train(model, numbers as unknown as TrainOptions))
    for (const text of ['eps is 0', 'weightDecay is NaN', 'timeLimitSeconds is "60"'])
      expect(ofNumbers.message).toContain(text)
    const custom = { ...settings, optimizer: (of: readonly NamedParameter[]) => new AdamW(of), weightDecay: 0, eps: 1 }
    expect((await errorOf(train(model, custom))).message).toMatch(
      /eps and weightDecay is given, but only the built-in optimizers use it: set it in your function/,
    )
    expect(await errorOf(train(model, undefined as unknown as TrainOptions))).toMatchObject({
      code: 'E_CONFIG',
    })
    disposeModule(model)
  })

  test('a model that is invalid, or whose loss returns invalid values, is rejected', async () => {
    for (const [invalid, message] of [
      [null, /train: the model is null; pass a Module with lookahead and loss/],
      [{}, /the model has no method loss/],
      [
        new (class extends Module {
          lookahead = 1
          loss() {}
        })(),
        /the model has no parameters; store Parameters, Modules/,
      ],
    ] as const) {
      expect((await errorOf(train(invalid as unknown as TrainableModel, settings))).message).toMatch(message)
    }
    const returning = (change: (output: LossOutput) => unknown) => {
      const model = new BigramModel()
      return Object.assign(model, {
        loss: (...input: Parameters<BigramModel['loss']>) => change(BigramModel.prototype.loss.apply(model, input)),
      }) as TrainableModel
    }
    for (const [change, message] of [
      [async output => output, /^loss: the model returned a promise; make it synchronous/],
      [({ loss }) => loss, /returned a single tensor; return \{ loss, nll, count, metrics \}/],
      [() => undefined, /returned undefined/],
      [({ nll, ...others }) => others, /returned nll = undefined, which is not a tensor/],
      [output => ({ ...output, nll: output.nll.expand([2]) }), /returned nll of shape \[2\]/],
      [({ count, ...others }) => others, /returned count = undefined/],
      [({ metrics, ...others }) => others, /returned metrics = undefined/],
      [output => ({ ...output, metrics: { half: 0.5 } }), /returned half = 0.5, which is not a tensor/],
    ] as ReadonlyArray<[(output: LossOutput) => unknown, RegExp]>) {
      const model = returning(change)
      const wrong = [
        await errorOf(train(model, settings)),
        await errorOf(evaluate(model, data.validation, { sequenceLength: 8, batchSize: 1 })),
      ]
      for (const error of wrong)
        expect(error).toMatchObject({ code: 'E_ATTR', message: expect.stringMatching(message) })
      disposeModule(model)
    }
  })

  test('an evaluation without sizes, data or model is rejected', async () => {
    const model = new BigramModel()
    const evaluateAny = evaluate as (...input: unknown[]) => Promise<unknown>
    const sizes = { sequenceLength: 8, batchSize: 1 }
    expect((await errorOf(evaluateAny(model, data.validation, {}))).message).toMatch(
      /sequenceLength is undefined, batchSize is/,
    )
    expect((await errorOf(evaluateAny(model, ['text'], sizes))).message).toMatch(
      /not a TokenDataset.*; pass TokenDataset.fromTexts/,
    )
    expect((await errorOf(evaluateAny(null, data.validation, sizes))).message).toMatch(/evaluate: the model is null/)
    disposeModule(model)
  })

  test('texts without a tokenizer, and a tokenizer with more ids than the model has embeddings, are rejected', async () => {
    const model = new BigramModel()
    const without = await errorOf(train(model, { ...settings, data: { training: ['abc'], validation: [] } }))
    expect(without).toMatchObject({ code: 'E_CONFIG', message: expect.stringMatching(/no tokenizer is given/) })
    const larger = { ...letters, vocabSize: 500 }
    const error = await errorOf(
      train(model, { ...settings, data: { training: ['abc'], validation: [] }, tokenizer: larger }),
    )
    expect(error).toMatchObject({
      code: 'E_DATA',
      message: expect.stringMatching(/ids up to 499, but the model has embeddings for 12 ids/),
    })
    disposeModule(model)
  })
})
