import { beforeAll, describe, expect, test } from 'vitest'
import { backward } from '../autograd/backward.ts'
import type { Backend } from '../backend.ts'
import { ones, tensor } from '../create.ts'
import { setDefaultBackend } from '../default-backend.ts'
import { Parameter } from '../parameter.ts'
import { Random } from '../random.ts'
import { referenceBackend } from '../reference/index.ts'
import { scope } from '../scope.ts'
import type { Tensor } from '../tensor.ts'
import { Embedding, forkInit, type InitOptions, Linear, RmsNorm, SwigluMlp, seedDefaultRandom } from './layers.ts'
import { disposeModule, Module, namedParameters, namedStreams, parameterCount, trainable, zeroGrad } from './module.ts'

let backend: Backend
beforeAll(() => {
  backend = referenceBackend()
  setDefaultBackend(backend)
})

class Experts extends Module {
  up_proj = new Parameter(ones([2, 3]))
  override readonly stacked = { up_proj: (i: number) => `${i}.up_proj.weight` }
}

class Block extends Module {
  mlp: SwigluMlp
  constructor(init: InitOptions) {
    super()
    this.mlp = new SwigluMlp(2, 3, forkInit(init, 'mlp'))
  }
}

class Model extends Module {
  embed = new Embedding(5, 2)
  layers: Block[]
  experts = new Experts()
  head: Linear
  bias = new Parameter(ones([2]), { trainable: false })
  wrapper: Block
  override readonly transparent = ['wrapper']
  readonly size = 3
  readonly notes = { unrelated: [1, 2] }
  readonly #hidden = new Parameter(ones([9]))

  constructor() {
    super()
    const init = { random: new Random(1) }
    this.layers = [new Block(forkInit(init, '0')), new Block(forkInit(init, '1'))]
    this.head = new Linear(2, 5, init)
    this.head.weight = this.embed.weight
    this.wrapper = new Block(init)
  }

  hidden(): Parameter {
    return this.#hidden
  }
}

describe('namedParameters', () => {
  test('rejects what is not a module', () => {
    for (const none of [undefined, Promise.resolve(new Linear(1, 1)), { weight: 1 }] as unknown[])
      expect(() => namedParameters(none as Module)).toThrow(
        expect.objectContaining({ code: 'E_ATTR', message: expect.stringMatching(/the module is .*awaited/) }),
      )
  })

  test('the error of a linear layer names the expected shape', () => {
    expect(() => new Linear(2, 3).forward(ones([4, 5]))).toThrow(
      'linear: x has shape [4,5], the weight [3,2]; pass x [..., 2]',
    )
  })

  test('namedStreams names random streams in the same way', () => {
    class Drawing extends Module {
      first = new Random(1)
      inner = [new Block({}), Object.assign(new Block({}), { noise: new Random(2), again: this.first })]
      override readonly transparent = ['inner']
    }
    const model = new Drawing()
    expect(namedStreams(model, 'model').map(({ name, random }) => [name, random.seed])).toEqual([
      ['model.first', 1],
      ['model.1.noise', 2],
    ])
    expect(namedStreams(new Block({}))).toEqual([])
    expect(() => namedStreams({} as Module)).toThrow(expect.objectContaining({ code: 'E_ATTR' }))
    disposeModule(model)
  })

  test('keys are field paths in field order; shared parameters appear once, without transparent names and private fields', () => {
    const model = new Model()
    const names = (layer: string) => ['gate_proj', 'up_proj', 'down_proj'].map(name => `${layer}mlp.${name}.weight`)
    expect(namedParameters(model).map(({ name }) => name)).toEqual([
      'embed.weight',
      ...names('layers.0.'),
      ...names('layers.1.'),
      'experts.up_proj',
      'bias',
      ...names(''),
    ])
    const byName = new Map(namedParameters(model, 'model').map(entry => [entry.name, entry]))
    expect(byName.get('model.experts.up_proj')?.slices).toEqual([
      'model.experts.0.up_proj.weight',
      'model.experts.1.up_proj.weight',
    ])
    expect(byName.get('model.embed.weight')?.slices).toBeUndefined()
    expect([...byName.values()].some(({ parameter }) => parameter === model.hidden())).toBe(false)
    disposeModule(model)
  })

  test('a module inside itself is visited once', () => {
    class Loop extends Module {
      weight = new Parameter(ones([1]))
      self: Module = this
    }
    expect(namedParameters(new Loop()).map(({ name }) => name)).toEqual(['weight'])
  })
})

test('parameterCount, trainable, zeroGrad and disposeModule include all parameters of a model', () => {
  const model = new Model()
  const mlp = 3 * 2 * 3
  expect(parameterCount(model)).toBe(5 * 2 + 2 * 3 + 3 * mlp)
  expect(trainable(model)).not.toContain(model.bias)
  scope(() => backward(model.head.forward(model.embed.forward(tensor(Int32Array.of(1)))).sum()))
  expect(model.embed.weight.grad).not.toBeNull()
  zeroGrad(model)
  expect(model.embed.weight.grad).toBeNull()
  model.hidden().dispose()
  disposeModule(model)
  expect(namedParameters(model).every(({ parameter }) => parameter.disposed)).toBe(true)
})

describe('initialization', () => {
  const values = async (layer: Linear) => Array.from(await layer.weight.values())

  test('the same generator and name give the same weights on any backend, and another name others', async () => {
    const make = (name: string, target = backend) =>
      new Linear(4, 4, { ...forkInit({ random: new Random(3) }, name), backend: target })
    expect(await values(make('q'))).toEqual(await values(make('q', referenceBackend())))
    expect(await values(make('q'))).not.toEqual(await values(make('k')))
  })

  test('modules that share a generator get different weights, and the first the same as alone', async () => {
    const all = async (modules: Module[]) => {
      const weights = modules.flatMap(module => namedParameters(module).map(({ parameter }) => parameter.values()))
      return (await Promise.all(weights)).map(values => Array.from(values).join())
    }
    const make = (init: InitOptions, n: number) => [
      ...Array.from({ length: n }, () => new Linear(3, 3, init)),
      ...Array.from({ length: n }, () => new SwigluMlp(3, 3, forkInit(init, 'mlp'))),
      ...Array.from({ length: n }, () => new SwigluMlp(3, 3, init)),
    ]
    const three = await all(make({ random: new Random(3) }, 3))
    expect(new Set(three).size).toBe(3 * (1 + 3 + 3))
    expect(await all(make({ random: new Random(3) }, 3))).toEqual(three)
    const first = [three[0], ...three.slice(3, 6), ...three.slice(12, 15)]
    expect(await all(make({ random: new Random(3) }, 1))).toEqual(first)
    // A name identifies its stream, whatever else is drawn or created.
    const random = new Random(3)
    random.normal(5)
    new Linear(2, 2, forkInit({ random }, 'other'))
    expect(await all([new Linear(3, 3, { random })])).toEqual([three[0]])
    expect(three[0]).toBe(Array.from(new Random(3).fork('weight').normal(9, 0.02)).join())
  })

  test('modules without a generator each take the next stream, and a new seed restarts the streams', async () => {
    seedDefaultRandom(5)
    const [a, b] = [new Linear(3, 3), new Linear(3, 3)]
    expect(await values(a)).not.toEqual(await values(b))
    seedDefaultRandom(5)
    expect(await values(new Linear(3, 3))).toEqual(await values(a))
    seedDefaultRandom(0)
  })

  test('weights are normal with the given deviation; norms start at one', async () => {
    const layer = new Linear(100, 100, { random: new Random(1), std: 0.5 })
    const weights = await values(layer)
    const deviation = Math.sqrt(weights.reduce((sum, x) => sum + x * x, 0) / weights.length)
    expect(deviation).toBeCloseTo(0.5, 1)
    expect(Array.from(await new RmsNorm(3).weight.values())).toEqual([1, 1, 1])
  })
})

describe('Parameter', () => {
  test('swap exchanges memory and changes both versions', async () => {
    const [one, other] = [new Parameter(tensor([1, 2])), new Parameter(tensor([3, 4]), { trainable: false })]
    const before = [one.handle, other.handle]
    one.swap(other)
    expect([one.handle, other.handle]).toEqual([before[1], before[0]])
    expect(await one.values()).toEqual(Float32Array.of(3, 4))
    expect([one.trainable, other.trainable, one.version, other.version]).toEqual([true, false, 1, 1])
    const longer = new Parameter(tensor([1, 2, 3]))
    expect(() => one.swap(longer)).toThrow(
      'swap: the parameter is f32 [2] on reference, but the other tensor is f32 [3]',
    )
    expect(await other.values()).toEqual(Float32Array.of(1, 2))
    for (const parameter of [one, other, longer]) parameter.dispose()
  })

  test('takes ownership of the memory of its initial tensor and of assigned ones', async () => {
    const first = tensor([1, 2])
    const parameter = new Parameter(first)
    expect(first.disposed).toBe(true)
    const handles = backend.stats().handles
    const next = tensor([3, 4])
    parameter.assign(next)
    expect(next.disposed).toBe(true)
    expect(Array.from(await parameter.values())).toEqual([3, 4])
    expect(backend.stats().handles).toBe(handles)
    parameter.dispose()
  })

  test('keeps its elements if it is assigned to itself, as by an op that changed nothing', async () => {
    const parameter = new Parameter(tensor([1, 2]))
    parameter.assign(parameter.reshape([2]))
    expect(await parameter.values()).toEqual(Float32Array.of(1, 2))
    parameter.dispose()
  })

  test('takes only its own shape, dtype and backend', () => {
    const parameter = new Parameter(tensor([1, 2]))
    const other: Backend = { ...referenceBackend(), name: 'elsewhere' }
    const cases: Array<[Tensor, RegExp]> = [
      [
        tensor([1]),
        /f32 \[2\] on reference, but the other tensor is f32 \[1\] on reference; pass a tensor of shape \[2\]/,
      ],
      [tensor(Int32Array.of(1, 2)), /is i32 \[2\] on reference; cast it with \.cast\('f32'\)/],
      [tensor([1, 2], [2], { backend: other }), /on elsewhere; copy it/],
    ]
    for (const [next, message] of cases) {
      expect(() => parameter.assign(next)).toThrow(message)
      expect(next.disposed).toBe(false)
    }
  })

  test('dispose frees its gradient too', () => {
    const handles = backend.stats().handles
    const parameter = new Parameter(tensor([1, 2]))
    scope(() => backward(parameter.sum()))
    expect(backend.stats().handles).toBe(handles + 2)
    parameter.dispose()
    expect(backend.stats().handles).toBe(handles)
  })
})
