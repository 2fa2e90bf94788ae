/**
 * @file Cases of the fused ops: each is compared with its decomposition on the reference backend, values and gradients.
 */
import { type CaseInput, f32, given, i32, type OpCase, opCase, uniform } from '../case.ts'
import { attentionLayerCases } from './attention.ts'
import { expertLayerCases } from './experts.ts'
import { quantizedCases } from './quantized.ts'
import { precisions, rough, sum } from './tolerances.ts'

const inf = Number.POSITIVE_INFINITY

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
  ...attentionLayerCases,
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
  ...expertLayerCases,
  ...quantizedCases,
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
