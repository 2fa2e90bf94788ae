import { describe, expect, test } from 'vitest'
import type { Backend } from '../backend.ts'
import { fromHost, ones, tensor } from '../create.ts'
import { hostArray } from '../dtype.ts'
import type { FusedName, RouterAttrs } from '../ops.ts'
import { referenceBackend } from '../reference/index.ts'
import { sizeOf } from '../shape.ts'
import { type CaseInput, opCases } from '../testing/index.ts'
import { adamwStep } from './adamw.ts'
import { attention, latentAttention } from './attention.ts'
import { crossEntropy, linearCrossEntropy } from './cross-entropy.ts'
import { runFused } from './definition.ts'
import { combineTokens, dispatchPlan, permuteTokens } from './dispatch.ts'
import { emaStep } from './ema.ts'
import { groupedMatmul } from './grouped-matmul.ts'
import { fusedDefinitions } from './index.ts'
import { indexScores } from './index-scores.ts'
import { quantize } from './quantize.ts'
import { quantizedGroupedMatmul, quantizedMatmul, quantizeWeight } from './quantized-matmul.ts'
import { rmsNorm } from './rms-norm.ts'
import { rope } from './rope.ts'
import { routedExperts } from './routed-experts.ts'
import { routerTopk } from './router-topk.ts'
import { softmax } from './softmax.ts'
import { swiglu } from './swiglu.ts'

/**
 * A backend whose fused kernels must never be reached: kernels check nothing, so an unchecked call would read or write
 * outside a native buffer.
 */
const plain = referenceBackend()
const invalid = new Error('a kernel was called with invalid inputs')
const reached = () => {
  throw invalid
}
const backend: Backend = { ...plain, fused: Object.fromEntries(Object.keys(fusedDefinitions).map(op => [op, reached])) }
const f = (...shape: number[]) => ones(shape, { backend })
const i = (shape: number[], ...values: number[]) => tensor(Int32Array.from(values), shape, { backend })
const router: RouterAttrs = {
  scoring: 'sigmoid',
  groups: 2,
  topGroups: 1,
  groupScore: 'top2',
  topK: 2,
  normalize: true,
  scale: 1,
}
const plan = (slots: number) => {
  const index = i([slots], ...new Array<number>(slots).fill(0))
  return { topK: 2, order: index, positions: index, offsets: i([2], 0, slots), counts: i([1], slots) }
}
const nets = (features: number, inner: number, experts = 1) => ({
  gate: f(experts, inner, features),
  up: f(experts, inner, features),
  down: f(experts, features, inner),
})
/** Quantized weights on the backend of these tests, computed by another one. */
const int8 = (...shape: number[]) => ({
  ...quantizeWeight(ones(shape, { backend: plain }), 'int8'),
  q: tensor(new Uint8Array(shape.reduce((a, b) => a * b, 1)), shape, { backend }),
  scale: f(...shape.slice(0, -1), 1),
})
const bf16 = (...shape: number[]) => ({ ...int8(...shape), format: 'bf16' as const, q: f(...shape).cast('bf16') })
const adamw = { lr: 1, beta1: 0.9, beta2: 0.9, eps: 1e-8, weightDecay: 0, step: 1 }

const wrong: Record<string, Array<[what: string, call: () => unknown, message: RegExp]>> = {
  softmax: [
    ['a scalar', () => softmax(f()), /a scalar, which has no last axis; pass x \[\.\.\., D\]/],
    ['integers', () => softmax(i([1], 1)), /has dtype i32, expected f32; cast it/],
  ],
  rmsNorm: [
    [
      'a weight of another size',
      () => rmsNorm(f(2, 3), f(2)),
      /x has shape \[2,3\], the weight \[2\]; pass x \[\.\.\., 2\]/,
    ],
  ],
  swiglu: [['different shapes', () => swiglu(f(2, 3), f(3)), /up has shape \[3\], expected \[2,3\]/]],
  rope: [
    ['three axes', () => rope(f(2, 3, 4), f(3, 2), f(3, 2)), /pass x \[B,T,H,D\]/],
    ['tables of another length', () => rope(f(1, 3, 1, 4), f(2, 2), f(2, 2)), /cos \[2,2\]/],
    ['tables of two shapes', () => rope(f(1, 3, 1, 4), f(3, 2), f(3, 1)), /sin \[3,1\]/],
    ['more angles than pairs', () => rope(f(1, 3, 1, 4), f(3, 3), f(3, 3)), /R <= D/],
    [
      'prepended features with another number of heads',
      () => rope(f(1, 3, 2, 4), f(3, 2), f(3, 2), { plain: f(1, 3, 1, 4) }),
      /plain has shape \[1,3,1,4\], expected \[1,3,2,\*\]/,
    ],
    [
      'prepended integers',
      () => rope(f(1, 1, 1, 4), f(1, 2), f(1, 2), { plain: i([1, 1, 1, 1], 1) }),
      /plain has dtype i32, expected f32/,
    ],
  ],
  attention: [
    [
      'three axes',
      () => attention(f(2, 3, 4), f(2, 3, 4), f(2, 3, 4)),
      /q has shape \[2,3,4\], expected \[\*,\*,\*,\*\]/,
    ],
    ['keys of other features', () => attention(f(1, 2, 2, 4), f(1, 2, 2, 3), f(1, 2, 2, 4)), /k has shape/],
    ['fewer values than keys', () => attention(f(1, 2, 2, 4), f(1, 3, 2, 4), f(1, 2, 2, 4)), /v has shape/],
    [
      'a number of key heads that does not divide that of the query heads',
      () => attention(f(1, 2, 3, 4), f(1, 2, 2, 4), f(1, 2, 2, 4)),
      /expected \[1,\*,3,4\]/,
    ],
    ['no key heads', () => attention(f(1, 2, 3, 4), f(1, 2, 0, 4), f(1, 2, 0, 4)), /expected \[1,\*,3,4\]/],
    [
      'lengths of another batch',
      () => attention(f(1, 2, 2, 4), f(1, 2, 2, 4), f(1, 2, 2, 4), { lengths: i([2], 1, 1) }),
      /lengths has shape \[2\], expected \[1\]/,
    ],
  ],
  latentAttention: [
    [
      'a valueDim above the number of features',
      () => latentAttention(f(1, 1, 2, 8), f(1, 4, 8), i([1], 4), { scale: 1, valueDim: 9 }),
      /valueDim = 9 is not in 1\.\.8/,
    ],
    [
      'a fractional valueDim',
      () => latentAttention(f(1, 1, 2, 8), f(1, 4, 8), i([1], 4), { scale: 1, valueDim: 0.5 }),
      /valueDim = 0.5/,
    ],
    [
      'a cache of other features',
      () => latentAttention(f(1, 1, 2, 8), f(1, 4, 7), i([1], 4), { scale: 1, valueDim: 4 }),
      /cache has shape \[1,4,7\], expected \[1,\*,8\]/,
    ],
    [
      'a cache of other sequences',
      () => latentAttention(f(2, 1, 2, 8), f(3, 4, 8), i([2], 4, 4), { scale: 1, valueDim: 4 }),
      /cache has shape \[3,4,8\], expected \[2,\*,8\]/,
    ],
    [
      'pages of other features',
      () => latentAttention(f(1, 1, 2, 8), f(3, 4, 7), i([1], 4), { scale: 1, valueDim: 4, pages: i([1, 1], 2) }),
      /cache has shape \[3,4,7\], expected \[\*,\*,8\]/,
    ],
    [
      'pages of other sequences',
      () => latentAttention(f(1, 1, 2, 8), f(3, 4, 8), i([1], 4), { scale: 1, valueDim: 4, pages: i([2, 1], 2, 1) }),
      /pages has shape \[2,1\], expected \[1,\*\]/,
    ],
    [
      'pages with one axis',
      () => latentAttention(f(1, 1, 2, 8), f(3, 4, 8), i([1], 4), { scale: 1, valueDim: 4, pages: i([2], 2, 1) }),
      /pages has shape \[2\], expected \[1,\*\]/,
    ],
    [
      'floats as pages',
      () => latentAttention(f(1, 1, 2, 8), f(3, 4, 8), i([1], 4), { scale: 1, valueDim: 4, pages: f(1, 1) }),
      /pages has dtype f32, expected i32; cast it with .cast\('i32'\)/,
    ],
  ],
  indexScores: [
    [
      'queries without heads',
      () => indexScores(f(1, 2, 4), f(1, 2, 3), f(1, 5, 4)),
      /q has shape \[1,2,4\], expected \[\*,\*,\*,\*\]; pass q \[B, T, J, D\]/,
    ],
    [
      'weights of other heads',
      () => indexScores(f(1, 2, 3, 4), f(1, 2, 4), f(1, 5, 4)),
      /weights has shape \[1,2,4\], expected \[1,2,3\]/,
    ],
    [
      'keys of other features',
      () => indexScores(f(1, 2, 3, 4), f(1, 2, 3), f(1, 5, 3)),
      /keys has shape \[1,5,3\], expected \[1,\*,4\]/,
    ],
    [
      'keys of other sequences',
      () => indexScores(f(1, 2, 3, 4), f(1, 2, 3), f(2, 5, 4)),
      /keys has shape \[2,5,4\], expected \[1,\*,4\]/,
    ],
    [
      'keys in bf16',
      () => indexScores(f(1, 2, 3, 4), f(1, 2, 3), f(1, 5, 4).cast('bf16')),
      /keys has dtype bf16, expected f32/,
    ],
    [
      'limits of sequences',
      () => indexScores(f(1, 2, 3, 4), f(1, 2, 3), f(1, 5, 4), { limits: i([1], 5) }),
      /limits has shape \[1\], expected \[1,2\]/,
    ],
    [
      'floats as limits',
      () => indexScores(f(1, 2, 3, 4), f(1, 2, 3), f(1, 5, 4), { limits: f(1, 2) }),
      /limits has dtype f32, expected i32/,
    ],
  ],
  crossEntropy: [
    [
      'targets of another size',
      () => crossEntropy(f(2, 3), i([3], 0, 0, 0)),
      /targets has shape \[3\], expected \[2\]/,
    ],
    [
      'float targets',
      () => crossEntropy(f(2, 3), f(2)),
      /targets has dtype f32, expected i32; cast it with .cast\('i32'\)/,
    ],
    ['three axes', () => crossEntropy(f(2, 3, 4), i([2], 0, 0)), /logits has shape/],
  ],
  linearCrossEntropy: [
    ['weights of other features', () => linearCrossEntropy(f(2, 3), f(5, 4), i([2], 0, 0)), /weight has shape \[5,4\]/],
  ],
  routerTopk: [
    [
      'a number of groups that does not divide that of the experts',
      () => routerTopk(f(2, 5), f(5), router),
      /groups = 2 does not divide 5 experts/,
    ],
    [
      'a topGroups above the number of groups',
      () => routerTopk(f(2, 4), f(4), { ...router, topGroups: 3 }),
      /topGroups = 3/,
    ],
    ['a fractional topGroups', () => routerTopk(f(2, 4), f(4), { ...router, topGroups: 1.5 }), /topGroups = 1.5/],
    [
      'a topK above the number of experts in the selected groups',
      () => routerTopk(f(2, 4), f(4), { ...router, topK: 3 }),
      /topK = 3 is not in 1\.\.2/,
    ],
    ['a fractional topK', () => routerTopk(f(2, 4), f(4), { ...router, topK: 1.5 }), /topK = 1.5/],
    ['a bias of another size', () => routerTopk(f(2, 4), f(3), router), /bias has shape \[3\], expected \[4\]/],
  ],
  dispatchPlan: [
    ['one axis', () => dispatchPlan(i([2], 0, 0), 2), /indices have rank 1/],
    ['no experts', () => dispatchPlan(i([1, 2], 0, 0), 0), /experts = 0 is not a positive integer/],
    ['a fractional number of experts', () => dispatchPlan(i([1, 2], 0, 0), 2.5), /experts = 2.5/],
  ],
  permuteTokens: [
    ['a plan of other tokens', () => permuteTokens(f(3, 4), plan(4)), /order has shape \[4\], expected \[6\]/],
  ],
  combineTokens: [['gates of other tokens', () => combineTokens(f(4, 3), f(3, 2), plan(4)), /expected \[6,\*\]/]],
  groupedMatmul: [
    [
      'offsets of other experts',
      () => groupedMatmul(f(4, 3), f(2, 5, 3), i([2], 0, 4)),
      /offsets has shape \[2\], expected \[3\]/,
    ],
    ['weights of other features', () => groupedMatmul(f(4, 3), f(2, 5, 4), i([3], 0, 2, 4)), /weight has shape/],
  ],
  routedExperts: [
    ['gates of other tokens', () => routedExperts(f(3, 4), nets(4, 6), f(2, 2), plan(4)), /weights has shape \[2,2\]/],
    ['a plan of other tokens', () => routedExperts(f(3, 4), nets(4, 6), f(3, 2), plan(4)), /order has shape \[4\]/],
    ['weights of other features', () => routedExperts(f(2, 4), nets(5, 6), f(2, 2), plan(4)), /gate has shape/],
    [
      'a down projection of another shape',
      () => routedExperts(f(2, 4), { ...nets(4, 6), down: f(1, 6, 4) }, f(2, 2), plan(4)),
      /down has shape \[1,6,4\], expected \[1,4,6\]/,
    ],
    [
      'offsets of other experts',
      () => routedExperts(f(2, 4), nets(4, 6, 2), f(2, 2), plan(4)),
      /offsets has shape \[2\], expected \[3\]/,
    ],
  ],
  quantize: [
    ['an empty block', () => quantize(f(4, 4), [0, 2]), /block = \[0,2\]/],
    ['a fractional block', () => quantize(f(4, 4), [1.5, 2]), /block = \[1.5,2\]/],
    ['one axis', () => quantize(f(4)), /input has shape \[4\]/],
  ],
  quantizedMatmul: [
    ['other columns', () => quantizedMatmul(f(2, 5), int8(3, 4)), /input has shape \[2,5\], expected \[\*,4\]/],
    [
      'the weight as f32',
      () => quantizedMatmul(f(2, 4), { ...int8(3, 4), q: f(3, 4) }),
      /weight has dtype f32, expected u8/,
    ],
    ['a missing scale', () => quantizedMatmul(f(2, 4), { ...int8(3, 4), scale: null }), /int8 requires a scale/],
    ['bf16 with a scale', () => quantizedMatmul(f(2, 4), { ...bf16(3, 4), scale: f(3, 1) }), /bf16 has no scale/],
    [
      'scales of other blocks',
      () => quantizedMatmul(f(2, 4), { ...int8(3, 4), block: [2, 4] }),
      /scale has shape \[3,1\], expected \[2,1\]/,
    ],
    [
      'an odd block of int4',
      () => quantizedMatmul(f(2, 4), { ...int8(3, 4), format: 'int4', block: [1, 3] }),
      /is invalid for int4/,
    ],
    ['an empty block', () => quantizedMatmul(f(2, 4), { ...int8(3, 4), block: [0, 128] }), /block = \[0,128\]/],
  ],
  quantizedGroupedMatmul: [
    [
      'a weight without an expert axis',
      () => quantizedGroupedMatmul(f(2, 4), int8(3, 4), i([2], 0, 2)),
      /weight has shape/,
    ],
    [
      'offsets of other experts',
      () => quantizedGroupedMatmul(f(2, 4), int8(5, 3, 4), i([5], 0, 0, 0, 1, 2)),
      /offsets has shape/,
    ],
    ['floats as offsets', () => quantizedGroupedMatmul(f(2, 4), int8(1, 3, 4), f(2)), /offsets has dtype f32/],
  ],
  emaStep: [
    [
      'a value of another shape',
      () => emaStep(f(2), f(3), { decay: 0.9, step: 1 }),
      /value has shape \[3\], expected \[2\]/,
    ],
    ['integers', () => emaStep(f(2), i([2], 0, 0), { decay: 0.9, step: 1 }), /value has dtype i32, expected f32/],
  ],
  adamwStep: [
    [
      'an integer moment',
      () => adamwStep(f(2), f(2), i([2], 0, 0), f(2), f(), adamw),
      /m has dtype i32, expected f32 or bf16/,
    ],
    [
      'moments of two dtypes',
      () => adamwStep(f(2), f(2), f(2).cast('bf16'), f(2), f(), adamw),
      /v has dtype f32, expected bf16/,
    ],
    [
      'a parameter in bf16',
      () => adamwStep(f(2).cast('bf16'), f(2), f(2), f(2), f(), adamw),
      /param has dtype bf16, expected f32/,
    ],
    [
      'moments of another shape',
      () => adamwStep(f(2), f(2), f(3), f(2), f(), adamw),
      /m has shape \[3\], expected \[2\]/,
    ],
    [
      'a scale that is not a scalar',
      () => adamwStep(f(2), f(2), f(2), f(2), f(1), adamw),
      /gradScale has shape \[1\], expected \[\]/,
    ],
  ],
}

for (const [op, cases] of Object.entries(wrong)) {
  describe(`${op} rejects`, () => {
    for (const [what, call, message] of cases) {
      test(what, () => {
        expect(call).toThrow(
          expect.objectContaining({
            name: 'MoeError',
            code: expect.stringMatching(/^E_(SHAPE|DTYPE|ATTR)$/),
            op,
            message: expect.stringMatching(message),
          }),
        )
      })
    }
  })
}

/** The sizes that an op accepts in any number, as `input.axis`, by the ranks of its inputs. Others must match something. */
const free: Record<string, string> = {
  'softmax 2': '0.0 0.1',
  'rmsNorm 2,1': '0.0',
  'rmsNorm 3,1': '0.0 0.1',
  'rope 4,2,2': '0.0 0.2 0.3',
  'rope 4,3,3': '0.2 0.3',
  'rope 4,3,3,4': '0.3 3.3',
  'rope 4,2,2,4': '0.3 3.3',
  'mlaKeyValue 4,4': '0.2 0.3 1.3',
  'attention 4,4,4': '0.1 2.3',
  'attention 4,4,4,1': '0.1 2.3',
  'attention 4,4,4,1,2': '2.3',
  'latentAttention 4,3,1': '0.1 0.2 1.1',
  'latentAttention 4,3,1,2': '0.1 0.2 1.0 1.1 3.1',
  'indexScores 4,3,3': '2.1',
  'indexScores 4,3,3,2': '2.1',
  'crossEntropy 2,1': '0.1',
  'linearCrossEntropy 2,2,1': '1.0',
  'routerTopk 2,1': '0.0',
  'dispatchPlan 2': '0.0 0.1',
  'permuteTokens 2,1,1': '0.1',
  'combineTokens 2,2,1,1': '0.1',
  'groupedMatmul 2,3,1': '0.0 1.1',
  'quantizedMatmul 2,2': '0.0 1.0',
  'quantizedMatmul 2,2,2': '0.0 1.0',
  'quantizedGroupedMatmul 2,3,1': '0.0 1.1',
  'quantizedGroupedMatmul 2,3,1,3': '0.0',
  'globalNorm 2,1,0': '0.0 0.1 1.0',
  'quantize 2': '0.0 0.1',
}
/** Ops on inputs with any number of axes. */
const anyRank = new Set(['softmax', 'rmsNorm', 'globalNorm'])
/** Only called by gradient rules, which pass what fits. */
const isInternal = (op: string) => op.endsWith('Backward') || op === 'groupedMatmulWeightGrad'

const examples = new Map(
  opCases
    .filter(({ op }) => op in fusedDefinitions && !isInternal(op))
    .map(example => [`${example.op} ${example.inputs.map(({ shape }) => shape.length)}`, example] as const)
    .toReversed(),
)

describe('inputs of another dtype or shape are rejected:', () => {
  test.each([...examples])('%s', (key, { op, inputs, attrs }) => {
    const accepted = (
      at: number,
      { shape, dtype }: Pick<CaseInput, 'shape' | 'dtype'>,
      code: 'E_DTYPE' | 'E_SHAPE',
    ) => {
      const made = inputs.map((input, i) => {
        const { shape: sizes, dtype: type } = i === at ? { shape, dtype } : input
        return fromHost(hostArray(type, sizeOf(sizes)), sizes, type, backend)
      })
      try {
        runFused(fusedDefinitions[op as FusedName] as never, made, attrs as never)
      } catch (error) {
        if (error === invalid) return true
        expect(error).toMatchObject({ code })
      }
      return false
    }
    const found: string[] = []
    for (const [i, { shape, dtype }] of inputs.entries()) {
      for (const other of ['f32', 'i32', 'u8'] as const)
        if (other !== dtype)
          expect([i, other, accepted(i, { shape, dtype: other }, 'E_DTYPE')]).toEqual([i, other, false])
      if (!anyRank.has(op)) {
        expect([i, accepted(i, { shape: [...shape, 1], dtype }, 'E_SHAPE')]).toEqual([i, false])
        expect([i, accepted(i, { shape: [1, ...shape], dtype }, 'E_SHAPE')]).toEqual([i, false])
      }
      for (const [axis, size] of shape.entries())
        if (accepted(i, { shape: shape.with(axis, size + 1), dtype }, 'E_SHAPE')) found.push(`${i}.${axis}`)
    }
    expect(found.join(' ')).toBe(free[key] ?? '')
  })
})
