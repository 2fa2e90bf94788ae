/**
 * @file For tests: a training run in a separate process, to be interrupted. Arguments: folder, and `hang` to never
 *   finish saving, or `silent` to show no progress.
 */
import { setDefaultBackend } from '@moe/core'
import { BigramModel, letterData, roundingBackend } from './test-model.ts'
import { train } from './train.ts'

class Hanging extends BigramModel {
  async save(): Promise<void> {
    process.stdout.write('saving\n')
    await new Promise(resolve => setTimeout(resolve, 60_000))
  }
}

const [out, mode] = process.argv.slice(2)
setDefaultBackend(roundingBackend())
const run = await train(mode === 'hang' ? new Hanging() : new BigramModel(), {
  data: letterData(),
  steps: 100_000,
  batchSize: 2,
  sequenceLength: 8,
  checkpointEvery: 50_000,
  out,
  resume: 'auto',
  progress: mode !== 'silent',
  onEvent: event => {
    if (event.type === 'step' && event.step % 20 === 0) process.stdout.write(`step ${event.step}\n`)
  },
})
if (run.interrupted) process.exitCode = 130
