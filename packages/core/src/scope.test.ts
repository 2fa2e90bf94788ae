import { beforeEach, describe, expect, test } from 'vitest'
import type { Backend } from './backend.ts'
import { tensor } from './create.ts'
import { Parameter } from './parameter.ts'
import { referenceBackend } from './reference/index.ts'
import { disposeOnError, keep, Lifetime, scope } from './scope.ts'
import type { Tensor } from './tensor.ts'

let backend: Backend
let x: Tensor
beforeEach(() => {
  backend = referenceBackend()
  x = tensor([1, 2, 3], [3], { backend })
})
const alive = () => backend.stats().handles

describe('scope', () => {
  test('frees what is created inside and not returned', () => {
    let inner!: Tensor
    const y = scope(() => {
      inner = x.mul(2)
      return inner.add(1)
    })
    expect(inner.disposed).toBe(true)
    expect(x.disposed).toBe(false)
    expect(y.disposed).toBe(false)
    expect(alive()).toBe(2)
  })

  test('keeps tensors in returned arrays, maps and plain objects', () => {
    const result = scope(() => ({
      list: [x.add(1), [x.add(2)]],
      map: new Map([['a', x.add(3)]]),
      groups: Object.assign(Object.create(null), { b: x.add(4) }) as { b: Tensor },
      count: 3,
      nothing: null,
    }))
    expect(result.list.flat().every(t => !t.disposed)).toBe(true)
    expect(result.map.get('a')?.disposed).toBe(false)
    expect(result.groups.b.disposed).toBe(false)
    expect(alive()).toBe(5)
  })

  test('does not look into class instances: their tensors are freed unless kept', () => {
    class Holder {
      tensor = x.add(1)
      kept = keep(x.add(2))
    }
    const holder = scope(() => new Holder())
    expect(holder.tensor.disposed).toBe(true)
    expect(holder.kept.disposed).toBe(false)
  })

  test('a returned tensor belongs to the enclosing scope', () => {
    let passed!: Tensor
    scope(() => {
      passed = scope(() => x.mul(2))
      expect(passed.disposed).toBe(false)
    })
    expect(passed.disposed).toBe(true)
    expect(alive()).toBe(1)
  })

  test('a tensor from outside that is returned keeps its owner', () => {
    scope(() => {
      const outer = x.mul(2)
      expect(scope(() => outer)).toBe(outer)
      expect(outer.disposed).toBe(false)
    })
    expect(scope(() => x)).toBe(x)
    expect(x.disposed).toBe(false)
    expect(alive()).toBe(1)
  })

  test('an exception frees everything and propagates', () => {
    const failure = new Error('no')
    let made!: Tensor
    expect(() =>
      scope(() => {
        made = x.mul(2)
        scope(() => {
          x.mul(3)
          throw failure
        })
      }),
    ).toThrow(failure)
    expect(made.disposed).toBe(true)
    expect(alive()).toBe(1)
    // The failed scope is closed: new tensors belong to no scope.
    const after = x.mul(4)
    expect(after.owner).toBeNull()
  })

  test('rejects a promise, and frees what was created before it', async () => {
    let pending!: Promise<unknown>
    expect(() =>
      scope(() => {
        const y = x.mul(2)
        pending = Promise.resolve(y)
        return pending
      }),
    ).toThrow(expect.objectContaining({ code: 'E_ATTR', message: expect.stringMatching(/await its result outside/) }))
    expect(((await pending) as Tensor).disposed).toBe(true)
    expect(alive()).toBe(1)
  })
})

describe('single tensors', () => {
  test('keep takes a tensor out of every scope around it', () => {
    const kept = scope(() => scope(() => ({ t: keep(x.mul(2)) }))).t
    expect(kept.disposed).toBe(false)
    expect(kept.owner).toBeNull()
    kept.dispose()
    expect(alive()).toBe(1)
  })

  test('using frees at the end of the block', () => {
    let y!: Tensor
    {
      using inner = x.mul(2)
      y = inner
      expect(y.disposed).toBe(false)
    }
    expect(y.disposed).toBe(true)
    expect(alive()).toBe(1)
  })

  test('dispose may be called twice, even inside a scope', () => {
    scope(() => {
      const y = x.mul(2)
      y.dispose()
      y.dispose()
    })
    expect(alive()).toBe(1)
    x.dispose()
    x.dispose()
    expect(alive()).toBe(0)
  })

  test('a parameter belongs to no scope', () => {
    const parameter = scope(() => {
      const made = new Parameter(tensor([1], [1], { backend }))
      return () => made
    })()
    expect(parameter.disposed).toBe(false)
    expect(alive()).toBe(2)
  })
})

describe('a lifetime', () => {
  test('keeps tensors over several calls until it is disposed, and kept ones longer', () => {
    const life = new Lifetime()
    const [y, kept] = scope(() => life.run(() => [x.neg(), keep(x.mul(3))]))
    const z = life.run(() => scope(() => y.add(1).add(1)))
    expect([y, z].map(t => t.disposed)).toEqual([false, false])
    expect(alive()).toBe(4)
    life.dispose()
    life.dispose()
    expect([y, z, kept].map(t => t.disposed)).toEqual([true, true, false])
    const again = life.run(() => x.mul(4))
    life.dispose()
    expect(again.disposed).toBe(true)
    kept.dispose()
    expect(alive()).toBe(1)
  })

  test('after a failed function, its tensors belong to the lifetime, and the outer scope is current', () => {
    const life = new Lifetime()
    scope(() => {
      expect(() =>
        life.run(() => {
          x.mul(2)
          throw new RangeError('no')
        }),
      ).toThrow('no')
      x.mul(3)
    })
    expect(alive()).toBe(2)
    life.dispose()
    expect(alive()).toBe(1)
  })
})

describe('disposeOnError', () => {
  test('frees what a failed function created, kept or not, and nothing else', () => {
    const failure = new Error('no')
    let before!: Tensor
    expect(() =>
      disposeOnError(() => {
        before = disposeOnError(() => x.mul(2))
        new Parameter(x.mul(3))
        scope(() => keep(x.mul(4)))
        throw failure
      }),
    ).toThrow(failure)
    expect(before.disposed).toBe(true)
    expect(alive()).toBe(1)
  })

  test('a failed inner call does not free the rest', () => {
    const made = disposeOnError(() => {
      const first = x.mul(2)
      expect(() =>
        disposeOnError(() => {
          x.mul(3)
          throw new Error('no')
        }),
      ).toThrow('no')
      return [first, x.mul(4)]
    })
    expect(made.every(t => !t.disposed)).toBe(true)
    expect(alive()).toBe(3)
  })
})
