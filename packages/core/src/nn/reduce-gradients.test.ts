import { expect, test } from 'vitest'
import { full, zeros } from '../create.ts'
import { Parameter } from '../parameter.ts'
import { readF64, referenceBackend } from '../reference/index.ts'
import { keep } from '../scope.ts'
import { reduceGradients } from './reduce-gradients.ts'

test('gradients are replaced by the reduced ones, in groups, and the old ones are freed', async () => {
  const backend = referenceBackend()
  const large = 1 << 21
  const sizes = [3, large, large, 5, 7]
  const parameters = sizes.map(size => new Parameter(zeros([size], { backend })))
  for (const [i, parameter] of parameters.entries())
    if (i !== 3) parameter.grad = keep(full([sizes[i]], i + 1, { backend }))
  const before = backend.stats().handles
  const groups: number[][] = []
  await reduceGradients(parameters, async gradients => {
    groups.push(gradients.map(({ size }) => size))
    return gradients.map(gradient => keep(gradient.mul(10)))
  })
  expect(groups).toEqual([[3, large, large], [7]])
  expect(parameters.map(({ grad }) => grad && [grad.size, readF64(grad)[0]])).toEqual([
    [3, 10],
    [large, 20],
    [large, 30],
    null,
    [7, 50],
  ])
  expect(backend.stats().handles).toBe(before)
})
