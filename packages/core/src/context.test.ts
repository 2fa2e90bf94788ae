import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { backward } from './autograd/backward.ts'
import { checkpoint } from './autograd/checkpoint.ts'
import type { Backend, Precision } from './backend.ts'
import {
  context,
  currentPrecision,
  defaultBackend,
  fallbacks,
  firstAvailable,
  isRecording,
  noGrad,
  setDefaultBackend,
  withPrecision,
} from './context.ts'
import { ones, randn, tensor } from './create.ts'
import { MoeError } from './errors.ts'
import { attention } from './fused/attention.ts'
import { groupedMatmul } from './fused/grouped-matmul.ts'
import { softmax } from './fused/softmax.ts'
import { swiglu } from './fused/swiglu.ts'
import { Linear } from './nn/layers.ts'
import { Random } from './random.ts'
import { referenceBackend } from './reference/index.ts'
import type { Tensor } from './tensor.ts'

afterEach(() => {
  context.backend = null
})

describe('default backend', () => {
  test('if none is set, the error explains how to set one', () => {
    expect(() => tensor([1])).toThrow(
      expect.objectContaining({ code: 'E_NO_BACKEND', message: expect.stringMatching(/call setDefaultBackend\(/) }),
    )
  })

  test('must be awaited first', () => {
    for (const [none, what] of [
      [Promise.resolve(referenceBackend()), 'a promise'],
      ['kernels-cpu', 'the string "kernels-cpu"'],
      [undefined, 'undefined'],
    ] as const) {
      const message = expect.stringContaining(`the backend is ${what}; pass an awaited backend`)
      expect(() => setDefaultBackend(none as unknown as Backend)).toThrow(
        expect.objectContaining({ code: 'E_ATTR', message }),
      )
    }
  })

  test('is used for new tensors unless another one is given', () => {
    const [a, b] = [referenceBackend(), referenceBackend()]
    setDefaultBackend(a)
    expect(defaultBackend()).toBe(a)
    expect(tensor([1]).backend).toBe(a)
    expect(tensor([1], [1], { backend: b }).backend).toBe(b)
  })
})

describe('firstAvailable', () => {
  const backend = referenceBackend()
  const works = async () => ({ createBackend: async () => backend })
  const failing = (code: 'E_NO_BACKEND' | 'E_UNSUPPORTED' | 'E_BACKEND', problem: string) => async () => ({
    createBackend: async (): Promise<Backend> => {
      throw new MoeError({ code, op: 'createBackend', problem })
    },
  })
  // The specifier is a variable, so that the compiler does not resolve it.
  const absent = '@moe/not-installed'
  const missing = () => import(absent)

  test('skips backends that are not installed or find no device, and reports why', async () => {
    const skipped: string[] = []
    const loaders = [missing, failing('E_NO_BACKEND', 'no driver'), failing('E_UNSUPPORTED', 'too old'), works]
    const found = await firstAvailable(loaders, { onSkip: reason => skipped.push(reason) })
    expect(found).toBe(backend)
    expect(skipped).toEqual([
      expect.stringContaining('@moe/not-installed'),
      'createBackend: no driver',
      'createBackend: too old',
    ])
  })

  test('does not load backends after the first that works', async () => {
    let loaded = false
    const second = async () => {
      loaded = true
      return works()
    }
    await firstAvailable([works, second])
    expect(loaded).toBe(false)
  })

  test('reports every reason when none works', async () => {
    const promise = firstAvailable([missing, failing('E_NO_BACKEND', 'no driver')])
    await expect(promise).rejects.toMatchObject({ code: 'E_NO_BACKEND' })
    await expect(promise).rejects.toThrow(/- .*@moe\/not-installed[\s\S]*\n {2}- createBackend: no driver\ninstall one/)
  })

  test('rejects anything but a list of functions', async () => {
    const loader = async () => ({ createBackend: async () => backend })
    for (const none of [loader, [loader()], undefined]) {
      await expect(firstAvailable(none as unknown as [])).rejects.toMatchObject({
        code: 'E_ATTR',
        message: expect.stringContaining(
          'not a list of functions; pass functions that import a backend: firstAvailable([() => import(',
        ),
      })
    }
  })

  test('rejects an empty list', async () => {
    await expect(firstAvailable([])).rejects.toMatchObject({ code: 'E_NO_BACKEND' })
  })

  test('rethrows errors that do not mean that a backend is unavailable', async () => {
    await expect(firstAvailable([failing('E_BACKEND', 'out of order'), works])).rejects.toMatchObject({
      code: 'E_BACKEND',
    })
    const broken = async () => ({
      createBackend: async (): Promise<Backend> => {
        throw new TypeError('bug')
      },
    })
    await expect(firstAvailable([broken, works])).rejects.toThrow(TypeError)
  })
})

test('noGrad does not record, can be nested, and also ends with an exception', () => {
  const backend = referenceBackend()
  const model = new Linear(2, 2, { backend })
  const x = ones([1, 2], { backend })
  expect(model.forward(x).tracked).toBe(true)
  noGrad(() => {
    noGrad(() => expect(isRecording()).toBe(false))
    expect(isRecording()).toBe(false)
    const y = model.forward(x)
    expect(y.tracked).toBe(false)
    expect(y.node).toBeNull()
  })
  expect(() =>
    noGrad(() => {
      throw new Error('no')
    }),
  ).toThrow('no')
  expect(isRecording()).toBe(true)
})

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

describe('fallbacks', () => {
  const count = (backend: Backend, op: string) =>
    fallbacks().find(entry => entry.backend === backend.name && entry.op === op)?.count ?? 0

  test('counts fused ops that ran as their decomposition, most frequent first', () => {
    const backend: Backend = { ...referenceBackend(), name: 'count:me' }
    const x = ones([2, 3], { backend })
    softmax(x)
    softmax(x)
    swiglu(x, x)
    const own = fallbacks().filter(entry => entry.backend === 'count:me')
    expect(own).toEqual([
      { backend: 'count:me', op: 'softmax', count: 2 },
      { backend: 'count:me', op: 'swiglu', count: 1 },
    ])
  })

  test('does not count a fused kernel that runs, but counts one that declines', async () => {
    const plain = referenceBackend()
    let calls = 0
    const backend: Backend = {
      ...plain,
      name: 'fused-test',
      fused: {
        softmax([x], _attrs, [spec]) {
          calls++
          if (spec.shape.length > 1) return undefined
          return plain.primitives.fill([], { value: x.shape[0] }, [spec])
        },
      },
    }
    const y = softmax(ones([3], { backend }))
    expect(await y.values()).toEqual(Float32Array.of(3, 3, 3))
    expect(count(backend, 'softmax')).toBe(0)
    const declined = softmax(randn([2, 3], new Random(1), { backend }))
    expect((await declined.sum(1).values()).every(total => Math.abs(total - 1) < 1e-6)).toBe(true)
    expect(count(backend, 'softmax')).toBe(1)
    expect(calls).toBe(2)
  })
})
