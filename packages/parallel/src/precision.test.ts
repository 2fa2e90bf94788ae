/** @file Steps with pipeline and expert parallelism in bf16: forward and backward pass use bf16 products, as on one rank. */
import { backward, globalNorm, type Precision, scope, setDefaultBackend, trainable, withPrecision } from '@moe/core'
import { createBackend } from '@moe/kernels-cpu'
import { afterAll, expect, test } from 'vitest'
import { ExpertParallel, local, Pipeline, zeroBubbleH1 } from './index.ts'
import { batchesOf, newModel } from './test-steps.ts'

// The instruction set with bf16 products, which need not be the default.
const backend = await createBackend({ isa: process.arch === 'arm64' ? 'bf16' : 'avx512bf16' })
setDefaultBackend(backend)
afterAll(() => backend.dispose())

/** Loss and gradient norm of one micro-batch on one rank. */
async function stepOnOneRank(precision: Precision) {
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

// Reason to skip: this processor has no bf16 products.
test.skipIf(!backend.bf16Matmul)('pipeline and expert parallelism compute in bf16 if the step does', async () => {
  const [exact, rounded] = [await stepOnOneRank('f32'), await stepOnOneRank('bf16')]
  const difference = (of: 'loss' | 'gradNorm') => Math.abs(exact[of] - rounded[of])
  const near = (value: number, of: 'loss' | 'gradNorm') =>
    expect(Math.abs(value - rounded[of])).toBeLessThan(difference(of) / 20)
  await local(2, async ranks => {
    const model = newModel()
    const [batch] = batchesOf(1, model)
    const pipelined = await new Pipeline(model, zeroBubbleH1(2, 1), ranks).step([batch], { precision: 'bf16' })
    near(pipelined.loss, 'loss')
    near(pipelined.gradNorm, 'gradNorm')
    // Both ranks have the same micro-batch.
    const sharded = await new ExpertParallel(newModel(), ranks).step([batch], { precision: 'bf16' })
    near(sharded.loss, 'loss')
    near(sharded.gradNorm, 'gradNorm')
  })
})
