/** @file Chooses the batch source for the data of a run. */
import type { BatchSource } from './batch-source.ts'
import { sourcesOf, type TokenData } from './data/token-data.ts'
import { TrainingOrder } from './data/training-order.ts'
import { DatasetBatches } from './dataset-batches.ts'
import type { TrainableModel } from './model.ts'
import { evaluationLimit, isRolloutsOrPreferences, type ResolvedOptions } from './options.ts'
import type { RankGroup } from './rank-group.ts'
import type { ScoringModelOnRanks } from './rewards/packed-texts.ts'
import { PreferenceBatches } from './rewards/preference-batches.ts'
import type { Preferences } from './rewards/preferences.ts'
import { RolloutBatches } from './rewards/rollout-batches.ts'
import type { Rollouts } from './rewards/rollouts.ts'
import { checkSampling } from './rewards/sampler.ts'

export function makeBatchSource(
  model: TrainableModel,
  settings: ResolvedOptions,
  data: TokenData | Rollouts | Preferences,
  ranks: RankGroup,
  signal: AbortSignal,
): BatchSource {
  const { sequenceLength, batchSize, accumulate, seed, rank, world, precision, tokenizer, bos } = settings
  const isolates = model.isolates === true
  if (isRolloutsOrPreferences(data)) {
    const isolate = settings.isolate ?? isolates
    // `resolveOptions` has checked that it can score texts.
    const onRanks = settings.onRanks as ScoringModelOnRanks | undefined
    const options = { sequenceLength, batchSize, isolate, tokenizer, bos, seed, precision, ranks, onRanks }
    if ('beta' in data) return new PreferenceBatches(model, data, options)
    return new RolloutBatches(checkSampling(model), data, { ...options, signal })
  }
  const isolate = settings.isolate ?? (isolates && sourcesOf(data.training).some(({ data }) => data.examples !== null))
  const rows = { sequenceLength, batchSize, isolate, lookahead: model.lookahead }
  const order = new TrainingOrder(data.training, { ...rows, accumulate, seed, rank, world })
  const finalTokens = evaluationLimit(settings, { final: true })
  return new DatasetBatches(model, order, {
    validation: data.validation,
    precision,
    finalTokens,
    ranks,
    onRanks: settings.onRanks,
  })
}
