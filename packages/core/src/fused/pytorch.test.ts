import { readFileSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { gradients } from '../autograd/backward.ts'
import { full, ones, tensor, zeros } from '../create.ts'
import { setDefaultBackend } from '../default-backend.ts'
import { Parameter } from '../parameter.ts'
import { concat } from '../primitives.ts'
import { referenceBackend } from '../reference/index.ts'
import type { Tensor } from '../tensor.ts'
import { assertClose, type Tolerance } from '../testing/compare.ts'
import { adamwStep, globalNorm } from './adamw.ts'
import { attention } from './attention.ts'
import { crossEntropy, linearCrossEntropy } from './cross-entropy.ts'
import { groupedMatmul } from './grouped-matmul.ts'
import { rmsNorm } from './rms-norm.ts'
import { rope } from './rope.ts'
import { softmax } from './softmax.ts'
import { swiglu } from './swiglu.ts'

setDefaultBackend(referenceBackend())

/**
 * Fixtures recorded by tools/reference/core_ops.py (single PyTorch operations in f32) and fp8_linear.py (linear layers
 * in fp8).
 */
const folder = new URL('../../fixtures/', import.meta.url)
const { cases } = JSON.parse(readFileSync(new URL('ops.json', folder), 'utf8')) as {
  cases: Record<string, Record<string, number>>
}
const [stored, storedInFp8] = ['ops', 'fp8'].map(name =>
  readTensors(readFileSync(new URL(`${name}.safetensors`, folder))),
)

/** A minimal safetensors reader, because @moe/checkpoint depends on this package. */
function readTensors(file: Buffer): Map<string, { shape: number[]; data: Float32Array | Int32Array }> {
  const headerBytes = Number(file.readBigUInt64LE(0))
  const header = JSON.parse(file.toString('utf8', 8, 8 + headerBytes)) as Record<
    string,
    { dtype: 'F32' | 'I32'; shape: number[]; data_offsets: [number, number] }
  >
  delete header['__metadata__']
  return new Map(
    Object.entries(header).map(
      ([
        name,
        {
          dtype,
          shape,
          data_offsets: [start, end],
        },
      ]) => {
        const bytes = Uint8Array.from(file.subarray(8 + headerBytes + start, 8 + headerBytes + end)).buffer
        return [name, { shape, data: dtype === 'F32' ? new Float32Array(bytes) : new Int32Array(bytes) }]
      },
    ),
  )
}

function raw(key: string) {
  const found = stored.get(key) ?? storedInFp8.get(key)
  if (found === undefined) throw new Error(`the fixture has no ${key}`)
  return found
}

const get = (key: string) => tensor(raw(key).data, raw(key).shape)

type Inputs = Record<string, Tensor>
interface Op {
  readonly inputs: string[]
  readonly forward: (inputs: Inputs, attrs: Record<string, number>) => Tensor
}
/** Each case: the inputs that have gradients, and the op to run on them. */
const ops: Record<string, Op> = {
  softmax: { inputs: ['x'], forward: ({ x }) => softmax(x) },
  softmax_large: { inputs: ['x'], forward: ({ x }) => softmax(x) },
  log_softmax: {
    inputs: ['x'],
    forward: ({ x }) => {
      const shifted = x.sub(x.detach().max(-1, true))
      return shifted.sub(shifted.exp().sum(-1, true).log())
    },
  },
  rms_norm: { inputs: ['x', 'weight'], forward: ({ x, weight }, { eps }) => rmsNorm(x, weight, eps) },
  rms_norm_small: { inputs: ['x', 'weight'], forward: ({ x, weight }, { eps }) => rmsNorm(x, weight, eps) },
  silu: { inputs: ['input'], forward: ({ input }) => swiglu(input, ones(input.shape)) },
  sigmoid: { inputs: ['input'], forward: ({ input }) => input.sigmoid() },
  swiglu: { inputs: ['gate', 'up'], forward: ({ gate, up }) => swiglu(gate, up) },
  rope: { inputs: ['x'], forward: ({ x }) => rope(x, get('rope.cos'), get('rope.sin')) },
  attention: { inputs: ['q', 'k', 'v'], forward: ({ q, k, v }, { scale }) => attention(q, k, v, { scale }) },
  cross_entropy: {
    inputs: ['logits'],
    forward: ({ logits }, attrs) => meanCounted(crossEntropy(logits, get('cross_entropy.target'), attrs)),
  },
  linear_cross_entropy: {
    inputs: ['x', 'weight'],
    forward: ({ x, weight }, attrs) =>
      meanCounted(linearCrossEntropy(x, weight, get('linear_cross_entropy.target'), attrs)),
  },
  linear: {
    inputs: ['input', 'weight'],
    forward: ({ input, weight }) => input.matmul(weight, { transposeB: true }),
  },
  embedding: { inputs: ['weight'], forward: ({ weight }) => weight.takeRows(get('embedding.ids')) },
  grouped_linear: {
    inputs: ['x', 'weight'],
    forward: ({ x, weight }) => {
      const counts = get('grouped_linear.counts')
      return groupedMatmul(x, weight, concat([zeros([1], { dtype: 'i32' }), counts.cumsum(0)]))
    },
  },
}

/** PyTorch averages over the targets that are not ignored: five of the six. */
const meanCounted = (loss: Tensor) => loss.sum().mul(1 / 5)

// Both sides agree up to the f32 rounding of PyTorch.
const tolerance: Tolerance = { relative: 2e-5, absolute: 2e-6 }

test('every recorded case is tested', () => {
  expect(Object.keys(cases).toSorted()).toEqual([...Object.keys(ops), 'adamw', 'clip', 'clip_inactive'].toSorted())
})

/** A layer with tiles along its inputs, rows and outputs. */
const inFp8: Op = {
  inputs: ['x', 'weight'],
  forward: ({ x, weight }) => x.matmul(weight, { transposeB: true, precision: 'fp8' }),
}

for (const [name, { inputs, forward }] of Object.entries({ ...ops, long: inFp8, many: inFp8, wide: inFp8 })) {
  test(`${name}: output and gradients equal those of PyTorch`, async () => {
    const leaves = inputs.map(key => new Parameter(get(`${name}.${key}`)))
    const out = forward(Object.fromEntries(inputs.map((key, i) => [key, leaves[i]])), cases[name])
    assertClose('output', await out.values(), raw(`${name}.output`).data, tolerance)
    const upstream = `${name}.grad_output`
    const gradient = stored.has(upstream) || storedInFp8.has(upstream) ? get(upstream) : undefined
    const found = gradients(out, leaves, { gradient })
    for (const [i, key] of inputs.entries()) {
      const expected = raw(`${name}.grad.${key}`).data
      assertClose(`gradient of ${key}`, await (found[i] as Tensor).values(), expected, tolerance)
    }
  })
}

describe('optimizer', () => {
  test('adamw: four steps equal those of PyTorch, including one with gradients near eps', async () => {
    const { lr, eps, weightDecay, steps } = cases['adamw']
    const [beta1, beta2] = cases['adamw']['betas'] as unknown as [number, number]
    let param = get('adamw.param')
    let m = zeros(param.shape)
    let v = zeros(param.shape)
    const size = param.size
    for (let step = 1; step <= steps; step++) {
      const grad = tensor(raw('adamw.grads').data.slice((step - 1) * size, step * size), param.shape)
      const next = adamwStep(param, grad, m, v, full([], 1), { lr, beta1, beta2, eps, weightDecay, step })
      ;({ param, m, v } = next)
      const expected = raw('adamw.params').data.slice((step - 1) * size, step * size)
      assertClose(`parameters after step ${step}`, await param.values(), expected, tolerance)
    }
    assertClose('m', await m.values(), raw('adamw.exp_avg').data, tolerance)
    assertClose('v', await v.values(), raw('adamw.exp_avg_sq').data, tolerance)
  })

  for (const name of ['clip', 'clip_inactive']) {
    test(`${name}: norm and clipped gradients equal those of PyTorch`, async () => {
      const { maxNorm, norm } = cases[name]
      const grads = [0, 1, 2].map(i => get(`${name}.grad.${i}`))
      const total = globalNorm(grads)
      assertClose('norm', [await total.item()], [norm], tolerance)
      const scale = full([], maxNorm).div(total.add(1e-6)).minimum(1)
      for (const [i, grad] of grads.entries()) {
        assertClose(`gradient ${i}`, await grad.mul(scale).values(), raw(`${name}.clipped.${i}`).data, tolerance)
      }
    })
  }
})

test('linearCrossEntropy ignores the targets that crossEntropy ignores', async () => {
  const [x, weight] = [tensor([1, 2, -1, 0.5, 3, 0], [3, 2]), tensor([1, -1, 0.5, 2, 0, 1], [3, 2])]
  const targets = tensor(Int32Array.of(0, 1, 2))
  const logits = x.matmul(weight, { transposeB: true })
  for (const options of [{}, { ignoreIndex: 1 }]) {
    const [own, expected] = [linearCrossEntropy(x, weight, targets, options), crossEntropy(logits, targets, options)]
    assertClose('losses', await own.values(), await expected.values())
    expect((await own.values())[1] === 0).toBe('ignoreIndex' in options)
  }
})
