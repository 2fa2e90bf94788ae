/** @file `train`, and the checks of model and data before the first step. */
import { MoeError, type NamedParameter, namedAdapters, namedParameters, QuantizedParameter } from '@moe/core'
import { checkModel } from './check-model.ts'
import { tokenizeConversations } from './data/conversations.ts'
import type { Corpus } from './data/corpus.ts'
import { isTokens, namedStreams, sourcesOf, type TokenData } from './data/token-data.ts'
import { TokenDataset } from './data/token-dataset.ts'
import type { TokenStream } from './data/token-stream.ts'
import { tokenizerDigest } from './data/tokenizer-digest.ts'
import { standardError } from './host.ts'
import { watchInterrupts } from './interrupt.ts'
import type { TrainableModel } from './model.ts'
import { ModelEma } from './model-ema.ts'
import { checkOnRanks } from './model-on-ranks.ts'
import {
  isRolloutsOrPreferences,
  makeOptimizer,
  type ResolvedOptions,
  resolveOptions,
  type TrainOptions,
} from './options.ts'
import type { TrainResult } from './result.ts'
import type { Preferences } from './rewards/preferences.ts'
import type { Rollouts } from './rewards/rollouts.ts'
import { Run } from './run.ts'
import { shardOptimizer } from './sharded-update.ts'

/**
 * Trains a model and returns the result of the run.
 *
 * With `out`, the folder gets `checkpoints/`, `metrics.jsonl` (one line per step) and, at the end, `summary.json`. A
 * stopped run continues from there with `resume`, bit for bit on a backend that computes in f32. (The reference backend
 * computes in f64, which checkpoints round.)
 *
 * Ctrl-C, SIGTERM or `signal` finish the current step, save a checkpoint, and return a result with `interrupted`. The
 * process keeps running.
 *
 * @throws MoeError E_CONFIG for invalid options, or a folder that another training is writing to
 * @throws MoeError E_DATA if there is nothing to train on, or a reward function fails (after saving a checkpoint)
 * @throws MoeError E_NAN if the loss or gradient of a step is not finite: the step is not applied, and the last
 *   checkpoint is kept
 * @throws MoeError E_CHECKPOINT if saving fails, or the checkpoint to resume from is corrupt or of another run
 */
export async function train(model: TrainableModel, options: TrainOptions): Promise<TrainResult> {
  checkModel('train', model)
  const settings = resolveOptions(options)
  const data = tokenData(settings)
  if (!isRolloutsOrPreferences(data)) checkTokens(model, settings, data)
  if (settings.isolate === true && model.isolates !== true) throw doesNotIsolate()
  const parameters = namedParameters(model)
  checkTrainable(parameters)
  if (settings.out !== undefined) checkSaved(model, parameters, settings.out)
  const { onRanks } = settings
  if (onRanks !== undefined) {
    checkOnRanks(onRanks, model)
    onRanks.shardOptimizer?.()
  }
  const make = (of: readonly NamedParameter[]) => makeOptimizer(settings, of)
  const updating =
    onRanks === undefined
      ? await shardOptimizer(settings.ranks, parameters, make)
      : { optimizer: make(onRanks.parameters) }
  let ema: ModelEma | undefined
  let run: Run | undefined
  // A step may take long, and Ctrl-C would seem to have no effect.
  const report = (message: string) => {
    if (settings.progress === false || run === undefined) {
      standardError().write(`${message}\n`)
      return
    }
    try {
      run.events.emit({ type: 'notice', message })
    } catch {
      // Within a signal handler, the error of a listener would end the process.
    }
  }
  const interrupts = watchInterrupts(settings.signal, settings.handleSignals !== false, report)
  try {
    if (settings.ema !== undefined) ema = new ModelEma(parameters, settings.ema, settings)
    run = new Run(model, settings, data, parameters, updating, ema, interrupts)
    return await run.execute()
  } catch (error) {
    await run?.fail(error)
    throw error
  } finally {
    interrupts.dispose()
    run?.dispose()
    ema?.dispose()
    updating.optimizer.dispose()
  }
}

function tokenData(settings: ResolvedOptions): TokenData | Rollouts | Preferences {
  const { data, tokenizer, bos, eos } = settings
  if (isRolloutsOrPreferences(data)) return data
  if (isTokens(data.training)) return data as TokenData
  if (tokenizer === undefined) {
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'train',
      problem: `data contains ${'template' in data ? 'conversations' : 'texts'}, but no tokenizer is given`,
      fix: 'pass { tokenizer }, or tokens made with TokenDataset.fromTexts',
    })
  }
  if ('template' in data) return tokenizeParts(data, part => tokenizeConversations(part, tokenizer, data.template))
  return tokenizeParts(data as Corpus, part => TokenDataset.fromTexts(part, tokenizer, { bos, eos }))
}

function tokenizeParts<T>(
  { training, validation }: { readonly training: readonly T[]; readonly validation: readonly T[] },
  tokenized: (part: readonly T[]) => TokenDataset,
): TokenData {
  return { training: tokenized(training), ...(validation.length > 0 && { validation: tokenized(validation) }) }
}

/** All streams, with names for error messages. */
function streamsOf({ training, validation }: TokenData): (readonly [string, TokenStream])[] {
  const named = (part: string, name: string) => (name === '' ? part : `${part} ${name}`)
  return [
    ...sourcesOf(training).map(({ name, data }) => [named('training', name), data] as const),
    ...namedStreams(validation).map(([name, data]) => [named('validation', name), data] as const),
  ]
}

/** Checks that the model has embeddings for all token ids, and that the given tokenizer made the tokens. */
function checkTokens(model: TrainableModel, { tokenizer }: ResolvedOptions, data: TokenData): void {
  const digest = tokenizer && tokenizerDigest(tokenizer)
  for (const [part, { vocabSize, tokenizer: made }] of streamsOf(data)) {
    if (digest !== undefined && made !== undefined && made !== digest) {
      throw new MoeError({
        code: 'E_DATA',
        op: 'train',
        problem: `the ${part} tokens were made with another tokenizer (${made}) than the given one (${digest})`,
        fix: 'pass the tokenizer.json that they were made with, or tokenize the texts again',
      })
    }
    if (model.vocabSize !== undefined && vocabSize > model.vocabSize) {
      throw new MoeError({
        code: 'E_DATA',
        op: 'train',
        problem: `the ${part} tokens have ids up to ${vocabSize - 1}, but the model has embeddings for ${model.vocabSize} ids`,
        fix: 'create the model with vocab_size: tokenizer.vocabSize',
        details: { vocabSize, modelVocabSize: model.vocabSize },
      })
    }
  }
}

function checkTrainable(parameters: readonly NamedParameter[]): void {
  if (parameters.some(({ parameter }) => parameter.trainable)) return
  const quantized = parameters.filter(({ parameter }) => parameter instanceof QuantizedParameter).length
  throw new MoeError({
    code: 'E_CONFIG',
    op: 'train',
    problem:
      parameters.length === 0
        ? 'the model has no parameters'
        : `the model has no trainable parameters: ${quantized} of ${parameters.length} are quantized, the others are frozen`,
    fix:
      parameters.length === 0
        ? 'store Parameters, Modules or arrays of them in its fields (not in #private ones)'
        : 'add adapters with addAdapters(model), open the model in f32, or set trainable on the parameters to train',
  })
}

/** Checkpoints of a model with adapters contain only the adapters, so nothing else may be trained. */
function checkSaved(
  model: TrainableModel,
  parameters: readonly NamedParameter[],
  out: NonNullable<TrainOptions['out']>,
): void {
  const adapters = namedAdapters(model).flatMap(({ adapter: { down, up } }) => [down, up])
  if (adapters.length > 0 && typeof out !== 'string') {
    throw new MoeError({
      code: 'E_UNSUPPORTED',
      op: 'train',
      problem: 'adapters can be saved only to a path, but out is a directory handle',
      fix: 'omit out, and save the model after mergeAdapters',
    })
  }
  const other = parameters.find(({ parameter }) => parameter.trainable && !adapters.includes(parameter))
  if (adapters.length === 0 || other === undefined) return
  throw new MoeError({
    code: 'E_CONFIG',
    op: 'train',
    problem: `${other.name} is trainable, but checkpoints of a model with adapters contain only the adapters`,
    fix: 'set its trainable to false, or merge the adapters with mergeAdapters and train the whole model',
  })
}

const doesNotIsolate = () =>
  new MoeError({
    code: 'E_CONFIG',
    op: 'train',
    problem: 'isolate is true, but the model does not declare that it isolates documents that share a row',
    fix: 'omit isolate, or set `isolates = true` on the model if its attention ignores what precedes TokenBatch.starts',
  })
