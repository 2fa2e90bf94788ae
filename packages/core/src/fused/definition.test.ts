import { describe, expect, test } from 'vitest'
import type { Backend } from '../backend.ts'
import { ones, randn } from '../create.ts'
import { Random } from '../random.ts'
import { referenceBackend } from '../reference/index.ts'
import { fallbacks } from './definition.ts'
import { softmax } from './softmax.ts'
import { swiglu } from './swiglu.ts'

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
