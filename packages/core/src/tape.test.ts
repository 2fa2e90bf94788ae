import { expect, test } from 'vitest'
import { ones } from './create.ts'
import { Linear } from './nn/layers.ts'
import { referenceBackend } from './reference/index.ts'
import { isRecording, noGrad } from './tape.ts'

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
