/** @file Steps of several ranks in bf16: both passes multiply as those of one rank do. */
import { backward, globalNorm, type Precision, scope, setDefaultBackend, trainable, withPrecision } from '@moe/core'
import { createBackend } from '@moe/kernels-cpu'
import { afterAll, expect, test } from 'vitest'
import { ExpertParallel, local, Pipeline, zeroBubbleH1 } from './index.ts'
import { batchesOf, newModel } from './test-steps.ts'

// The highest instruction set, which need not be the default.
const backend = await createBackend({ isa: process.arch === 'arm64' ? 'bf16' : 'avx512bf16' })
setDefaultBackend(backend)
afterAll(() => backend.dispose())

/** Loss and norm of the gradient of one micro-batch. */
async function whole(precision: Precision) {
  const model = newModel()
  const [batch] = batchesOf(1, model)
  const [loss, norm] = scope(() =>
    withPrecision(precision, () => {
      const { loss } = model.loss(batch)
      const value = loss.detach()
      backward(loss)
      return [value, globalNorm(trainable(model).flatMap(({ grad }) => grad ?? []))]
    }),
  )
  return { loss: await loss.item(), gradNorm: await norm.item() }
}

// Reason to skip: this processor has no bf16 products, so that they are f32 in any case.
test.skipIf(!backend.bf16Matmul)('stages, and experts on several ranks', async () => {
  const [exact, rounded] = [await whole('f32'), await whole('bf16')]
  const difference = (of: 'loss' | 'gradNorm') => Math.abs(exact[of] - rounded[of])
  const near = (value: number, of: 'loss' | 'gradNorm') =>
    expect(Math.abs(value - rounded[of])).toBeLessThan(difference(of) / 20)
  await local(2, async ranks => {
    const model = newModel()
    const [batch] = batchesOf(1, model)
    const staged = await new Pipeline(model, zeroBubbleH1(2, 1), ranks).step([batch], { precision: 'bf16' })
    near(staged.loss, 'loss')
    near(staged.gradNorm, 'gradNorm')
    // The same micro-batch on both ranks.
    const spread = await new ExpertParallel(newModel(), ranks).step([batch], { precision: 'bf16' })
    near(spread.loss, 'loss')
    near(spread.gradNorm, 'gradNorm')
  })
})
