/** @file Errors of wrong calls: each names the function that was called, the wrong value, and what to pass. */
import { beforeEach, expect, test } from 'vitest'
import * as core from './index.ts'
import { referenceBackend } from './reference/index.ts'

const { arange, fromHost, full, ones, rand, randn, tensor, zeros } = core
const { Embedding, Linear, Parameter, Random, RmsNorm, SwigluMlp } = core

beforeEach(() => core.setDefaultBackend(referenceBackend()))

// Calls as in plain JavaScript, where no compiler reports the mistake.
const as = <T>(value: unknown) => value as T
const random = () => new Random(1)
const x = () => ones([2, 3])
const ids = () => tensor(Int32Array.of(0, 1))
const weight = () => new Linear(3, 2).weight
const freed = () => {
  const t = ones([2, 3])
  t.dispose()
  return t
}

const sizes = (op: string, shape: string) =>
  `E_SHAPE ${op}: expected sizes that are non-negative integers, got ${shape}; pass a shape such as [2, 3]`
const list = 'pass an array such as [2, 3]'
const noTensor = 'not a tensor; pass a tensor, such as tensor(numbers, shape)'
const awaited = "pass an awaited backend: await firstAvailable([() => import('@moe/kernels-cpu')])"
const noModule = 'pass an awaited instance of a class that extends Module from this copy of @moe/core'

test.each<[string, () => unknown, string]>([
  // Creation
  ['zeros([-1])', () => zeros([-1]), sizes('zeros', '[-1]')],
  ['ones([2.5])', () => ones([2.5]), sizes('ones', '[2.5]')],
  ['full([NaN], 1)', () => full([Number.NaN], 1), sizes('full', '[NaN]')],
  ['zeros(3)', () => zeros(as(3)), `E_SHAPE zeros: the shape is 3, not an array; ${list}`],
  ['zeros([1], { dtype })', () => zeros([1], { dtype: as('f64') }), 'E_DTYPE zeros: "f64" is not a dtype; pass one of'],
  [
    'zeros, promise',
    () => zeros([1], { backend: as(Promise.resolve()) }),
    `E_ATTR zeros: the backend is a promise; ${awaited}`,
  ],
  [
    'full([2])',
    () => full([2], as(undefined)),
    'E_ATTR full: the value is undefined, expected a number; pass one: full(',
  ],
  ['tensor, count', () => tensor([1, 2, 3], [2, 2]), 'E_SHAPE tensor: got 3 values for shape [2,2]; pass 4 values, or'],
  ['tensor, shape', () => tensor([1], [-1]), sizes('tensor', '[-1]')],
  [
    'tensor, string',
    () => tensor(as([1, 'a'])),
    'E_ATTR tensor: value 1 is the string "a"; pass a flat array of numbers',
  ],
  ['tensor, nested', () => tensor(as([1, 2, [3]])), 'E_ATTR tensor: value 2 is an array; pass a flat array'],
  ['tensor, text', () => tensor(as('12')), 'E_ATTR tensor: the values are the string "12"; pass a flat array'],
  ['tensor, bigint', () => tensor(as(BigInt64Array.of(1n))), 'E_ATTR tensor: value 0 is the bigint 1; pass'],
  ['arange(2.5)', () => arange(2.5), 'E_ATTR arange: n is 2.5, expected a non-negative integer; pass the number of'],
  ['arange(-1)', () => arange(-1), 'E_ATTR arange: n is -1, expected'],
  ['randn([-2])', () => randn([-2], random()), sizes('randn', '[-2]')],
  ['rand([-2])', () => rand([-2], random()), sizes('rand', '[-2]')],
  [
    'randn, std',
    () => randn([2], random(), { std: -1 }),
    'E_ATTR randn: std is -1, expected a number of at least 0; pass',
  ],
  [
    'rand, range',
    () => rand([2], random(), { low: 2 }),
    'E_ATTR rand: low is 2 and high is 1; pass numbers with low <= high',
  ],
  [
    'fromHost, array',
    () => fromHost(new Int32Array(2), [2], 'f32'),
    'E_DTYPE fromHost: expected a Float32Array for f32, got an Int32Array; pass such an array, or numbers to tensor(',
  ],
  [
    'fromHost, list',
    () => fromHost(as([1]), [1], 'bf16'),
    'E_DTYPE fromHost: expected a Uint16Array for bf16, got an array;',
  ],
  [
    'fromHost, count',
    () => fromHost(new Float32Array(3), [2], 'f32'),
    'E_SHAPE fromHost: got 3 values for shape [2]; pass 2',
  ],

  // Layers
  [
    'Linear(3.5, 1)',
    () => new Linear(3.5, 1),
    'E_CONFIG Linear: inputs is 3.5, expected a positive integer; pass sizes: new Linear(inputs, outputs)',
  ],
  ['Linear(3)', () => new Linear(3, as(undefined)), 'E_CONFIG Linear: outputs is undefined, expected'],
  ['Linear("3", 1)', () => new Linear(as('3'), 1), 'E_CONFIG Linear: inputs is "3", expected'],
  ['Embedding(0, 2)', () => new Embedding(0, 2), 'E_CONFIG Embedding: rows is 0, expected'],
  ['RmsNorm(-1)', () => new RmsNorm(-1), 'E_CONFIG RmsNorm: features is -1, expected'],
  [
    'RmsNorm, eps',
    () => new RmsNorm(2, as({})),
    'E_CONFIG RmsNorm: eps is an Object, expected a number of at least 0; pass',
  ],
  ['SwigluMlp(2)', () => new SwigluMlp(2, as(undefined)), 'E_CONFIG SwigluMlp: hidden is undefined, expected'],
  [
    'Linear, std',
    () => new Linear(2, 2, { std: as('0') }),
    'E_CONFIG Linear: std is "0", expected a number of at least 0; pass',
  ],
  [
    'Linear, random',
    () => new Linear(2, 2, { random: as(3) }),
    'E_CONFIG Linear: random is the number 3, not a generator; pass',
  ],
  [
    'Linear, weights',
    () => new Linear(2, 2, { weights: as('int3') }),
    'E_ATTR Linear: unknown weight format "int3"; choose one',
  ],
  [
    'Linear, backend',
    () => new Linear(2, 2, { backend: as('cpu') }),
    `E_ATTR Linear: the backend is the string "cpu"; ${awaited}`,
  ],
  ['a parameter', () => core.normalParameter([-1], 'w'), sizes('normalParameter', '[-1]')],
  [
    'input of Linear',
    () => new Linear(2, 2).forward(x()),
    'E_SHAPE linear: x has shape [2,3], the weight [2,2]; pass x [..., 2]',
  ],
  [
    'ids of Linear',
    () => new Linear(2, 2).forward(ids()),
    "E_DTYPE linear: x has dtype i32, expected f32; cast it with .cast('f32')",
  ],
  [
    'floats of Embedding',
    () => new Embedding(3, 2).forward(x()),
    'E_DTYPE Embedding: ids has dtype f32, expected i32; cast it',
  ],
  [
    'number for Embedding',
    () => new Embedding(3, 2).forward(as(1)),
    `E_ATTR Embedding: ids is the number 1, ${noTensor}`,
  ],
  [
    'input of RmsNorm',
    () => new RmsNorm(2).forward(x()),
    'E_SHAPE rmsNorm: x has shape [2,3], the weight [2]; pass x [..., 2]',
  ],

  // Parameters
  [
    'assign, shape',
    () => weight().assign(ones([3, 2])),
    'E_SHAPE assign: the parameter is f32 [2,3] on reference, but the other tensor is f32 [3,2] on reference; pass a tensor of shape [2,3]',
  ],
  ['assign, dtype', () => weight().assign(x().cast('i32')), "i32 [2,3] on reference; cast it with .cast('f32')"],
  [
    'assign, backend',
    () => weight().assign(ones([2, 3], { backend: referenceBackend() })),
    'f32 [2,3] on another reference; copy it with await x.to(parameter.backend)',
  ],
  ['assign, list', () => weight().assign(as([1])), `E_ATTR assign: the new value is an array, ${noTensor}`],
  [
    'assign, freed',
    () => weight().assign(freed()),
    'E_DISPOSED assign: an input of shape [2,3] was already freed; return it from',
  ],
  ['swap', () => weight().swap(new Linear(2, 3).weight), 'E_SHAPE swap: the parameter is f32 [2,3]'],
  ['Parameter(3)', () => new Parameter(as(3)), `E_ATTR Parameter: the initial value is the number 3, ${noTensor}`],
  [
    'Parameter, freed',
    () => new Parameter(freed()),
    'E_DISPOSED Parameter: an input of shape [2,3] was already freed;',
  ],

  // Movement and reductions
  [
    'slice',
    () => x().slice([0, 0], [3, 3]),
    'E_SHAPE slice: starts [0,0] and sizes [3,3] are out of range for [2,3]; pass a start and',
  ],
  ['slice(0, 1)', () => x().slice(as(0), as(1)), `E_SHAPE slice: starts is 0, not an array; ${list}`],
  [
    'narrow',
    () => x().narrow(1, 0, 4),
    'E_SHAPE narrow: start 0 and end 4 are out of range for axis 1 of [2,3]; pass 0 <= start <= end <= 3; the end is exclusive',
  ],
  [
    'narrow without end',
    () => x().narrow(1, 0, as(undefined)),
    'E_SHAPE narrow: start 0 and end undefined are out of range',
  ],
  [
    'permute',
    () => x().permute([0]),
    'E_SHAPE permute: axes [0] are not a permutation of the axes of [2,3]; pass each axis from 0 to 1 once',
  ],
  [
    'expand',
    () => x().expand([3, 3]),
    'E_SHAPE expand: [2,3] does not broadcast to [3,3]; counting axes from the right, change only sizes of 1',
  ],
  [
    'pad',
    () => x().pad([1], [1]),
    'E_SHAPE pad: before [1] and after [1] do not fit [2,3]; pass a non-negative integer for each axis',
  ],
  [
    'setRows, rows of another size',
    () => core.setRows(x(), ids(), ones([2, 4])),
    'E_SHAPE setRows: source has shape [2,4], expected [2,3]',
  ],
  [
    'setRows, another number of rows',
    () => core.setRows(x(), ids(), ones([1, 3])),
    'E_SHAPE setRows: source has shape [1,3], expected [2,3]',
  ],
  [
    'setRows, a matrix of indices',
    () => core.setRows(x(), ids().reshape([2, 1]), ones([2, 3])),
    'E_SHAPE setRows: index has shape [2,1], expected [*]',
  ],
  ['pad(1, 1)', () => x().pad(as(1), as(1)), `E_SHAPE pad: before is 1, not an array; ${list}`],
  ['sum("0")', () => x().sum(as('0')), 'E_SHAPE sum: axes is "0", not an array;'],
  ['mean of i32', () => ids().mean(), "E_DTYPE mean: input has dtype i32, expected f32; cast it with .cast('f32')"],
  ['i32 + 0.5', () => ids().add(0.5), 'E_DTYPE add: 0.5 would lose its fraction, because the tensor is i32; cast'],

  // Rows, lists and inputs of ops
  ['takeRows(0)', () => x().takeRows(as(0)), `E_ATTR takeRows: index is the number 0, ${noTensor}`],
  [
    'takeRows of a scalar',
    () => ones([]).takeRows(ids()),
    'E_SHAPE takeRows: x is a scalar, which has no rows; pass a tensor with',
  ],
  [
    'scatterAddRows',
    () => core.scatterAddRows(ids(), x(), as(undefined)),
    'E_SHAPE scatterAddRows: rows is undefined, expected a non-negative integer; pass',
  ],
  ['where', () => core.where(as(true), x(), x()), `E_ATTR where: condition is the boolean true, ${noTensor}`],
  ['crossEntropy', () => core.crossEntropy(x(), as([0, 1])), `E_ATTR crossEntropy: targets is an array, ${noTensor}`],
  [
    'attention',
    () => core.attention(x(), x(), x()),
    'E_SHAPE attention: q has shape [2,3], expected [*,*,*,*]; pass q [B, T, H, Dk]',
  ],
  [
    'globalNorm',
    () => core.globalNorm(as(x())),
    'E_SHAPE globalNorm: the argument is a Tensor, not an array; pass an array of tensors',
  ],
  ['quantize', () => core.quantize(x(), as(128)), 'E_SHAPE quantize: block is 128, not an array;'],
  [
    'gradients',
    () => core.gradients(weight().sum(), as<core.Tensor[]>(3)),
    'E_SHAPE gradients: of is 3, not an array; pass an array of tensors',
  ],
  [
    'backwardInput',
    () => core.backwardInput(as(x()), [], []),
    'E_SHAPE backwardInput: outputs is a Tensor, not an array;',
  ],

  // Functions, modules and generators
  [
    'scope(3)',
    () => core.scope(as(3)),
    'E_ATTR scope: expected a function, got the number 3; pass one, such as scope(() => …)',
  ],
  ['noGrad(x)', () => core.noGrad(as(x())), 'E_ATTR noGrad: expected a function, got a Tensor; pass one'],
  [
    'checkpoint(3)',
    () => core.checkpoint(as(3), x()),
    'E_ATTR checkpoint: expected a function, got the number 3; pass one',
  ],
  ['stateDict(3)', () => core.stateDict(as(3)), `E_ATTR stateDict: the module is the number 3; ${noModule}`],
  ['zeroGrad(null)', () => core.zeroGrad(as(null)), `E_ATTR zeroGrad: the module is null; ${noModule}`],
  ['addAdapters(3)', () => core.addAdapters(as(3)), `E_ATTR addAdapters: the module is the number 3; ${noModule}`],
  [
    'weightBytes(3)',
    () => core.weightBytes(as(3)),
    'E_ATTR weightBytes: expected a module or a parameter, got the number 3; pass',
  ],
  [
    'entriesSource(3)',
    () => core.entriesSource(as(3)),
    'E_ATTR entriesSource: the entries are the number 3; pass those of stateDict(module)',
  ],
  [
    'integer(0)',
    () => random().integer(0),
    'E_ATTR Random.integer: n is 0, expected a positive integer; pass the number of values',
  ],
  [
    'uniform(-1)',
    () => random().uniform(-1),
    'E_ATTR Random.uniform: the length is -1, expected a non-negative integer; pass',
  ],
  [
    'normal(2, NaN)',
    () => random().normal(2, Number.NaN),
    'E_ATTR Random.normal: std is NaN, expected a number of at least 0; pass',
  ],
  ['Random.shuffle', () => random().shuffle(as(3)), 'E_ATTR Random.shuffle: the items are the number 3; pass an array'],
  ['Random.shuffle, text', () => random().shuffle(as('abc')), 'E_ATTR Random.shuffle: the items are the string "abc"'],
])('%s', (_, call, message) => {
  let error: unknown
  try {
    call()
  } catch (thrown) {
    error = thrown
  }
  expect(core.isMoeError(error) && `${error.code} ${error.message}`).toContain(message)
})

test('promises reject with the function that was called', async () => {
  const backend = as<core.Backend>('cpu')
  await expect(x().to(backend)).rejects.toThrow(`to: the backend is the string "cpu"; ${awaited}`)
  const format = as<core.WeightFormat>('int3')
  await expect(core.quantizeWeights(new Linear(2, 2), format)).rejects.toThrow('quantizeWeights: unknown weight format')
  await expect(core.quantizeWeights(as(3), 'int8')).rejects.toThrow('quantizeWeights: the module is the number 3')
  await expect(core.reduceGradients(as(3), async () => [])).rejects.toThrow('not an array; pass an array of parameters')
})

test('seedDefaultRandom rejects an invalid seed without using it', () => {
  expect(() => core.seedDefaultRandom(1.5)).toThrow('Random: the seed is 1.5; pass an integer')
  expect(() => new Linear(2, 2)).not.toThrow()
})

test('a linear layer accepts a vector, even with an adapter or quantized', async () => {
  const layer = new Linear(4, 3, { random: random() })
  const row = randn([4], new Random(2))
  const expectSame = async () => {
    const y = layer.forward(row)
    expect(y.shape).toEqual([3])
    expect(await y.values()).toEqual(await layer.forward(row.reshape([1, 4])).values())
  }
  await expectSame()
  core.addAdapters(layer, { rank: 2 })
  await expectSame()
  await core.quantizeWeights(layer, 'int8')
  await expectSame()
})
