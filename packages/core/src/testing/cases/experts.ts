/** @file Cases of the ops of a mixture-of-experts layer: routing, dispatch, and the products of the experts. */
import type { Precision, RouterAttrs } from '../../ops.ts'
import { type CaseInput, f32, given, i32, type OpCase, opCase, uniform } from '../case.ts'
import { precisions, rough, sum } from './tolerances.ts'

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

/** Every op of a mixture-of-experts layer. */
export const expertLayerCases: readonly OpCase[] = [
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
]
