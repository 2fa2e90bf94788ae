/** @file `train`: a model, data, and what must hold before the first step. */
import { MoeError, type NamedParameter, namedAdapters, namedParameters, QuantizedParameter } from '@moe/core'
import { Averages } from './averages.ts'
import { checkModel } from './check-model.ts'
import { tokenizeConversations } from './data/conversations.ts'
import type { Corpus } from './data/corpus.ts'
import { isTokens, namedStreams, sourcesOf } from './data/mixture.ts'
import { TokenDataset } from './data/token-dataset.ts'
import type { TokenStream } from './data/token-stream.ts'
import { tokenizerDigest } from './data/tokenizer-digest.ts'
import { standardError } from './host.ts'
import { watchInterrupts } from './interrupt.ts'
import type { TrainableModel } from './model.ts'
import { checkOnRanks } from './model-on-ranks.ts'
import {
  isJudged,
  makeOptimizer,
  type ResolvedOptions,
  resolveOptions,
  type TokenData,
  type TrainOptions,
} from './options.ts'
import type { TrainResult } from './result.ts'
import type { Preferences } from './rewards/preferences.ts'
import type { Rollouts } from './rewards/rollouts.ts'
import { Run } from './run.ts'
import { shareOptimizer } from './shared-update.ts'

/**
 * Trains a model. With `out`, the folder gets `checkpoints/`, `metrics.jsonl` (a line per step) and, at the end,
 * `summary.json`; a run that was stopped goes on from there with `resume`, bit for bit on a backend that computes in
 * f32 (the reference backend keeps f64, which checkpoints round).
 *
 * Ctrl-C (or `signal`) finishes the step, saves, and returns a result with `interrupted`; what the process then does
 * is the caller's choice.
 *
 * @throws MoeError E_CONFIG (options, a folder that another training writes to), E_DATA (nothing to train on, a reward that fails: a checkpoint is saved first), E_NAN (loss or gradient not finite: the step is
 *   not applied, the last checkpoint stays), E_CHECKPOINT (saving failed, or the checkpoint to resume from is damaged or
 *   another run's)
 */
export async function train(model: TrainableModel, options: TrainOptions): Promise<TrainResult> {
  checkModel('train', model)
  const settings = resolveOptions(options)
  const data = tokenData(settings)
  if (!isJudged(data)) checkTokens(model, settings, data)
  if (settings.isolate === true && model.isolates !== true) throw doesNotIsolate()
  const parameters = namedParameters(model)
  checkTrainable(parameters)
  if (settings.out !== undefined) checkSaved(model, parameters, settings.out)
  const { onRanks } = settings
  if (onRanks !== undefined) {
    checkOnRanks(onRanks, model)
    onRanks.shareOptimizer?.()
  }
  const make = (of: readonly NamedParameter[]) => makeOptimizer(settings, of)
  const updating =
    onRanks === undefined
      ? await shareOptimizer(settings.ranks, parameters, make)
      : { optimizer: make(onRanks.parameters) }
  const tell = settings.progress === false ? (text: string) => standardError().write(text) : undefined
  const interrupts = watchInterrupts(settings.signal, settings.handleSignals !== false, tell)
  let averages: Averages | undefined
  let run: Run | undefined
  try {
    if (settings.ema !== undefined) averages = new Averages(parameters, settings.ema, onRanks)
    run = new Run(model, settings, data, parameters, updating, averages, interrupts)
    return await run.all()
  } catch (error) {
    try {
      run?.log?.flush()
      await run?.tellLoads({ biases: false })
      run?.emit({ type: 'fail', error })
      await run?.heard()
    } catch {
      // The first error is the one to tell.
    }
    throw error
  } finally {
    interrupts.dispose()
    run?.steps.dispose()
    run?.lessons.dispose()
    run?.drawTogether()
    run?.unlock()
    averages?.dispose()
    updating.optimizer.dispose()
  }
}

function tokenData(settings: ResolvedOptions): TokenData | Rollouts | Preferences {
  const { data, tokenizer, bos, eos } = settings
  if (isJudged(data)) return data
  if (isTokens(data.training)) return data as TokenData
  if (tokenizer === undefined) {
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'train',
      problem: `data is ${'template' in data ? 'conversations' : 'texts'} and there is no tokenizer`,
      fix: 'pass { tokenizer }, or token data sets made with TokenDataset.fromTexts',
    })
  }
  if ('template' in data) return inBoth(data, part => tokenizeConversations(part, tokenizer, data.template))
  return inBoth(data as Corpus, part => TokenDataset.fromTexts(part, tokenizer, { bos, eos }))
}

function inBoth<T>(
  { training, validation }: { readonly training: readonly T[]; readonly validation: readonly T[] },
  tokenized: (part: readonly T[]) => TokenDataset,
): TokenData {
  return { training: tokenized(training), ...(validation.length > 0 && { validation: tokenized(validation) }) }
}

/** Streams with what they are called where one is refused. */
function streamsOf({ training, validation }: TokenData): (readonly [string, TokenStream])[] {
  const named = (part: string, name: string) => (name === '' ? part : `${part} ${name}`)
  return [
    ...sourcesOf(training).map(({ name, data }) => [named('training', name), data] as const),
    ...namedStreams(validation).map(([name, data]) => [named('validation', name), data] as const),
  ]
}

/** Tokens that the model has embeddings for, and that mean what the tokenizer of the run says. */
function checkTokens(model: TrainableModel, { tokenizer }: ResolvedOptions, data: TokenData): void {
  const digest = tokenizer && tokenizerDigest(tokenizer)
  for (const [part, { vocabSize, tokenizer: made }] of streamsOf(data)) {
    if (digest !== undefined && made !== undefined && made !== digest) {
      throw new MoeError({
        code: 'E_DATA',
        op: 'train',
        problem: `the ${part} tokens were made by another tokenizer (${made}) than the one that is given (${digest})`,
        fix: 'pass the tokenizer.json that they were made with, or make them anew',
      })
    }
    if (model.vocabSize !== undefined && vocabSize > model.vocabSize) {
      throw new MoeError({
        code: 'E_DATA',
        op: 'train',
        problem: `the ${part} tokens have ids up to ${vocabSize - 1}, the model has embeddings for ${model.vocabSize}`,
        fix: 'build the model with vocab_size: tokenizer.vocabSize',
        details: { vocabSize, modelVocabSize: model.vocabSize },
      })
    }
  }
}

function checkTrainable(parameters: readonly NamedParameter[]): void {
  if (parameters.some(({ parameter }) => parameter.trainable)) return
  const stored = parameters.filter(({ parameter }) => parameter instanceof QuantizedParameter).length
  throw new MoeError({
    code: 'E_CONFIG',
    op: 'train',
    problem:
      parameters.length === 0
        ? 'the model has no parameters'
        : `the model has nothing to train: of ${parameters.length} parameters ${stored} are stored in fewer bits and the others are frozen`,
    fix:
      parameters.length === 0
        ? 'give it some in fields (not #private ones) that are Parameters, Modules or arrays of them'
        : 'put adapters beside the weights with addAdapters(model), open the model in f32, or set trainable on what is to be trained',
  })
}

/** Checkpoints of a model with adapters hold these alone. */
function checkSaved(
  model: TrainableModel,
  parameters: readonly NamedParameter[],
  out: NonNullable<TrainOptions['out']>,
): void {
  const beside = namedAdapters(model).flatMap(({ adapter: { down, up } }) => [down, up])
  if (beside.length > 0 && typeof out !== 'string') {
    throw new MoeError({
      code: 'E_UNSUPPORTED',
      op: 'train',
      problem: 'adapters alone are saved to the disk, and out is the handle of a folder',
      fix: 'leave out away, and save the model after mergeAdapters',
    })
  }
  const other = parameters.find(({ parameter }) => parameter.trainable && !beside.includes(parameter))
  if (beside.length === 0 || other === undefined) return
  throw new MoeError({
    code: 'E_CONFIG',
    op: 'train',
    problem: `${other.name} is trained beside the adapters, which alone are in checkpoints`,
    fix: 'set its trainable to false, or fold the adapters in with mergeAdapters and train the whole model',
  })
}

const doesNotIsolate = () =>
  new MoeError({
    code: 'E_CONFIG',
    op: 'train',
    problem: 'isolate is true, and the model does not say that it keeps texts apart which share a row',
    fix: 'leave isolate out, or give the model `isolates = true` once its attention sees nothing before TokenBatch.starts',
  })
