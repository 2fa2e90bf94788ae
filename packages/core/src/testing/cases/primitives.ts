/**
 * @file Cases of the primitives: common sizes, tails, broadcasting, empty tensors, special values, and every supported
 * dtype.
 */
import type { BinaryCode, UnaryCode } from '../../ops.ts'
import { f32, given, i32, mask, type OpCase, opCase, uniform } from '../case.ts'
import { tolerances } from '../compare.ts'

const { NaN: nan, POSITIVE_INFINITY: inf } = Number
const special = [0, -0, 1, -1, 0.5, -0.5, 2, -2, 88, -88, 1e-3, -1e-3, inf, -inf, nan, 3.7]

const unaryInputs: { readonly [C in UnaryCode]: ReturnType<typeof f32> } = {
  neg: f32(5, 7),
  abs: f32(5, 7),
  sign: f32(5, 7),
  exp: uniform(-4, 4, 133),
  log: uniform(0.01, 30, 133),
  sqrt: uniform(0.01, 30, 133),
  rsqrt: uniform(0.01, 30, 133),
  sin: uniform(-12, 12, 133),
  cos: uniform(-12, 12, 133),
  tanh: uniform(-12, 12, 133),
  sigmoid: uniform(-20, 20, 133),
  floor: uniform(-9, 9, 133),
}

const unaryCases = (Object.keys(unaryInputs) as UnaryCode[]).flatMap(code => [
  opCase('unary', code, [unaryInputs[code]], { code }),
  opCase('unary', `${code} of special values`, [given('f32', [16], special)], { code }, { gradient: false }),
])

const binaryCodes: readonly BinaryCode[] = ['add', 'sub', 'mul', 'div', 'max', 'min', 'pow']
/** Away from zero, so that quotients, powers and their gradients are well-conditioned. */
const right = (...shape: number[]) => uniform(0.5, 3, ...shape)
const left = (...shape: number[]) => uniform(0.2, 4, ...shape)

const binaryCases = binaryCodes.flatMap(code => [
  opCase('binary', `${code}, same shape`, [left(3, 5, 7), right(3, 5, 7)], { code }),
  opCase('binary', `${code}, scalar`, [left(19), right()], { code }),
  opCase('binary', `${code}, scalar left`, [left(), right(19)], { code }),
  opCase('binary', `${code}, row`, [left(4, 33), right(33)], { code }),
  opCase('binary', `${code}, column`, [left(4, 33), right(4, 1)], { code }),
  opCase('binary', `${code}, both sides grow`, [left(3, 1, 5), right(2, 1)], { code }),
  opCase('binary', `${code}, empty`, [left(0, 3), right(1, 3)], { code }, { gradient: false }),
])

const codes = { add: 'add', sub: 'sub', mul: 'mul', div: 'div', max: 'max', min: 'min' } as const
const integerCases = Object.values(codes).map(code =>
  opCase(
    'binary',
    `${code} of integers`,
    [i32(-50, 50, 4, 9), i32(-3, 4, 9)],
    { code },
    { tolerance: tolerances.exact },
  ),
)

const large = opCase('binary', 'add of more than one thread takes', [f32(130, 1031), f32(130, 1031)], { code: 'add' })

const compareCases = (['eq', 'lt', 'le'] as const).flatMap(code => [
  opCase('compare', code, [i32(-3, 3, 5, 7), i32(-3, 3, 7)], { code }),
  opCase(
    'compare',
    `${code} of floats`,
    [given('f32', [6], [1, 2, nan, -0, inf, 3]), given('f32', [6], [1, 3, nan, 0, inf, -3])],
    { code },
  ),
  opCase('compare', `${code} with a scalar`, [f32(40), f32()], { code }),
])

const castCases = [
  opCase(
    'cast',
    'f32 to i32',
    [given('f32', [7], [1.9, -1.9, 0, nan, 3e9, -3e9, 7])],
    { dtype: 'i32' },
    { gradient: false },
  ),
  opCase('cast', 'f32 to u8', [given('f32', [6], [1.9, -1.9, 0, nan, 300, 255])], { dtype: 'u8' }, { gradient: false }),
  opCase('cast', 'i32 to f32', [i32(-1000, 1000, 33)], { dtype: 'f32' }),
  opCase('cast', 'i32 to u8', [i32(-400, 400, 33)], { dtype: 'u8' }),
  opCase('cast', 'u8 to f32', [mask(33)], { dtype: 'f32' }),
  opCase('cast', 'u8 to i32', [mask(33)], { dtype: 'i32' }),
  ...(['bf16', 'f16', 'f8e4m3'] as const).flatMap(dtype => [
    opCase(
      'cast',
      `f32 to ${dtype}`,
      [uniform(-300, 300, 77)],
      { dtype },
      { gradient: false, tolerance: tolerances.exact },
    ),
    opCase(
      'cast',
      `small f32 to ${dtype}`,
      [uniform(-0.01, 0.01, 77)],
      { dtype },
      { gradient: false, tolerance: tolerances.exact },
    ),
    opCase(
      'cast',
      `${dtype} to f32`,
      [{ ...uniform(-300, 300, 77), dtype }],
      { dtype: 'f32' },
      { gradient: false, tolerance: tolerances.exact },
    ),
  ]),
]

const reduceCases = (['sum', 'max'] as const).flatMap(code => [
  ...[[0], [1], [2], [0, 2], [0, 1], [1, 2], [0, 1, 2]].map(axes =>
    opCase('reduce', `${code} over [${axes}]`, [f32(5, 6, 19)], { code, axes }, { tolerance: tolerances.sum }),
  ),
  opCase('reduce', `${code} of integers`, [i32(-9, 9, 7, 5)], { code, axes: [1] }),
  opCase('reduce', `${code} of nothing`, [f32(3, 0)], { code, axes: [1] }, { gradient: false }),
  opCase(
    'reduce',
    `${code} of long rows`,
    [f32(3, 5003)],
    { code, axes: [1] },
    { tolerance: { relative: 1e-4, absolute: 1e-3 } },
  ), // cancellation in a sum of 5003 normals
  opCase(
    'reduce',
    `${code} of long columns`,
    [f32(1777, 9)],
    { code, axes: [0] },
    { tolerance: { relative: 1e-4, absolute: 5e-4 } },
  ), // cancellation, as above
])

const movementCases = [
  opCase('reshape', 'to other axes', [f32(4, 6)], {}, { outShape: [2, 3, 4] }),
  ...[
    [1, 0],
    [0, 1],
  ].map(axes => opCase('permute', `[${axes}]`, [f32(37, 53)], { axes })),
  ...[
    [0, 2, 1, 3],
    [3, 2, 1, 0],
    [2, 0, 3, 1],
  ].map(axes => opCase('permute', `[${axes}]`, [f32(3, 4, 5, 6)], { axes })),
  opCase('permute', 'of integers', [i32(0, 99, 5, 8)], { axes: [1, 0] }),
  opCase('permute', 'of bytes', [mask(5, 8)], { axes: [1, 0] }),
  opCase('permute', 'of bf16', [{ ...f32(5, 8), dtype: 'bf16' }], { axes: [1, 0] }, { gradient: false }),
  opCase('expand', 'first axis', [f32(1, 7)], {}, { outShape: [4, 7] }),
  opCase('expand', 'last axis', [f32(7, 1)], {}, { outShape: [7, 5] }),
  opCase('expand', 'middle axis', [f32(2, 1, 3)], {}, { outShape: [2, 4, 3] }),
  opCase('slice', 'inside', [f32(5, 6, 7)], { starts: [1, 0, 2] }, { outShape: [3, 6, 4] }),
  opCase('slice', 'of rows', [f32(9, 6)], { starts: [4, 0] }, { outShape: [3, 6] }),
  opCase('slice', 'to nothing', [f32(9, 6)], { starts: [4, 0] }, { outShape: [0, 6], gradient: false }),
  opCase('slice', 'of integers', [i32(0, 9, 4, 4)], { starts: [1, 1] }, { outShape: [2, 3] }),
  ...(['bf16', 'f16', 'f8e4m3', 'u8'] as const).map(dtype =>
    opCase(
      'pad',
      `of ${dtype}`,
      [given(dtype, [3, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9])],
      { before: [0, 2], value: 1.5 },
      { outShape: [4, 5], gradient: false, tolerance: tolerances.exact },
    ),
  ),
  opCase('pad', 'both sides', [f32(3, 4)], { before: [1, 2], value: 0 }, { outShape: [5, 9] }),
  opCase('pad', 'with a value', [f32(3, 4)], { before: [0, 1], value: -2.5 }, { outShape: [4, 5] }),
  opCase('pad', 'of integers', [i32(0, 9, 3)], { before: [2], value: 7 }, { outShape: [6] }),
  opCase('concat', 'first axis', [f32(2, 5), f32(3, 5), f32(1, 5)], { axis: 0 }),
  opCase('concat', 'last axis', [f32(4, 5), f32(4, 1), f32(4, 0)], { axis: 1 }),
  opCase('concat', 'middle axis', [f32(2, 3, 4), f32(2, 2, 4)], { axis: 1 }),
  opCase('concat', 'of integers', [i32(0, 9, 3), i32(0, 9, 2)], { axis: 0 }),
]

const rowCases = [
  opCase('takeRows', 'of a matrix', [f32(11, 7), i32(0, 11, 4, 3)], {}),
  opCase('takeRows', 'of a vector', [f32(11), i32(0, 11, 20)], {}),
  opCase('takeRows', 'outside the range', [f32(4, 3), given('i32', [4], [0, -1, 4, 3])], {}),
  opCase('takeRows', 'of integers', [i32(0, 99, 6, 2), i32(0, 6, 5)], {}),
  opCase('takeRows', 'no rows', [f32(4, 3), i32(0, 4, 0)], {}, { gradient: false }),
  opCase(
    'scatterAddRows',
    'with repeated rows',
    [i32(0, 5, 40), f32(40, 9)],
    { rows: 5 },
    { tolerance: tolerances.sum },
  ),
  opCase('scatterAddRows', 'of a vector', [i32(0, 50, 40), f32(40)], { rows: 50 }),
  opCase('scatterAddRows', 'with an index of rank 2', [i32(0, 7, 4, 6), f32(4, 6, 5)], { rows: 7 }),
  opCase('scatterAddRows', 'outside the range', [given('i32', [4], [0, -1, 9, 2]), f32(4, 3)], { rows: 3 }),
  opCase('scatterAddRows', 'of nothing', [i32(0, 3, 0), f32(0, 3)], { rows: 3 }, { gradient: false }),
  opCase(
    'setRows',
    'some',
    [f32(6, 4), given('i32', [3], [5, 0, 2]), f32(3, 4)],
    { donate: false },
    { gradient: false },
  ),
  opCase(
    'setRows',
    'the last of equal indices wins',
    [f32(4, 2), given('i32', [3], [1, 1, 1]), f32(3, 2)],
    { donate: false },
    { gradient: false },
  ),
  opCase(
    'setRows',
    'outside the range',
    [f32(4, 2), given('i32', [2], [-1, 4]), f32(2, 2)],
    { donate: false },
    { gradient: false },
  ),
  opCase(
    'setRows',
    'of bf16',
    [given('bf16', [3, 2], [1, 2, 3, 4, 5, 6]), given('i32', [2], [2, 0]), given('bf16', [2, 2], [-1, 0.5, 7, 8])],
    { donate: false },
  ),
  opCase('setRows', 'of integers', [i32(0, 9, 5), given('i32', [2], [3, 1]), i32(0, 9, 2)], { donate: false }),
  opCase('topk', 'largest first', [f32(7, 19)], { k: 4 }),
  opCase(
    'topk',
    'ties go to the lowest index',
    [given('f32', [2, 6], [1, 3, 3, 2, 3, 0, 5, 5, 5, 5, 5, 5])],
    { k: 4 },
    { gradient: false },
  ),
  opCase('topk', 'all of it', [f32(3, 5)], { k: 5 }),
  opCase(
    'topk',
    'with NaN and infinities',
    [given('f32', [6], [nan, 1, -inf, inf, 0, 2])],
    { k: 4 },
    { gradient: false },
  ),
  opCase('cumsum', 'last axis', [f32(5, 21)], { axis: 1 }, { tolerance: tolerances.sum }),
  opCase('cumsum', 'first axis', [f32(21, 5)], { axis: 0 }, { tolerance: tolerances.sum }),
  opCase('cumsum', 'of integers', [i32(-9, 9, 4, 6, 3)], { axis: 1 }),
]

const matmulCases = [
  [1, 1, 1],
  [5, 7, 9],
  [33, 65, 17],
  [64, 128, 96],
  [1, 70, 130],
  [130, 40, 1],
  [131, 300, 130],
].flatMap(([m, k, n]) =>
  [false, true].flatMap(transposeA =>
    [false, true].flatMap(transposeB => {
      const a = transposeA ? f32(k, m) : f32(m, k)
      const b = transposeB ? f32(n, k) : f32(k, n)
      const name = `${m}x${k}x${n}${transposeA ? ', A transposed' : ''}${transposeB ? ', B transposed' : ''}`
      return [
        opCase('matmul', name, [a, b], { transposeA, transposeB, precision: 'f32' }, { tolerance: tolerances.sum }),
        opCase(
          'matmul',
          `${name}, bf16`,
          [a, b],
          { transposeA, transposeB, precision: 'bf16' },
          // An element is a sum of k products, each with an error of up to 2^-8 of its size.
          {
            tolerance: { relative: 2e-2, absolute: 0.01 * Math.sqrt(k) },
            gradientTolerance: { relative: 2e-2, absolute: 0.2 },
          },
        ),
        opCase(
          'matmul',
          `${name}, fp8`,
          [a, b],
          { transposeA, transposeB, precision: 'fp8' },
          { tolerance: tolerances.sum },
        ),
      ]
    }),
  ),
)

const byNt = { transposeA: false, transposeB: true, precision: 'fp8' } as const
const steps = Array.from({ length: 256 }, (_, i) => i)
/**
 * Rounding of tiles with numbers that are special to f8e4m3: next to 1 and zeros, each product is the rounded number
 * itself.
 */
const one = given('f32', [1, 129], [1, ...new Array(128).fill(0)])
const alone = (name: string, largest: number, numbers: readonly number[]) =>
  opCase(
    'matmul',
    `fp8, ${name}`,
    [
      given(
        'f32',
        [numbers.length, 129],
        numbers.flatMap(x => [x, largest, ...new Array(127).fill(0)]),
      ),
      one,
    ],
    byNt,
    { tolerance: tolerances.exact, gradient: false },
  )
const fp8Cases = [
  alone(
    'halfway between neighbours',
    448,
    steps.map(i => (i - 128) * 0.5),
  ),
  alone(
    'below the smallest normal number',
    448,
    steps.map(i => (i - 128) * 2 ** -11),
  ),
  alone('largest just past a power of two', 448.00003, [1, 1.03125, 2.0625, -448]),
  alone('small tiles', 1e-25, [1e-25, -3e-26, 1e-28, 0]),
  alone('below the least scale', 2 ** -100, [2 ** -100, 2 ** -101, 2 ** -109, 2 ** -111]),
  alone('large tiles', 3e38, [3e38, -1e38, 1e35]),
  alone('all zeros', 0, [0, -0]),
  alone('NaN', Number.NaN, [1, 2]),
  alone('infinity', Number.POSITIVE_INFINITY, [1, 2]),
  opCase(
    'matmul',
    'fp8, tiles of very different size',
    [uniform(-1e-6, 1e-6, 5, 384), uniform(-1e5, 1e5, 4, 384)],
    byNt,
    { tolerance: { relative: 1e-3, absolute: 1e-3 }, gradientTolerance: { relative: 1e-3, absolute: 1 } },
  ),
]

const batchedCases = [
  opCase(
    'matmul',
    'batched',
    [f32(3, 9, 14), f32(3, 14, 6)],
    { transposeA: false, transposeB: false, precision: 'f32' },
    { tolerance: tolerances.sum },
  ),
  opCase(
    'matmul',
    'batched, B transposed',
    [f32(3, 9, 14), f32(3, 6, 14)],
    { transposeA: false, transposeB: true, precision: 'f32' },
    { tolerance: tolerances.sum },
  ),
  opCase(
    'matmul',
    'without inner size',
    [f32(3, 0), f32(0, 4)],
    { transposeA: false, transposeB: false, precision: 'f32' },
    { gradient: false },
  ),
  opCase(
    'matmul',
    'without rows',
    [f32(0, 3), f32(3, 4)],
    { transposeA: false, transposeB: false, precision: 'f32' },
    { gradient: false },
  ),
]

/** Every primitive in many situations. */
export const primitiveCases: readonly OpCase[] = [
  ...unaryCases,
  opCase('unary', 'exp over its whole range', [uniform(-103, 88, 257)], { code: 'exp' }, { gradient: false }),
  opCase('unary', 'neg of integers', [i32(-9, 9, 12)], { code: 'neg' }),
  ...binaryCases,
  ...integerCases,
  large,
  ...compareCases,
  opCase('where', 'same shape', [mask(4, 5), f32(4, 5), f32(4, 5)], {}),
  opCase('where', 'everything broadcast', [mask(4, 1), f32(5), f32()], {}),
  opCase('where', 'integers', [mask(9), i32(0, 5, 9), i32(5, 9, 9)], {}),
  ...castCases,
  opCase('fill', 'f32', [], { value: -1.5 }, { outShape: [3, 4], outDtype: 'f32' }),
  opCase('fill', 'i32', [], { value: 7 }, { outShape: [5], outDtype: 'i32' }),
  ...(['bf16', 'f16', 'f8e4m3', 'u8'] as const).map(outDtype =>
    opCase('fill', outDtype, [], { value: 1.1 }, { outShape: [3, 7], outDtype, tolerance: tolerances.exact }),
  ),
  opCase('fill', 'scalar', [], { value: 0.25 }, { outShape: [], outDtype: 'f32' }),
  opCase('fill', 'nothing', [], { value: 1 }, { outShape: [0, 2], outDtype: 'f32' }),
  ...reduceCases,
  ...movementCases,
  ...rowCases,
  ...matmulCases,
  ...fp8Cases,
  ...batchedCases,
]
