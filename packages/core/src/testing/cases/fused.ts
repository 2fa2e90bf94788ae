/**
 * @file Cases of the fused ops: each is compared with its decomposition on the reference backend, values and gradients.
 */
import type { Precision, RouterAttrs, WidePrecision } from '../../backend.ts'
import { Random } from '../../random.ts'
import { type CaseInput, f32, given, i32, type OpCase, opCase, uniform } from '../case.ts'
import { tolerances } from '../compare.ts'
import { quantizedCases } from './quantized.ts'

const inf = Number.POSITIVE_INFINITY
const sum = { tolerance: tolerances.sum, gradientTolerance: tolerances.gradient }
/** bf16 products: relative error 2^-8 per product of numbers of size about 1. */
const rough = (absolute = 0.05) => ({
  tolerance: { relative: 2e-2, absolute },
  gradientTolerance: { relative: 3e-2, absolute: absolute * 2 },
})
const precisions: readonly WidePrecision[] = ['f32', 'bf16']

/** `order` and `positions` must be inverse to each other, so both are written out. */
function planInputs(tokens: number, topK: number): { order: CaseInput; positions: CaseInput } {
  const slots = tokens * topK
  const step = [7, 5, 3, 1].find(s => gcd(s, slots) === 1) as number
  const order = Array.from({ length: slots }, (_, p) => (p * step + 2) % slots)
  const positions = new Array<number>(slots)
  order.forEach((slot, p) => {
    positions[slot] = p
  })
  return { order: given('i32', [slots], order), positions: given('i32', [slots], positions) }
}
const gcd = (a: number, b: number): number => (b === 0 ? a : gcd(b, a % b))

const attentionSizes: ReadonlyArray<readonly [name: string, shape: number[], causal: boolean]> = [
  ['small, causal', [2, 5, 5, 2, 2, 8, 4], true],
  ['small, not causal', [1, 4, 6, 2, 2, 8, 4], false],
  ['one query over many keys', [2, 1, 37, 4, 4, 48, 32], true],
  ['queries behind a prefix', [1, 6, 19, 2, 2, 24, 16], true],
  ['more than a tile', [1, 70, 70, 2, 2, 48, 32], true],
  ['long, odd sizes', [1, 131, 131, 1, 1, 33, 17], true],
  ['shared key head', [2, 9, 9, 4, 1, 16, 8], true],
  ['grouped key heads', [1, 9, 9, 6, 2, 16, 8], true],
  ['more queries than keys', [1, 7, 4, 2, 2, 8, 8], true],
  // GLM-4.7-Flash.
  ['20 heads of 256', [1, 19, 21, 20, 20, 256, 256], true],
]

const attentionCases = attentionSizes.flatMap(([name, [b, t, s, h, g, dk, dv], causal]) =>
  precisions.map(precision =>
    opCase(
      'attention',
      `${name}, ${precision}`,
      [f32(b, t, h, dk), f32(b, s, g, dk), f32(b, s, g, dv)],
      { causal, scale: dk ** -0.5, precision },
      { ...(precision === 'bf16' ? rough() : sum), compared: [0, 1] },
    ),
  ),
)

/**
 * For each of the last `time` of `keys` positions, the start of the text it belongs to, among texts that begin at
 * `begins`.
 */
const lastBegun = (time: number, keys: number, begins: readonly number[]): number[] =>
  Array.from({ length: time }, (_, t) => begins.findLast(begin => begin <= keys - time + t) ?? 0)

/** Packed texts: sizes as above, then the positions where the texts of each row begin. */
const startsSizes: ReadonlyArray<readonly [name: string, shape: number[], causal: boolean, begins: number[][]]> = [
  ['small', [2, 5, 5, 2, 2, 8, 4], true, [[0, 3], [1]]],
  ['grouped key heads', [1, 19, 19, 4, 2, 16, 8], true, [[0, 1, 2, 11]]],
  ['more than a tile', [2, 150, 150, 2, 2, 48, 32], true, [[0, 7, 101, 149], [0]]],
  ['long, odd sizes', [1, 331, 331, 1, 1, 33, 17], true, [[0, 129, 230]]],
  ['few queries, many keys', [1, 4, 900, 2, 1, 16, 8], true, [[0, 500, 898]]],
  ['not causal', [1, 6, 9, 2, 2, 8, 4], false, [[0, 2, 5]]],
  ['one query, features of whole vectors', [1, 1, 90, 2, 1, 32, 16], true, [[0, 50]]],
]

const startsCases = startsSizes.flatMap(([name, [b, t, s, h, g, dk, dv], causal, begins]) =>
  precisions.map(precision =>
    opCase(
      'attention',
      `several texts in a row, ${name}, ${precision}`,
      [
        f32(b, t, h, dk),
        f32(b, s, g, dk),
        f32(b, s, g, dv),
        given('i32', [b], new Array(b).fill(s)),
        given(
          'i32',
          [b, t],
          begins.flatMap(row => lastBegun(t, s, row)),
        ),
      ],
      { causal, scale: dk ** -0.5, precision },
      { ...(precision === 'bf16' ? rough() : sum), compared: [0, 1] },
    ),
  ),
)

/** Three sequences over unordered pages, two of which share their first page. All rows not in use are NaN. */
function pagedInputs(size: number, time: number, dtype: 'f32' | 'bf16'): CaseInput[] {
  const [numbers, features] = [7, 80]
  const lengths = [2 * size + 5, 0, size + size / 2]
  const pages = [
    [4, 2, 6],
    [3, 3, 3],
    [4, 0, 5],
  ]
  const values = new Array<number>(numbers * size * features).fill(Number.NaN)
  const random = new Random(5)
  pages.forEach((row, b) => {
    for (let s = 0; s < lengths[b]; s++) {
      const first = (row[Math.floor(s / size)] * size + (s % size)) * features
      random.normal(features).forEach((x, c) => {
        values[first + c] = x
      })
    }
  })
  return [
    f32(3, time, 8, features),
    given(dtype, [numbers, size, features], values),
    given('i32', [3], lengths),
    given('i32', [3, 3], pages.flat()),
  ]
}

const pagedSizes = [
  { size: 16, time: 1 },
  { size: 64, time: 3 },
]

const pagedCases = pagedSizes.flatMap(({ size, time }) =>
  (['f32', 'bf16'] as const).flatMap(dtype =>
    precisions.map(precision =>
      opCase(
        'latentAttention',
        `pages of ${size}, ${time} at a time, ${dtype === 'f32' ? 'an f32' : 'a bf16'} cache, ${precision}`,
        pagedInputs(size, time, dtype),
        { scale: 0.1, valueDim: 64, precision },
        { ...(precision === 'bf16' ? rough() : sum), gradient: false },
      ),
    ),
  ),
)

const router: RouterAttrs = {
  scoring: 'sigmoid',
  groups: 1,
  topGroups: 1,
  groupScore: 'top2',
  topK: 4,
  normalize: true,
  scale: 2.5,
}

const routerCases = [
  opCase('routerTopk', 'V3, no groups', [f32(9, 16), f32(16)], router, sum),
  opCase(
    'routerTopk',
    'V3, groups',
    [f32(33, 16), uniform(-0.1, 0.1, 16)],
    { ...router, groups: 4, topGroups: 2 },
    sum,
  ),
  opCase(
    'routerTopk',
    'V3, 256 experts',
    [f32(5, 256), uniform(-0.1, 0.1, 256)],
    { ...router, groups: 8, topGroups: 4, topK: 8 },
    sum,
  ),
  // Masking with 0 instead of -Infinity would choose experts of dropped groups here.
  opCase(
    'routerTopk',
    'all biases negative',
    [f32(17, 16), uniform(-9, -8, 16)],
    { ...router, groups: 4, topGroups: 1, topK: 3 },
    sum,
  ),
  opCase(
    'routerTopk',
    'equal scores',
    [given('f32', [2, 8], new Array(16).fill(0.25)), given('f32', [8], new Array(8).fill(0))],
    { ...router, groups: 4, topGroups: 2, topK: 3 },
    sum,
  ),
  opCase(
    'routerTopk',
    'V2, groups by maximum',
    [f32(21, 12), given('f32', [12], new Array(12).fill(0))],
    { ...router, scoring: 'softmax', groups: 4, topGroups: 2, groupScore: 'max', topK: 3, normalize: false, scale: 16 },
    sum,
  ),
  opCase(
    'routerTopk',
    'one expert per group',
    [f32(6, 4), f32(4)],
    { ...router, groups: 4, topGroups: 2, topK: 2 },
    sum,
  ),
  opCase('routerTopk', 'top 1', [f32(13, 8), f32(8)], { ...router, topK: 1, normalize: false, scale: 1 }, sum),
]

const ragged = given('i32', [5], [0, 3, 3, 11, 17])
/** Tolerance of a sum whose terms are rounded or not. */
const close = (precision: Precision, absolute: number) => (precision === 'bf16' ? rough(absolute) : sum)
/** More than a tile of rows for one expert. */
const long = given('i32', [4], [0, 160, 160, 299])
const groupedCases = [...precisions, 'fp8' as const].flatMap(precision => [
  ...[true, false].map(transposeW =>
    opCase(
      'groupedMatmul',
      `ragged, ${transposeW ? 'transposed' : 'plain'}, ${precision}`,
      [f32(17, 24), transposeW ? f32(4, 10, 24) : f32(4, 24, 10), ragged],
      { transposeW, precision },
      close(precision, 0.1),
    ),
  ),
  opCase(
    'groupedMatmul',
    `rows past the last offset, ${precision}`,
    [f32(9, 16), f32(2, 5, 16), given('i32', [3], [0, 2, 6])],
    { transposeW: true, precision },
    { ...close(precision, 0.1), gradient: false },
  ),
  opCase(
    'groupedMatmul',
    `larger, ${precision}`,
    [f32(200, 64), f32(3, 96, 64), given('i32', [4], [0, 20, 120, 200])],
    { transposeW: true, precision },
    close(precision, 0.2),
  ),
  opCase(
    'groupedMatmulWeightGrad',
    `ragged, ${precision}`,
    [f32(17, 24), f32(17, 10), ragged],
    { precision },
    { ...close(precision, 0.1), gradient: false },
  ),
  opCase(
    'groupedMatmul',
    `many rows an expert, ${precision}`,
    [f32(300, 130), f32(3, 20, 130), long],
    { transposeW: true, precision },
    close(precision, 0.3),
  ),
])

const targets = given('i32', [6], [3, -100, 0, 12, 5, 99])
const entropyCases = [
  opCase('crossEntropy', 'with ignored and impossible targets', [f32(6, 13), targets], { ignoreIndex: -100 }, sum),
  opCase('crossEntropy', 'with a class that is ignored', [f32(6, 13), targets], { ignoreIndex: 3 }, sum),
  opCase(
    'crossEntropy',
    'large logits',
    [uniform(-500, 500, 4, 9), i32(0, 9, 4)],
    { ignoreIndex: -100 },
    { ...sum, tolerance: { relative: 1e-5, absolute: 1e-4 } },
  ), // rounding of numbers near 500
  ...precisions.flatMap(precision => [
    opCase(
      'linearCrossEntropy',
      `with ignored targets, ${precision}`,
      [f32(6, 16), f32(13, 16), targets],
      { ignoreIndex: -100, precision },
      precision === 'bf16' ? rough(0.1) : sum,
    ),
    opCase(
      'linearCrossEntropy',
      `with a class that is ignored, ${precision}`,
      [f32(6, 16), f32(13, 16), targets],
      { ignoreIndex: 3, precision },
      precision === 'bf16' ? rough(0.1) : sum,
    ),
    opCase(
      'linearCrossEntropy',
      `more than a block, ${precision}`,
      [f32(70, 32), f32(515, 32), i32(0, 515, 70)],
      { ignoreIndex: -100, precision },
      precision === 'bf16' ? rough(0.2) : sum,
    ),
  ]),
]

const { order, positions } = planInputs(6, 2)
const tokenCases = [
  opCase('dispatchPlan', 'usual', [i32(0, 8, 19, 3)], { experts: 8 }),
  opCase('dispatchPlan', 'all to one expert', [i32(2, 3, 19, 1)], { experts: 4 }),
  opCase('dispatchPlan', 'many experts', [i32(0, 64, 300, 6)], { experts: 64 }),
  opCase('permuteTokens', 'usual', [f32(6, 5), order, positions], { topK: 2 }, sum),
  opCase('permuteTokensBackward', 'usual', [f32(12, 5), positions], { topK: 2 }, { ...sum, gradient: false }),
  opCase('combineTokens', 'usual', [f32(12, 5), f32(6, 2), order, positions], {}, sum),
  opCase(
    'combineTokensBackward',
    'usual',
    [f32(12, 33), f32(6, 2), order, positions, f32(6, 33)],
    {},
    { ...sum, gradient: false },
  ),
]

/** Inputs of `routedExperts`, with a plan whose experts begin at `offsets`. */
function expertsInputs(tokens: number, topK: number, offsets: readonly number[], [features, inner]: [number, number]) {
  const experts = offsets.length - 1
  const plan = planInputs(tokens, topK)
  const half = (...shape: number[]) => uniform(-0.5, 0.5, ...shape)
  const weights = [half(experts, inner, features), half(experts, inner, features), half(experts, features, inner)]
  const ends = given('i32', [experts + 1], offsets)
  return [f32(tokens, features), ...weights, uniform(0.1, 1, tokens, topK), plan.order, plan.positions, ends]
}
const expertsCases = [
  // Small enough for finite differences.
  opCase(
    'routedExperts',
    'few tokens, f32',
    expertsInputs(5, 2, [0, 4, 4, 10], [4, 3]),
    { precision: 'f32', saves: true },
    { ...sum, compared: [0] },
  ),
  ...precisions.flatMap(precision => {
    // Many rows for each expert except one, which has none.
    const inputs = expertsInputs(34, 3, [0, 20, 20, 43, 102], [12, 10])
    const saved = [0, 1].map(() => ({ ...f32(102, 10), dtype: precision }))
    const backward = [...inputs, ...saved, f32(34, 12)]
    // In bf16, operands and the rows between products are rounded to 2^-8 each. With weights of 0.25 on average, the
    // error is 0.02 for gate and up (12 terms of 0.2, two factors), 0.05 for the result of SwiGLU, and at most 0.2 for
    // the output: ten times a quarter of that, for three choices weighted by 0.5.
    const tolerance = precision === 'bf16' ? rough(0.2) : sum
    return [
      opCase(
        'routedExperts',
        `for a gradient, ${precision}`,
        inputs,
        { precision, saves: true },
        {
          ...tolerance,
          compared: [0],
        },
      ),
      opCase(
        'routedExperts',
        `alone, ${precision}`,
        inputs,
        { precision, saves: false },
        {
          ...tolerance,
          gradient: false,
        },
      ),
      ...[
        { name: 'all gradients', needs: [true, true, true, true, true] },
        { name: 'frozen experts', needs: [true, false, false, false, true] },
        { name: 'down alone', needs: [false, false, false, true, false] },
      ].map(({ name, needs }) =>
        opCase(
          'routedExpertsBackward',
          `${name}, ${precision}`,
          backward,
          { precision, needs },
          {
            ...tolerance,
            gradient: false,
          },
        ),
      ),
    ]
  }),
]

const tables = (...shape: number[]) => [uniform(-1, 1, ...shape), uniform(-1, 1, ...shape)]
const ropeCases = [true, false].flatMap(interleaved => [
  opCase(
    'rope',
    `whole head, ${interleaved ? 'interleaved' : 'halves'}`,
    [f32(2, 5, 3, 8), ...tables(5, 4)],
    { interleaved, inverse: false },
    { gradient: true },
  ),
  opCase('rope', `last features, ${interleaved ? 'interleaved' : 'halves'}`, [f32(2, 5, 3, 22), ...tables(5, 4)], {
    interleaved,
    inverse: false,
  }),
  opCase('rope', `own positions, ${interleaved ? 'interleaved' : 'halves'}`, [f32(2, 3, 2, 10), ...tables(2, 3, 4)], {
    interleaved,
    inverse: true,
  }),
  opCase(
    'rope',
    `behind other features, ${interleaved ? 'interleaved' : 'halves'}`,
    [f32(2, 3, 2, 10), ...tables(2, 3, 4), f32(2, 3, 2, 5)],
    { interleaved, inverse: false },
    { gradient: true },
  ),
  opCase(
    'rope',
    `nothing in front, ${interleaved ? 'interleaved' : 'halves'}`,
    [f32(1, 3, 2, 12), ...tables(3, 4), f32(1, 3, 2, 0)],
    { interleaved, inverse: false },
  ),
  opCase(
    'rope',
    `20 heads of 192 and 64, ${interleaved ? 'interleaved' : 'halves'}`,
    [f32(1, 3, 20, 64), ...tables(3, 32), f32(1, 3, 20, 192)],
    {
      interleaved,
      inverse: false,
    },
  ),
])

const adam = { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0.1, step: 3 }

/** Every fused op. */
export const fusedCases: readonly OpCase[] = [
  opCase('softmax', 'rows', [f32(7, 19)], {}, sum),
  opCase('softmax', 'large values', [uniform(-500, 500, 3, 40)], {}, sum),
  opCase('softmax', 'masked rows', [given('f32', [2, 3], [-inf, 0, 1, -inf, -inf, -inf])], {}, { gradient: false }),
  opCase('softmaxBackward', 'rows', [uniform(0, 1, 7, 19), f32(7, 19)], {}, { ...sum, gradient: false }),
  opCase('rmsNorm', 'rows', [f32(9, 33), f32(33)], { eps: 1e-6 }, { ...sum, compared: [0, 1] }),
  opCase(
    'rmsNorm',
    'many rows',
    [f32(3, 50, 64), f32(64)],
    { eps: 1e-6 },
    { ...sum, gradientTolerance: { relative: 2e-4, absolute: 1e-4 } },
  ), // the weight's gradient sums 150 rows
  opCase(
    'rmsNormBackward',
    'rows',
    [f32(9, 33), f32(33), uniform(0.5, 2, 9), f32(9, 33)],
    {},
    { ...sum, gradient: false },
  ),
  opCase('swiglu', 'usual', [f32(5, 37), f32(5, 37)], {}, sum),
  opCase('swigluBackward', 'usual', [f32(5, 37), f32(5, 37), f32(5, 37)], {}, { ...sum, gradient: false }),
  ...ropeCases,
  opCase('mlaKeyValue', 'fours', [f32(2, 3, 3, 20), f32(2, 3, 1, 4)], { nope: 8 }),
  opCase('mlaKeyValue', 'odd sizes', [f32(2, 5, 2, 8), f32(2, 5, 1, 3)], { nope: 5 }),
  opCase('mlaKeyValue', 'without a plain part', [f32(1, 3, 2, 4), f32(1, 3, 1, 2)], { nope: 0 }),
  opCase('mlaKeyValue', '20 heads of 192 and 256', [f32(1, 3, 20, 448), f32(1, 3, 1, 64)], { nope: 192 }, sum),
  opCase('mlaKeyValue', 'no keys', [f32(1, 0, 2, 6), f32(1, 0, 1, 2)], { nope: 4 }, { gradient: false }),
  opCase(
    'mlaKeyValueBackward',
    'fours',
    [f32(2, 3, 3, 12), f32(2, 3, 3, 12)],
    { nope: 8 },
    { ...sum, gradient: false },
  ),
  opCase(
    'mlaKeyValueBackward',
    'odd sizes',
    [f32(2, 5, 2, 8), f32(2, 5, 2, 3)],
    { nope: 5 },
    { ...sum, gradient: false },
  ),
  ...attentionCases,
  opCase(
    'attention',
    'sequences of different length',
    [f32(3, 2, 2, 16), f32(3, 9, 2, 16), f32(3, 9, 2, 8), given('i32', [3], [9, 2, 5])],
    { causal: true, scale: 0.25, precision: 'f32' },
    sum,
  ),
  opCase(
    'attention',
    'an empty sequence',
    [f32(2, 1, 2, 16), f32(2, 4, 2, 16), f32(2, 4, 2, 8), given('i32', [2], [0, 3])],
    { causal: true, scale: 0.25, precision: 'f32' },
    { ...sum, compared: [0] },
  ),
  ...startsCases,
  opCase(
    'attention',
    'several texts in a row, queries that see none, and one that sees what those before it do not',
    [
      f32(2, 70, 2, 16),
      f32(2, 70, 2, 16),
      f32(2, 70, 2, 8),
      given('i32', [2], [70, 66]),
      given(
        'i32',
        [2, 70],
        [...lastBegun(70, 70, [0, 20, 40]).with(3, 5).with(45, 3).with(69, 70), ...lastBegun(70, 70, [20, 64])],
      ),
    ],
    { causal: true, scale: 0.25, precision: 'f32' },
    { ...sum, compared: [0] },
  ),
  opCase(
    'attentionBackward',
    'usual',
    [f32(2, 6, 4, 16), f32(2, 6, 2, 16), f32(2, 6, 2, 8), f32(2, 6, 4, 8), uniform(3, 5, 2, 4, 6), f32(2, 6, 4, 8)],
    { causal: true, scale: 0.25, precision: 'f32' },
    { ...sum, gradient: false },
  ),
  opCase(
    'latentAttention',
    'one token',
    [f32(2, 1, 4, 24), f32(2, 11, 24), given('i32', [2], [11, 4])],
    { scale: 0.2, valueDim: 16, precision: 'f32' },
    { ...sum, gradient: false },
  ),
  opCase(
    'latentAttention',
    'several tokens',
    [f32(1, 3, 2, 40), f32(1, 150, 40), given('i32', [1], [141])],
    { scale: 0.1, valueDim: 32, precision: 'f32' },
    { ...sum, gradient: false },
  ),
  opCase(
    'latentAttention',
    'bf16',
    [f32(1, 1, 8, 80), f32(1, 90, 80), given('i32', [1], [77])],
    { scale: 0.1, valueDim: 64, precision: 'bf16' },
    { ...rough(), gradient: false },
  ),
  ...precisions.map(precision =>
    opCase(
      'latentAttention',
      `a bf16 cache, ${precision}`,
      [f32(2, 2, 8, 80), { ...f32(2, 90, 80), dtype: 'bf16' }, given('i32', [2], [77, 40])],
      { scale: 0.1, valueDim: 64, precision },
      { ...(precision === 'bf16' ? rough() : sum), gradient: false },
    ),
  ),
  // GLM-4.7-Flash: 20 heads are no multiple of any tile.
  ...precisions.flatMap(precision =>
    (['f32', 'bf16'] as const).map(dtype =>
      opCase(
        'latentAttention',
        `20 heads over latents of 576, ${dtype === 'f32' ? 'an f32' : 'a bf16'} cache, ${precision}`,
        [f32(1, 1, 20, 576), { ...f32(1, 40, 576), dtype }, given('i32', [1], [37])],
        { scale: 0.0625, valueDim: 512, precision },
        { ...(precision === 'bf16' ? rough() : sum), gradient: false },
      ),
    ),
  ),
  ...pagedCases,
  ...entropyCases,
  opCase(
    'crossEntropyBackward',
    'usual',
    [f32(6, 13), targets, uniform(2, 4, 6), f32(6)],
    { ignoreIndex: -100 },
    { ...sum, gradient: false },
  ),
  opCase(
    'linearCrossEntropyBackward',
    'usual',
    [f32(6, 16), f32(13, 16), targets, uniform(8, 9, 6), f32(6)],
    { ignoreIndex: -100, precision: 'f32' },
    { ...sum, gradient: false },
  ),
  ...routerCases,
  opCase(
    'routerTopkBackward',
    'usual',
    [uniform(0.1, 0.9, 3, 8), given('i32', [3, 4], [0, 1, 2, 3, 7, 6, 5, 4, 1, 3, 5, 7]), f32(3, 4), f32(3, 8)],
    router,
    { ...sum, gradient: false },
  ),
  ...tokenCases,
  ...expertsCases,
  ...groupedCases,
  opCase(
    'adamwStep',
    'third step',
    [f32(5, 7), f32(5, 7), f32(5, 7), uniform(0.1, 1, 5, 7), given('f32', [], [0.5])],
    adam,
    { ...sum, gradient: false },
  ),
  opCase(
    'adamwStep',
    'first step',
    [
      f32(1000),
      f32(1000),
      given('f32', [1000], new Array(1000).fill(0)),
      given('f32', [1000], new Array(1000).fill(0)),
      given('f32', [], [1]),
    ],
    { ...adam, step: 1 },
    { ...sum, gradient: false },
  ),
  ...[35, 1002].flatMap(size => {
    const moments = [f32(size), uniform(0.1, 1, size)].map((moment): CaseInput => ({ ...moment, dtype: 'bf16' }))
    const inputs = [f32(size), f32(size), ...moments, given('f32', [], [0.5])]
    return [
      opCase('adamwStep', `${size} parameters, moments in bf16`, inputs, adam, {
        ...sum,
        gradient: false,
        compared: [0],
      }),
      // Rounded from sums that differ in the last bits of f32. Near a tie, they round to adjacent bf16 numbers.
      opCase('adamwStep', `${size} moments in bf16`, inputs, adam, {
        tolerance: { relative: 2 ** -7, absolute: 0 },
        gradient: false,
        compared: [1, 2],
      }),
    ]
  }),
  ...[1, 2, 1000].map(step =>
    opCase('emaStep', `step ${step}`, [f32(5, 7), f32(5, 7)], { decay: 0.99, step }, { ...sum, gradient: false }),
  ),
  opCase('emaStep', 'long', [f32(5003), f32(5003)], { decay: 0.999, step: 300 }, { ...sum, gradient: false }),
  opCase('emaStep', 'nothing', [f32(0), f32(0)], { decay: 0.9, step: 3 }, { ...sum, gradient: false }),
  ...quantizedCases,
  opCase('globalNorm', 'of several', [f32(5, 7), f32(130), f32()], { parts: false }, { ...sum, gradient: false }),
  opCase('globalNorm', 'in parts', [f32(5, 7), f32(130), f32()], { parts: true }, { ...sum, gradient: false }),
  opCase('quantize', 'whole blocks', [f32(8, 8)], { block: [4, 4] }, { ...sum, gradient: false }),
  opCase('quantize', 'cropped blocks', [f32(5, 9)], { block: [4, 4] }, { ...sum, gradient: false }),
  opCase(
    'quantize',
    'rows, one of them zero',
    [given('f32', [2, 3], [0, 0, 0, 1, -2, 448])],
    { block: [1, 128] },
    { gradient: false },
  ),
]
