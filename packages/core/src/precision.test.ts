import { beforeEach, describe, expect, test } from 'vitest'
import { backward } from './autograd/backward.ts'
import { checkpoint } from './autograd/checkpoint.ts'
import type { Backend } from './backend.ts'
import { ones, tensor } from './create.ts'
import { attention } from './fused/attention.ts'
import { groupedMatmul } from './fused/grouped-matmul.ts'
import { Linear } from './nn/layers.ts'
import type { Precision } from './ops.ts'
import { currentPrecision, withPrecision } from './precision.ts'
import { referenceBackend } from './reference/index.ts'
import { isRecording, noGrad } from './tape.ts'
import type { Tensor } from './tensor.ts'

test('noGrad and withPrecision reject asynchronous functions and unknown precisions', async () => {
  const asynchronousError = (op: string) =>
    expect.objectContaining({ code: 'E_ATTR', op, message: expect.stringMatching(/synchronous function/) })
  expect(() => noGrad(() => Promise.resolve(1))).toThrow(asynchronousError('noGrad'))
  expect(() => withPrecision('bf16', () => Promise.resolve(1))).toThrow(asynchronousError('withPrecision'))
  expect(() => withPrecision('fp16' as 'f32', () => 1)).toThrow(/unknown precision "fp16".*'f32', 'bf16' or 'fp8'/s)
  using x = tensor([1, 2], [1, 2], { backend: referenceBackend() })
  expect(() => x.matmul(x, { transposeB: true, precision: 'fp16' as 'f32' })).toThrow('matmul: unknown precision')
  expect([isRecording(), currentPrecision()]).toEqual([true, 'f32'])
})

describe('precision', () => {
  /** Creates a reference backend that records the precision of every matrix product. */
  function recordingBackend(): { backend: Backend; seen: Precision[] } {
    const backend = referenceBackend()
    const seen: Precision[] = []
    const { matmul } = backend.primitives
    const primitives = {
      ...backend.primitives,
      matmul: (...args: Parameters<typeof matmul>) => {
        seen.push(args[1].precision)
        return matmul(...args)
      },
    }
    return { backend: { ...backend, primitives }, seen }
  }
  let backend: Backend
  let seen: Precision[]
  let model: Linear
  let x: Tensor
  beforeEach(() => {
    const made = recordingBackend()
    backend = made.backend
    seen = made.seen
    model = new Linear(4, 4, { backend })
    x = ones([2, 4], { backend })
  })

  test('applies to every matrix product of the forward pass, and is restored afterwards', () => {
    expect(currentPrecision()).toBe('f32')
    withPrecision('bf16', () => {
      expect(currentPrecision()).toBe('bf16')
      model.forward(x)
      withPrecision('f32', () => model.forward(x))
      const q = x.reshape([1, 2, 1, 4])
      attention(q, q, q)
      groupedMatmul(x, ones([1, 3, 4], { backend }), tensor(Int32Array.of(0, 2), [2], { backend }))
    })
    expect(seen).toEqual(['bf16', 'f32', 'bf16', 'bf16', 'bf16'])
    expect(currentPrecision()).toBe('f32')
    expect(() =>
      withPrecision('bf16', () => {
        throw new Error('no')
      }),
    ).toThrow('no')
    expect(currentPrecision()).toBe('f32')
  })

  test('can be overridden for one product', () => {
    withPrecision('bf16', () => x.matmul(model.weight, { precision: 'f32' }))
    expect(seen).toEqual(['f32'])
  })

  test('is the same in the backward pass as in the forward pass, wherever backward is called', () => {
    const loss = withPrecision('bf16', () => model.forward(x).sum())
    backward(loss)
    expect(seen).toEqual(['bf16', 'bf16'])
  })

  test('is the same in a recomputed forward pass as in the first one', () => {
    const loss = withPrecision('bf16', () => checkpoint(input => model.forward(input), x).sum())
    backward(loss)
    expect(new Set(seen)).toEqual(new Set(['bf16']))
    expect(seen.length).toBe(3)
  })
})
