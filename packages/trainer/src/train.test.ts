import { readdir, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { disposeModule, noGrad, quantizeWeights, scope } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { TokenDataset } from './data/token-dataset.ts'
import { evaluate } from './evaluate.ts'
import type { TrainEvent, TrainListener } from './events.ts'
import type { TrainOptions } from './options.ts'
import { readMetrics } from './report/metrics-log.ts'
import { BigramModel, letters, letterTexts, temporaryFolder } from './test-model.ts'
import { backend, checkpointsOf, data, errorOf, run, settings } from './test-run.ts'
import { train } from './train.ts'

describe('a run', () => {
  test('waits for asynchronous listeners', async () => {
    const order: string[] = []
    const onEvent = async (event: TrainEvent) => {
      order.push(`${event.type} begins`)
      await new Promise(resolve => setTimeout(resolve, 5))
      order.push(`${event.type} ends`)
    }
    const out = join(await temporaryFolder(), 'slow')
    await run({ steps: 3, out, evalEvery: 1, checkpointEvery: 1, onEvent })
    // Progress events of an evaluation may overlap; all other listeners finish before the next event.
    const events = order.filter(line => !line.startsWith('evaluating'))
    expect(events.length).toBeGreaterThan(20)
    for (let i = 0; i < events.length; i += 2)
      expect(events.slice(i, i + 2)).toEqual([events[i], events[i].replace('begins', 'ends')])
  })

  test('warns if rows are longer than the context of the model', async () => {
    const noticesOf = async (contextLength: number) => {
      const { events } = await run({ model: Object.assign(new BigramModel(), { contextLength }), steps: 1 })
      return events.flatMap(event => (event.type === 'notice' ? [event.message] : []))
    }
    expect(await noticesOf(settings.sequenceLength)).toEqual([])
    expect(await noticesOf(settings.sequenceLength - 1)).toEqual([
      expect.stringMatching(/^sequenceLength 8 exceeds the model's context of 7 positions/),
    ])
  })

  test('warns if training texts end with another token than generated texts', async () => {
    const ending = (...endTokens: number[]) => Object.assign(new BigramModel(), { endTokens })
    const noticesOf = async (model: BigramModel, training: TokenDataset) => {
      const { events } = await run({ model, data: { training }, steps: 1 })
      return events.flatMap(event => (event.type === 'notice' ? [event.message] : []))
    }
    const documents = TokenDataset.fromTexts(letterTexts(2, 50), letters) // each ends with '</s>', token 11
    expect(await noticesOf(ending(11), documents)).toEqual([])
    expect(await noticesOf(ending(3, 11), documents)).toEqual([])
    expect(await noticesOf(ending(), documents)).toEqual([
      'training texts end with token 11, but generation stops at no token: create the model with eos_token_id: 11',
    ])
    expect(await noticesOf(ending(1), documents)).toEqual([
      expect.stringContaining('stops at token 1: create the model with eos_token_id: 11'),
    ])
    const endless = TokenDataset.fromTexts(letterTexts(2, 50), letters, { eos: null })
    expect(await noticesOf(ending(), endless)).toEqual([])
    expect(await noticesOf(ending(1), endless)).toEqual([
      expect.stringMatching(
        /have no end token, but generation stops at token 1: train the tokenizer with an end token/,
      ),
    ])
    const answer = { tokens: [5, 6, 7, 11, 3], lossMask: [false, false, true, true, false] }
    const answers = TokenDataset.fromExamples([answer, answer, answer])
    expect(await noticesOf(ending(11), answers)).toEqual([])
    expect(await noticesOf(ending(3), answers)).toEqual([expect.stringContaining('eos_token_id: 11')])
    // Documents of token ids have no known end token.
    const tokens = TokenDataset.fromTokens(Array.from({ length: 12 }, () => [1, 2, 4]))
    expect(await noticesOf(ending(3), tokens)).toEqual([])
  })

  test("fails if a listener's promise rejects, and keeps earlier checkpoints", async () => {
    const out = join(await temporaryFolder(), 'rejects')
    const onEvent = async (event: TrainEvent) => {
      if (event.type === 'step' && event.step === 3) throw new Error('of the listener')
    }
    const error = await errorOf(run({ steps: 10, out, checkpointEvery: 2, onEvent }))
    expect(error.message).toBe('of the listener')
    expect(await checkpointsOf(out)).toContain('step-000002')
    expect(await readFile(join(out, 'events.jsonl'), 'utf8')).toMatch(/"type":"fail".*of the listener/)
  })

  test.each([Number.NaN, -1, '0.5'])('rejects an invalid learning rate before the step: %j', async factor => {
    const model = new BigramModel()
    const before = await model.lm_head.weight.values()
    const schedule = (step: number) => (step === 0 ? 0 : (factor as number))
    const error = await errorOf(train(model, { ...settings, steps: 3, schedule }))
    expect(error).toMatchObject({
      code: 'E_CONFIG',
      message: `train: schedule(1) is ${typeof factor === 'string' ? '"0.5"' : factor}; return a finite number of at least 0 for every step; lr is multiplied by it`,
    })
    expect(await model.lm_head.weight.values()).toEqual(before)
    disposeModule(model)
  })

  test('learns, evaluates, and emits its events in order', async () => {
    const out = join(await temporaryFolder(), 'first')
    const { result, events } = await run({ steps: 150, out, evalEvery: 50, checkpointEvery: 60 })
    const steps = events.flatMap(event => (event.type === 'step' ? [event] : []))
    expect(steps.map(({ step }) => step)).toEqual(Array.from({ length: 150 }, (_, i) => i + 1))
    expect(steps[0].nll).toBeGreaterThan(2)
    expect(result.trainingLoss).toBeLessThan(1.5)
    expect(result.validation.loss).toBeLessThan(1.5)
    expect(result).toMatchObject({
      steps: 150,
      interrupted: false,
      stopped: 'finished',
      tokens: 150 * 24,
      backend: 'reference',
    })
    const others = events.flatMap(event =>
      event.type === 'step' || event.type === 'evaluating'
        ? []
        : `${event.type} ${'step' in event ? event.step : ''}`.trim(),
    )
    expect(others).toEqual([
      'start',
      'evaluation 50',
      'checkpoint 60',
      'evaluation 100',
      'checkpoint 120',
      'checkpoint 150',
      'evaluation 150',
      'end',
    ])
  })

  test('writes metrics, a summary and checkpoints with the file names of transformers', async () => {
    const out = await temporaryFolder()
    const { result, events } = await run({
      out,
      checkpointEvery: 3,
      data: { training: letterTexts(20, 50), validation: ['abc'] },
      tokenizer: { ...letters, idToToken: id => `<${id}>`, toJSON: () => ({ version: '1.0' }) },
      eos: 2,
    })
    const lines = readMetrics(join(out, 'metrics.jsonl'))
    expect(lines).toHaveLength(12)
    expect(Object.keys(lines[0])).toEqual([
      'step',
      'loss',
      'nll',
      'lr',
      'gradNorm',
      'tokens',
      'tokensPerSecond',
      'half',
      'maxVio',
      'batches',
    ])
    expect(lines[3].half).toBeCloseTo(lines[3].loss / 2)
    const summary = JSON.parse(await readFile(join(out, 'summary.json'), 'utf8'))
    expect(summary.validation.bitsPerByte).toBe(result.validation.bitsPerByte)
    // The mean over the last tenth of 12 steps, which are steps 11 and 12.
    expect(summary.balance.maxVio).toBeCloseTo((lines[10].maxVio + lines[11].maxVio) / 2)
    expect(summary.peakMemoryBytes).toBeGreaterThan(1e7)
    expect(await checkpointsOf(out)).toEqual(['latest', 'step-000009', 'step-000012'])
    expect(await readFile(join(out, 'checkpoints', 'latest'), 'utf8')).toBe('step-000012\n')
    expect(result.checkpoint).toBe(join(out, 'checkpoints', 'step-000012'))
    expect((await readdir(join(result.checkpoint ?? '', 'model'))).sort()).toEqual([
      'model.safetensors',
      'tokenizer.json',
      'tokenizer_config.json',
    ])
    // The begin token is found by its usual name, the end token is given.
    const config = await readFile(join(result.checkpoint ?? '', 'model', 'tokenizer_config.json'), 'utf8')
    expect(JSON.parse(config)).toEqual({
      tokenizer_class: 'PreTrainedTokenizerFast',
      bos_token: '<10>',
      eos_token: '<2>',
    })
    expect(events.filter(({ type }) => type === 'checkpoint')).toHaveLength(4)
  })

  test('counts end tokens in the loss but not in the bytes', async () => {
    const model = new BigramModel()
    const { validation } = data
    const evaluation = await evaluate(model, validation, { sequenceLength: 16, batchSize: 2 })
    const whole = {
      tokens: validation.tokens,
      documents: Int32Array.from(validation.tokens, (_, i) => validation.documentAt(i)),
      rows: 1,
      length: validation.tokens.length,
    }
    const { nll, count } = scope(() =>
      noGrad(() => {
        const output = model.loss(whole, { training: false })
        return { nll: output.nll, count: output.count }
      }),
    )
    expect(evaluation.tokens).toBe(count)
    expect(count).toBe(3 * 51)
    expect(evaluation.bitsPerByte).toBeCloseTo((await nll.item()) / Math.LN2 / 150, 6)
    nll.dispose()
    disposeModule(model)
  })

  test('uses all data once per epoch for any batch, and weights micro-batches by their counted positions', async () => {
    const whole = await run({ batchSize: 6, steps: 4 })
    const parts = await run({ batchSize: 2, accumulate: 3, steps: 4 })
    const losses = ({ events }: typeof whole) =>
      events.flatMap(event => (event.type === 'step' ? [event.loss, event.gradNorm] : []))
    for (const [i, value] of losses(parts).entries()) expect(value).toBeCloseTo(losses(whole)[i], 5)
    parts.weights.forEach(([name, values], i) => {
      expect(name).toBe(whole.weights[i][0])
      for (const [j, value] of values.entries()) expect(value).toBeCloseTo(whole.weights[i][1][j], 4)
    })
    const batches = parts.events.flatMap(event => (event.type === 'step' ? [event.metrics['batches']] : []))
    expect(batches).toEqual([3, 3, 3, 3])
  })

  test('reports the progress of an evaluation', async () => {
    const { events } = await run({ steps: 4, evalEvery: 3, evalTokens: 40 })
    const shares = (at: number) =>
      events.flatMap(event => (event.type === 'evaluating' && event.step === at ? [event.done] : []))
    for (const at of [3, 4]) {
      expect(shares(at).length).toBeGreaterThan(2)
      expect(shares(at)).toEqual([...shares(at)].sort((a, b) => a - b))
      expect(shares(at).at(-1)).toBe(1)
    }
  })

  test('a notice says if evaluations or checkpoints are requested that there cannot be', async () => {
    const noticesOf = async (options: Partial<TrainOptions>) => {
      const { events } = await run({ steps: 1, ...options })
      return events.flatMap(event => (event.type === 'notice' ? [event.message] : []))
    }
    const { training } = data
    expect(await noticesOf({ evalEvery: 5 })).toEqual([])
    expect(await noticesOf({ data: { training } })).toEqual([])
    expect(await noticesOf({ data: { training }, evalEvery: 5 })).toEqual([
      expect.stringMatching(/^evalEvery is 5, but nothing is evaluated, because the data has no held-out part: pass /),
    ])
    expect(await noticesOf({ checkpointEvery: 5 })).toEqual([
      expect.stringMatching(/^checkpointEvery is 5, but no checkpoint is saved, because out, .*, is not given$/),
    ])
    expect(await noticesOf({ checkpointEvery: 5, out: await temporaryFolder() })).toEqual([])
  })

  test('limits the final evaluation to 32 times evalTokens, with a notice', async () => {
    const final = async (evalTokens?: number) => {
      const { result, events } = await run({ steps: 2, ...(evalTokens && { evalTokens }) })
      const notices = events.flatMap(event => (event.type === 'notice' ? [event.message] : []))
      return { tokens: result.validation.tokens, notices }
    }
    const all = data.validation.predictable
    expect(all).toBeGreaterThan(64)
    expect(await final()).toEqual({ tokens: all, notices: [] })
    expect(await final(Number.POSITIVE_INFINITY)).toEqual({ tokens: all, notices: [] })
    const { tokens, notices } = await final(2)
    expect(tokens).toBeGreaterThan(32)
    // The first window predicts all of its 8 positions, later ones only the second half.
    expect(tokens).toBeLessThan(64 + 8)
    expect(notices).toEqual([
      `the final evaluation uses about 64 of ${data.validation.length} held-out tokens, spread evenly over them (to use all, pass evalTokens: Infinity)`,
    ])
    expect(await errorOf(run({ evalTokens: 0.5 }))).toMatchObject({ code: 'E_CONFIG' })
  })

  test('warns if one step contains the training data several times', async () => {
    const notices = async (batchSize: number) => {
      const { events } = await run({ steps: 1, batchSize, data: { training: data.training } })
      return events.flatMap(event => (event.type === 'notice' ? [event.message] : []))
    }
    const rows = Math.ceil((data.training.length - 1) / settings.sequenceLength)
    expect(await notices(rows)).toEqual([])
    expect(await notices(3 * rows)).toEqual([
      'each step uses the training data 3.0 times: use a smaller batchSize, or more data',
    ])
  })

  test('stores values that a listener logs, with the step', async () => {
    const out = join(await temporaryFolder(), 'logging')
    const onEvent: TrainListener = (event, { log }) => {
      if (event.type === 'step' && event.step % 2 === 0) log({ 'half/loss': event.loss / 2 })
    }
    const { events } = await run({ steps: 4, out, onEvent })
    const losses = events.flatMap(event => (event.type === 'step' ? [event.loss] : []))
    const expected = [2, 4].map(step => ({ type: 'log', step, values: { 'half/loss': losses[step - 1] / 2 } }))
    expect(events.filter(({ type }) => type === 'log')).toEqual(expected)
    const lines = (await readFile(join(out, 'events.jsonl'), 'utf8')).trim().split('\n')
    expect(lines.map(line => JSON.parse(line)).filter(({ type }) => type === 'log')).toMatchObject(expected)

    const wrong: TrainListener = (event, { log }) => event.type === 'step' && log({ accuracy: '0.5' as never })
    expect(await errorOf(run({ onEvent: wrong }))).toMatchObject({
      code: 'E_ATTR',
      message: 'log: accuracy is "0.5"; pass numbers by name: log({ accuracy: 0.5 })',
    })
  })

  test('warns that quantized weights stay frozen', async () => {
    const model = new BigramModel()
    await quantizeWeights(model.embed_tokens, 'bf16')
    const { events } = await run({ model, steps: 2 })
    const notices = events.flatMap(event => (event.type === 'notice' ? [event.message] : []))
    expect(notices).toEqual([expect.stringMatching(/^46.2 % of the model's parameters are quantized/)])
    const all = new BigramModel()
    await quantizeWeights(all, 'bf16')
    expect(await errorOf(run({ model: all }))).toMatchObject({
      code: 'E_CONFIG',
      message: expect.stringMatching(/no trainable parameters: 2 of 3 are quantized/),
    })
  })

  test('stops at its time limit, with a checkpoint', async () => {
    const out = await temporaryFolder()
    const { result, events } = await run({ out, steps: 100_000, timeLimitSeconds: 1e-6 })
    expect(result).toMatchObject({ steps: 1, stopped: 'time', interrupted: false })
    expect(events.at(-2)).toMatchObject({ type: 'stop', reason: 'time', checkpoint: result.checkpoint })
  })

  test('works without held-out data and without a folder', async () => {
    const { result } = await run({ data: { training: data.training } })
    expect(result.validation.bitsPerByte).toBeNaN()
    expect(result.checkpoint).toBeUndefined()
  })

  test('1,000 steps leak neither handles nor memory', async () => {
    setFlagsFromString('--expose-gc')
    const collect = runInNewContext('gc') as () => void
    const used: number[] = []
    const handles: number[] = []
    const model = new BigramModel()
    const before = backend.stats().handles
    await train(model, {
      ...settings,
      steps: 1000,
      evalEvery: 100,
      onEvent: event => {
        if (event.type !== 'step' || event.step % 50 !== 0) return
        collect()
        const { heapUsed, arrayBuffers } = process.memoryUsage()
        used.push(heapUsed + arrayBuffers)
        handles.push(backend.stats().handles)
      },
    })
    expect(backend.stats().handles).toBe(before)
    expect(new Set(handles).size).toBe(1)
    disposeModule(model)
    // The test process itself allocates occasionally, and compiled code may appear late. A leak raises every sample, in
    // every part of the run.
    const minimum = (from: number) => Math.min(...used.slice(from, from + 5))
    const growth = [5, 10].map(from => minimum(from + 5) / minimum(from))
    expect(Math.min(...growth)).toBeLessThan(1.02)
  })
})
