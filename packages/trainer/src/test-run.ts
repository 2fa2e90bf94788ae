/** @file For tests: small runs, their comparison and interruption, and a backend on which no test may leave tensors. */
import { readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { disposeModule, setDefaultBackend, stateDict } from '@moe/core'
import { afterEach, beforeAll, expect } from 'vitest'
import type { TrainEvent } from './events.ts'
import type { TrainOptions } from './options.ts'
import { readMetrics } from './report/metrics-log.ts'
import { BigramModel, letterData, removeTemporaryFolders, roundingBackend } from './test-model.ts'
import { train } from './train.ts'

export const backend = roundingBackend()
beforeAll(() => setDefaultBackend(backend))
afterEach(async () => {
  await removeTemporaryFolders()
  expect(backend.stats().handles).toBe(0)
})

export const data = letterData()
export const settings = {
  data,
  steps: 12,
  batchSize: 3,
  sequenceLength: 8,
  lr: 0.05,
  seed: 7,
  progress: false,
} as const

/** Trains a new model and returns its result, events and weights. */
export async function run(options: Partial<TrainOptions> & { model?: BigramModel } = {}) {
  const { model = new BigramModel(), ...rest } = options
  const events: TrainEvent[] = []
  const { onEvent } = rest
  try {
    const result = await train(model, {
      ...settings,
      ...rest,
      onEvent(event, reporter) {
        events.push(event)
        return onEvent?.(event, reporter)
      },
    })
    const weights = await Promise.all(
      stateDict(model).map(async ({ name, data }) => [name, Array.from(await data())] as const),
    )
    return { result, events, weights }
  } finally {
    disposeModule(model)
  }
}

export const errorOf = (work: Promise<unknown>) =>
  work.then(
    () => new Error('no error'),
    (error: Error) => error,
  )

/** The metrics of a run, without the speed. */
export const numbersOf = (out: string) =>
  readMetrics(join(out, 'metrics.jsonl')).map(({ tokensPerSecond: _, ...line }) => line)

/** Options that interrupt a run after a step. */
export function stopAfter(step: number): Pick<TrainOptions, 'signal' | 'onEvent'> {
  const controller = new AbortController()
  return {
    signal: controller.signal,
    onEvent: event => {
      if (event.type === 'step' && event.step === step) controller.abort()
    },
  }
}

export const checkpointsOf = async (out: string) => (await readdir(join(out, 'checkpoints'))).sort()
