import { expect, test } from 'vitest'
import { driverError } from '../packages/kernels-cuda/src/driver/status.ts'
import { isLost } from '../tools/gpu/vitest.ts'

test('on a GPU, the runner of tests starts a new process after an error that leaves the device unusable', () => {
  const [illegalAddress, outOfMemory] = [700, 2].map(code => driverError('matmul', code, 'an error', '', ''))
  expect(isLost(illegalAddress)).toBe(true)
  expect(isLost(new Error('in a case of the suite', { cause: illegalAddress }))).toBe(true)
  expect(isLost(outOfMemory)).toBe(false)
  expect(isLost('a string')).toBe(false)
})
