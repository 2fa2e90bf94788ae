/** @file A training run for Node and browsers, for check-training.ts. */
import { stateDict } from '@moe/core'
import { DeepSeek, presets } from '@moe/deepseek'
import { trainBpe } from '@moe/tokenizer-bpe'
import { type TrainOptions, textFiles, texts, train } from '@moe/trainer'

type DirectoryHandle = Exclude<TrainOptions['out'], string | undefined>

export interface Trained {
  readonly losses: readonly number[]
  /** Bits per byte on held-out text. */
  readonly bitsPerByte: number
  /** Sum of the absolute values of all weights. */
  readonly weights: number
  readonly text: string
  /** Code and message of the error for a file path. */
  readonly pathRefused: string
}

const proverbs = ['a stitch in time saves nine', 'better late than never', 'practice makes perfect', 'time is money']
const documents = Array.from({ length: 40 }, (_, i) => `${proverbs[i % 4]}, ${proverbs[(i * 7 + 1) % 4]}. `.repeat(3))
const steps = 10

/** Trains a model. With a folder, the run is stopped halfway and resumed with a new model. */
export async function trainTwice(folder: DirectoryHandle | undefined): Promise<Trained> {
  const data = texts(documents, { validation: 0.1 })
  const tokenizer = trainBpe(data.training, { vocabSize: 300 })
  const config = { ...presets.tiny, hidden_size: 64, num_hidden_layers: 2, vocab_size: tokenizer.vocabSize }
  const options = {
    data,
    tokenizer,
    steps,
    batchSize: 4,
    sequenceLength: 32,
    optimizer: 'muon',
    lr: 1e-2,
    progress: false,
  } as const
  const losses: number[] = []
  const run = async (more: Partial<TrainOptions>, stopAfter?: number) => {
    const model = new DeepSeek(config, { seed: 1, objective: { biasSpeed: 0.01 } })
    const stop = new AbortController()
    const onEvent: TrainOptions['onEvent'] = event => {
      if (event.type !== 'step') return
      losses.push(event.loss)
      if (event.step === stopAfter) stop.abort()
    }
    const { validation } = await train(model, { ...options, ...more, onEvent, signal: stop.signal })
    return { model, validation }
  }
  if (folder !== undefined) (await run({ out: folder, overwrite: true }, 5)).model.dispose()
  const { model, validation } = await run(folder === undefined ? {} : { out: folder, resume: true })
  let weights = 0
  for (const { data } of stateDict(model))
    for (const value of (await data()) as Float32Array) weights += Math.abs(value)
  const saved = folder && (await folder.getDirectoryHandle('model', { create: true }))
  if (saved) await model.save(saved)
  const opened = saved ? await DeepSeek.fromPretrained(saved) : model
  let text = ''
  for await (const piece of opened.generate(tokenizer.encode('better'), { tokenizer, maxTokens: 30 })) text += piece
  return { losses, bitsPerByte: validation.bitsPerByte, weights, text, pathRefused: refusedPath() }
}

function refusedPath(): string {
  try {
    textFiles('*.txt')
    return 'not refused'
  } catch (error) {
    const { code, message } = error as Error & { code: string }
    return `${code} ${message}`
  }
}
