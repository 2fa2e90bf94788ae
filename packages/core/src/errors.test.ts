import { inspect } from 'node:util'
import { describe, expect, test } from 'vitest'
import { isMoeError, MoeError } from './errors.ts'

describe('MoeError', () => {
  const cause = new Error('below')
  const error = new MoeError({
    code: 'E_SHAPE',
    op: 'matmul',
    problem: 'inner sizes differ',
    fix: 'transpose one',
    details: { lhs: [2] },
    cause,
  })

  test('has the message `op: problem; fix`, and the same parts as properties', () => {
    expect(error.message).toBe('matmul: inner sizes differ; transpose one')
    expect(error).toMatchObject({ name: 'MoeError', code: 'E_SHAPE', op: 'matmul', details: { lhs: [2] }, cause })
    expect(error).toBeInstanceOf(Error)
    expect(error.stack).toContain('errors.test.ts')
    expect(error.problem).toBe('inner sizes differ')
    // Node prints it only once.
    expect(inspect(error).match(/inner sizes differ/g)).toHaveLength(1)
  })

  test('the fix follows a multi-line problem on its own line', () => {
    const { message } = new MoeError({
      code: 'E_CONFIG',
      op: 'train',
      problem: 'two faults:\n  one\n  two\n',
      fix: 'fix them',
    })
    expect(message).toBe('train: two faults:\n  one\n  two\nfix them')
  })

  test('fix, details and cause are optional', () => {
    const plain = new MoeError({ code: 'E_NAN', op: 'step 3', problem: 'the loss is NaN' })
    expect(plain.message).toBe('step 3: the loss is NaN')
    expect(plain.fix).toBeUndefined()
    expect(plain.details).toEqual({})
    expect('cause' in plain).toBe(false)
  })

  test('is recognized by name and code, even from another copy of the package', () => {
    class MoeErrorOfAnotherCopy extends Error {
      override name = 'MoeError'
      code = 'E_DTYPE'
    }
    expect(isMoeError(error)).toBe(true)
    expect(isMoeError(error, 'E_SHAPE')).toBe(true)
    expect(isMoeError(error, 'E_DTYPE')).toBe(false)
    expect(isMoeError(new MoeErrorOfAnotherCopy(), 'E_DTYPE')).toBe(true)
    expect(isMoeError(new Error('other'))).toBe(false)
    expect(isMoeError({ name: 'MoeError', code: 'E_SHAPE' })).toBe(false)
    expect(isMoeError(null)).toBe(false)
  })
})
