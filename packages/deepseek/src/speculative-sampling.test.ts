/** @file Speculative sampling draws from the same distribution. Uses the fastest available backend for hundreds of short runs. */
import { firstAvailable, setDefaultBackend } from '@moe/core'
import { expect, test } from 'vitest'
import { DeepSeek, type GenerateOptions } from './index.ts'
import { read } from './test-generation.ts'
import { tiny } from './test-tiny.ts'

setDefaultBackend(await firstAvailable([() => import('@moe/kernels-cpu'), () => import('@moe/core/reference')]))

const prompt = [3, 7, 11, 2, 30]

test.each<GenerateOptions>([
  { temperature: 1.3 },
  { temperature: 1.3, topK: 12, topP: 0.9, minP: 0.02, repetitionPenalty: 1.4 },
  // Strong penalties, because only two generated tokens precede the compared one. The bias makes repetitions likely.
  { temperature: 1.3, frequencyPenalty: 1.2, presencePenalty: 1.5, logitBias: { 5: 3, 8: 3 } },
])('sampling is reproducible by seed, and speculative sampling has the same distribution: %o', async sampling => {
  const model = new DeepSeek(tiny, { seed: 2 })
  let accepted = 0
  const first = async (options: GenerateOptions) => {
    const ids: number[] = []
    const text = model.generate(prompt, { maxTokens: 3, ...sampling, ...options })
    for await (const id of text) ids.push(id)
    for (const n of text.stats.accepted) accepted += n
    return ids
  }
  for (const speculative of [false, true])
    expect(await first({ seed: 5, speculative })).toEqual(await first({ seed: 5, speculative }))
  const batch = model.continuousBatch()
  const unseeded = batch.generate(prompt, { maxTokens: 12, ...sampling })
  expect(await first({ maxTokens: 12 })).toEqual(await first({ maxTokens: 12, seed: 0 }))
  expect(await read(unseeded)).toEqual(await first({ maxTokens: 12 }))
  batch.dispose()
  // The third token depends on the acceptance of drafts. Compare its histograms over seeds.
  const runs = 250
  const histogram = async (speculative: boolean, offset: number) => {
    const counts = new Float64Array(40)
    for (let seed = 0; seed < runs; seed++) counts[(await first({ seed: seed + offset, speculative }))[2]]++
    return counts
  }
  const together = async (offset: number) => {
    const counts = new Float64Array(40)
    const batch = model.continuousBatch({ maxTexts: 16, speculative: true })
    const third = async (seed: number) => {
      const ids: number[] = []
      const text = batch.generate(prompt, { maxTokens: 3, ...sampling, seed: seed + offset })
      for await (const id of text) ids.push(id)
      for (const n of text.stats.accepted) accepted += n
      counts[ids[2]]++
    }
    await Promise.all(Array.from({ length: runs }, (_, seed) => third(seed)))
    batch.dispose()
    return counts
  }
  const plain = await histogram(false, 0)
  for (const drafted of [() => histogram(true, 10_000), () => together(20_000)]) {
    accepted = 0
    const counts = await drafted()
    const chi = plain.reduce(
      (sum, n, i) => (n + counts[i] === 0 ? sum : sum + (n - counts[i]) ** 2 / (n + counts[i])),
      0,
    )
    // Chi-squared with at most 39 degrees of freedom exceeds 72.1 once in a thousand.
    expect(chi).toBeLessThan(72.1)
    expect(accepted).toBeGreaterThan(0)
  }
  model.dispose()
})
