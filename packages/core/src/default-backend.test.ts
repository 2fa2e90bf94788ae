import { describe, expect, test } from 'vitest'
import type { Backend } from './backend.ts'
import { tensor } from './create.ts'
import { defaultBackend, firstAvailable, setDefaultBackend } from './default-backend.ts'
import { MoeError } from './errors.ts'
import { referenceBackend } from './reference/index.ts'

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
