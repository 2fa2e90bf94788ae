/** @file The reported loads of experts, compared with routing choices that are counted one by one. */
import { existsSync } from 'node:fs'
import { appendFile, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { InitOptions, Tensor } from '@moe/core'
import { DeepSeek, type DeepSeekConfigInput, type DeepSeekOptions } from '@moe/deepseek'
import { createBackend } from '@moe/kernels-cpu'
import { auxFree, CapacityMoE } from '@moe/router'
import { afterAll, afterEach, describe, expect, test } from 'vitest'
import type { LoadsEvent, TrainEvent } from '../events.ts'
import type { LayerLoad } from '../model.ts'
import type { TrainOptions } from '../options.ts'
import { smallConfig, smallData } from '../test-deepseek.ts'
import { BigramModel, letterData, removeTemporaryFolders, roundingBackend, temporaryFolder } from '../test-model.ts'
import { train } from '../train.ts'
import { LoadSums, readLoads } from './loads-log.ts'

const backend = await createBackend()
afterAll(() => backend.dispose())
afterEach(() => expect(backend.stats().handles).toBe(0))
afterEach(removeTemporaryFolders)

const [experts, topK, speed] = [8, 2, 0.01]
const config: DeepSeekConfigInput = {
  ...smallConfig,
  n_routed_experts: experts,
  num_experts_per_tok: topK,
  n_group: 4,
  topk_group: 2,
}

interface Choices {
  readonly indices: Int32Array
  readonly mask: Float32Array | undefined
}

/** Records the choices of every gate. */
class RecordsChoices extends DeepSeek {
  /** Choices by step, layer and pass. */
  readonly choices: Choices[][][] = []
  #passes: Array<Promise<Choices>>[] = []

  constructor(options: DeepSeekOptions) {
    super(config, options)
    this.#passes = this.moeLayers.map(() => [])
    for (const [i, layer] of this.moeLayers.entries()) {
      const choose = layer.choose.bind(layer)
      layer.choose = (x, options) => {
        const choice = choose(x, options)
        const read = [choice.indices.values(), options?.mask?.values()] as const
        if (options?.training)
          this.#passes[i].push(
            Promise.all(read).then(([indices, mask]) => ({
              indices: indices as Int32Array,
              mask: mask as Float32Array | undefined,
            })),
          )
        return choice
      }
    }
  }

  override async afterStep(...sum: Parameters<DeepSeek['afterStep']>) {
    this.choices.push(await Promise.all(this.#passes.map(passes => Promise.all(passes))))
    this.#passes = this.moeLayers.map(() => [])
    return super.afterStep(...sum)
  }
}

/** A model other than DeepSeek, with a MoE layer of limited capacity. */
class Switch extends BigramModel {
  moe: CapacityMoE
  layerLoads: readonly LayerLoad[] = []
  readonly #own: Array<{ load: number[]; kept: number }>

  constructor(init: InitOptions, own: Array<{ load: number[]; kept: number }>) {
    super(init)
    this.#own = own
    const sizes = { hidden_size: 6, moe_intermediate_size: 4, n_routed_experts: 4 }
    this.moe = new CapacityMoE({ ...sizes, router: 'switch', capacity_factor: 1 }, { std: 1, ...init })
  }

  protected override hidden(embedded: Tensor, training: boolean): Tensor {
    const [tokens, features] = embedded.shape
    return this.moe.forward(embedded.reshape([1, tokens, features]), { training }).reshape([tokens, features])
  }

  override async afterStep(): Promise<Record<string, number>> {
    const [kept, load] = await Promise.all([this.moe.kept!.item(), this.moe.load!.values()])
    this.moe.reset()
    this.#own.push({ load: Array.from(load), kept })
    const dropped = Array.from(load).reduce((sum, count) => sum + count, -kept)
    this.layerLoads = [{ name: 'switch', load, dropped }]
    return super.afterStep()
  }
}

/** Loads by layer, counted one choice at a time. */
const loadsOf = (step: Choices[][]) =>
  step.map(passes => {
    const load = Array.from({ length: experts }, () => 0)
    for (const { indices, mask } of passes)
      for (const [i, expert] of indices.entries()) if (!mask || mask[Math.floor(i / topK)] === 1) load[expert]++
    return load
  })

const add = (a: readonly number[], b: readonly number[]) => a.map((value, i) => value + b[i])

async function run<Model extends DeepSeek>(model: Model, options: Partial<TrainOptions> = {}) {
  const events: TrainEvent[] = []
  const settings = { steps: 8, batchSize: 2, sequenceLength: 8, lr: 5e-3, progress: false, handleSignals: false }
  try {
    await train(model, {
      data: { training: smallData() },
      ...settings,
      ...options,
      onEvent(event, reporter) {
        events.push(event)
        options.onEvent?.(event, reporter)
      },
    })
  } finally {
    model.dispose()
  }
  return { model, events, loads: events.filter(event => event.type === 'loads') }
}

const objective = { biasSpeed: speed }
const small = (options: DeepSeekOptions = {}) =>
  new DeepSeek(config, { seed: 1, backend, ...(options.balancer ? {} : { objective }), ...options })

describe('a training', () => {
  test('emits loads and biases that match the routing of all its steps and micro-batches', async () => {
    const { model, loads } = await run(new RecordsChoices({ seed: 1, backend, objective }), {
      accumulate: 3,
      loadsEvery: 3,
    })
    expect(loads.map(({ step, steps }) => [step, steps])).toEqual([
      [3, 3],
      [6, 3],
      [8, 2],
    ])
    const steps = model.choices.map(loadsOf)
    let bias = steps[0].map(load => load.map(() => 0))
    for (const { step, steps: number, layers } of loads) {
      const own = steps.slice(step - number, step)
      for (const loadsOfStep of own)
        bias = bias.map((of, layer) => {
          const mean = loadsOfStep[layer].reduce((a, b) => a + b) / experts
          return of.map((value, i) => value + speed * Math.sign(mean - loadsOfStep[layer][i]))
        })
      expect(layers.map(({ name, groups }) => [name, groups])).toEqual([
        ['layers.1', 4],
        ['layers.2', 4],
        ['layers.3', 4],
      ])
      expect(layers.map(({ load }) => load)).toEqual(own.reduce((a, b) => a.map((load, layer) => add(load, b[layer]))))
      for (const [i, { bias: reported = [], dropped, stepMaxVio }] of layers.entries()) {
        const vios = own.map(step => (Math.max(...step[i]) / step[i].reduce((a, b) => a + b)) * experts - 1)
        expect(stepMaxVio).toBeCloseTo(vios.reduce((a, b) => a + b) / number, 5)
        expect(reported).toEqual(bias[i].map(value => expect.closeTo(value, 6)))
        // Rounded to six digits.
        expect(JSON.stringify(reported).length).toBeLessThan(8 * experts)
        expect(dropped).toBeUndefined()
      }
    }
  })

  test('emits the same with recorded steps', async () => {
    const eager = await run(small(), { loadsEvery: 2, record: false })
    const recorded = await run(small(), { loadsEvery: 2 })
    expect(eager.loads).toHaveLength(4)
    expect(recorded.loads).toEqual(eager.loads)
  })

  test('emits the biases of a balancer', async () => {
    const { loads } = await run(small({ balancer: auxFree({ speed: 10 }) }), { loadsEvery: 4 })
    for (const { layers } of loads)
      for (const { bias = [] } of layers) for (const value of bias) expect(Math.abs(value) % 10).toBe(0)
    expect(Math.max(...(loads[1].layers[0].bias as number[]))).toBeGreaterThanOrEqual(10)
  })

  test("emits the number of dropped tokens, with V2's token dropping", async () => {
    // Each of 2 devices keeps at most ceil(choices / 4 / 2) choices of a pass.
    const model = new RecordsChoices({
      seed: 1,
      backend,
      dropping: { devices: 2, capacity_factor: 0.25, undropped: 0 },
    })
    const { loads } = await run(model, { loadsEvery: 8 })
    const [{ layers }] = loads
    for (const [layer, { load, dropped = 0 }] of layers.entries()) {
      let kept = 0
      for (const step of model.choices)
        for (const { indices, mask } of step[layer]) {
          const chosen = [0, 0]
          for (const [i, expert] of indices.entries())
            if (!mask || mask[Math.floor(i / topK)] === 1) chosen[Math.floor(expert / (experts / 2))]++
          const budget = Math.ceil((0.25 * (chosen[0] + chosen[1])) / 2)
          for (const of of chosen) kept += Math.min(budget, of)
        }
      expect(dropped).toBe(load.reduce((a, b) => a + b) - kept)
      expect(dropped).toBeGreaterThan(0)
    }
  })

  test('emits the layerLoads of any model', async () => {
    const own: Array<{ load: number[]; kept: number }> = []
    const loads: LoadsEvent[] = []
    await train(new Switch({ backend: roundingBackend() }, own), {
      data: letterData(),
      steps: 5,
      batchSize: 2,
      sequenceLength: 8,
      accumulate: 2,
      loadsEvery: 3,
      progress: false,
      onEvent: event => event.type === 'loads' && loads.push(event),
    })
    expect(loads.map(({ step, layers }) => [step, layers])).toEqual(
      [own.slice(0, 3), own.slice(3)].map((steps, i) => {
        const load = steps.map(step => step.load).reduce(add)
        const dropped = load.reduce((a, b) => a + b) - steps.reduce((sum, { kept }) => sum + kept, 0)
        expect(dropped).toBeGreaterThan(0)
        return [[3, 5][i], [{ name: 'switch', load, dropped, stepMaxVio: expect.any(Number) }]]
      }),
    )
    // Two micro-batches of two rows of 8 positions.
    expect(own.map(({ load }) => load.reduce((a, b) => a + b))).toEqual(own.map(() => 32))
  })

  test('emits no loads for a model without experts', async () => {
    const out = await temporaryFolder()
    const types = new Set<string>()
    await train(new BigramModel({ backend: roundingBackend() }), {
      data: letterData(),
      steps: 12,
      batchSize: 2,
      sequenceLength: 8,
      out,
      progress: false,
      onEvent: event => types.add(event.type),
    })
    expect(types).not.toContain('loads')
    expect(existsSync(join(out, 'loads.jsonl'))).toBe(false)
  })
})

describe('loads.jsonl', () => {
  const stopAfter = (step: number): Partial<TrainOptions> => {
    const controller = new AbortController()
    return {
      signal: controller.signal,
      onEvent: event => event.type === 'step' && event.step === step && controller.abort(),
    }
  }
  const read = (out: string) => readLoads(join(out, 'loads.jsonl'))
  const untyped = (events: readonly LoadsEvent[]) => events.map(({ type, ...line }) => line)

  test('contains a line per event, which other logs do not contain', async () => {
    const out = await temporaryFolder()
    const { loads } = await run(small(), { out, loadsEvery: 3, checkpointEvery: 4 })
    expect(loads.map(({ step }) => step)).toEqual([3, 4, 6, 8])
    expect(read(out)).toEqual(untyped(loads))
    expect(await readFile(join(out, 'events.jsonl'), 'utf8')).not.toContain('layers.1')
    expect(await readFile(join(out, 'metrics.jsonl'), 'utf8')).not.toContain('layers.1')
  })

  test.each([
    ['every tenth step by default', undefined, [10, 12]],
    ['never', 0, []],
    ['every step', 1, Array.from({ length: 12 }, (_, i) => i + 1)],
  ])('is written %s', async (_, loadsEvery, steps) => {
    const { loads } = await run(small(), { steps: 12, loadsEvery })
    expect(loads.map(({ step }) => step)).toEqual(steps)
  })

  test.each([-1, 1.5, Number.NaN, '10'])('rejects loadsEvery %j', async loadsEvery => {
    const failing = run(small(), { loadsEvery: loadsEvery as number })
    await expect(failing).rejects.toMatchObject({ code: 'E_CONFIG', message: expect.stringMatching(/loadsEvery/) })
  })

  test('of a killed and resumed run equals that of an uninterrupted one', async () => {
    const [whole, out] = [await temporaryFolder(), await temporaryFolder()]
    const settings = { schedule: () => 1, loadsEvery: 3, checkpointEvery: 4 }
    await run(small(), { ...settings, out: whole })
    const failing = run(small(), {
      ...settings,
      out,
      onEvent(event) {
        if (event.type === 'step' && event.step === 7) throw new Error('enough')
      },
    })
    await expect(failing).rejects.toThrow('enough')
    expect(read(out).map(({ step, layers }) => [step, layers[0].bias !== undefined])).toEqual([
      [3, true],
      [4, true],
      [6, true],
    ])
    // A crash may leave a partial line.
    await appendFile(join(out, 'loads.jsonl'), '{"step":7,"st')
    await run(small(), { ...settings, out, resume: true })
    expect(await readFile(join(out, 'loads.jsonl'), 'utf8')).toBe(await readFile(join(whole, 'loads.jsonl'), 'utf8'))
  })

  test('of an interrupted run contains the loads of every step', async () => {
    const out = await temporaryFolder()
    const settings = { schedule: () => 1, loadsEvery: 3, out }
    await run(small(), { ...settings, ...stopAfter(5) })
    await run(small(), { ...settings, resume: true })
    expect(read(out).map(({ step, steps }) => [step, steps])).toEqual([
      [3, 3],
      [5, 2],
      [6, 1],
      [8, 2],
    ])
    const whole = await run(small(), { schedule: () => 1, loadsEvery: 8 })
    const sum = (layer: number) =>
      read(out)
        .map(({ layers }) => layers[layer].load)
        .reduce(add)
    expect(whole.loads[0].layers.map(({ load }) => load)).toEqual([0, 1, 2].map(sum))
  })

  test('contains the loads before a failed step, without biases', async () => {
    const out = await temporaryFolder()
    const schedule = (step: number) => (step === 4 ? Number.MAX_VALUE : 1)
    await expect(run(small(), { schedule, loadsEvery: 3, out })).rejects.toMatchObject({ code: 'E_NAN' })
    expect(read(out).map(({ step, layers }) => [step, layers[0].bias !== undefined])).toEqual([
      [3, true],
      [5, false],
    ])
  })

  test('is removed when the run is overwritten', async () => {
    const out = await temporaryFolder()
    await run(small(), { out, loadsEvery: 2 })
    await run(small(), { out, overwrite: true, steps: 2, loadsEvery: 2 })
    expect(read(out).map(({ step }) => step)).toEqual([2])
    expect(() => readLoads(undefined as unknown as string)).toThrow(/readLoads/)
  })
})

test('LoadSums includes layers that appear later, and is reset by take', async () => {
  const sums = new LoadSums()
  const layer = (name: string, load: number[], dropped?: number): LayerLoad => ({ name, load, dropped })
  sums.add([layer('a', [1, 2])])
  sums.add([layer('a', [3, 0]), layer('b', [4], 1)])
  sums.add()
  expect(await sums.take(9, { biases: true })).toEqual({
    type: 'loads',
    step: 9,
    steps: 3,
    layers: [
      // The mean of 1/3 and 1, over the two steps that have the layer.
      { name: 'a', load: [4, 2], stepMaxVio: 0.666667 },
      { name: 'b', load: [4], stepMaxVio: 0, dropped: 1 },
    ],
  })
  expect(await sums.take(9, { biases: true })).toBe(null)
})
