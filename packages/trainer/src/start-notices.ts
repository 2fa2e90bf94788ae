/** @file What the user should know about the model and its precision when a run starts. */
import {
  type Backend,
  type NamedParameter,
  namedAdapters,
  type Precision,
  parameterCount,
  QuantizedParameter,
  weightBytes,
} from '@moe/core'
import type { TrainableModel } from './model.ts'
import { defaults, type ResolvedOptions } from './options.ts'

interface NoticedRun {
  readonly settings: ResolvedOptions
  /** Held-out tokens. */
  readonly validationTokens: number
  /** Whether checkpoints are saved, by this rank or by another one. */
  readonly savesCheckpoints: boolean
}

/**
 * Notices about weights that are not trained, unsupported precisions, rows that exceed the model's context, evaluations
 * without data, and checkpoints without a folder.
 */
export function startNotices(
  model: TrainableModel,
  parameters: readonly NamedParameter[],
  { settings, validationTokens, savesCheckpoints }: NoticedRun,
): string[] {
  const { precision, sequenceLength, evalEvery, checkpointEvery, out } = settings
  return [
    frozenWeights(model, parameters),
    unsupportedPrecision(parameters[0].parameter.backend, precision),
    exceededContext(model, sequenceLength),
    missingHeldOut(evalEvery, validationTokens),
    savesCheckpoints || out !== undefined ? undefined : missingFolder(checkpointEvery),
  ].flatMap(notice => notice ?? [])
}

function missingHeldOut(evalEvery: number, validationTokens: number): string | undefined {
  if (evalEvery === 0 || validationTokens > 0) return undefined
  return `evalEvery is ${evalEvery}, but nothing is evaluated, because the data has no held-out part: pass validation to the function that creates it, such as textFiles(patterns, { validation: 0.05 })`
}

function missingFolder(checkpointEvery: number): string | undefined {
  if (checkpointEvery === defaults.checkpointEvery) return undefined
  return `checkpointEvery is ${checkpointEvery}, but no checkpoint is saved, because out, the folder of the run, is not given`
}

function exceededContext({ contextLength }: TrainableModel, sequenceLength: number): string | undefined {
  if (contextLength === undefined || sequenceLength <= contextLength) return undefined
  return `sequenceLength ${sequenceLength} exceeds the model's context of ${contextLength} positions, to which generation is limited: create the model with a larger context (max_position_embeddings), or train on shorter rows`
}

function frozenWeights(model: TrainableModel, parameters: readonly NamedParameter[]): string | undefined {
  const quantized = countOf(parameters.filter(({ parameter }) => parameter instanceof QuantizedParameter))
  const all = countOf(parameters)
  const adapters = namedAdapters(model).length
  if (adapters > 0) {
    const trained = parameterCount(model)
    const frozen = all - trained
    const share = quantized > 0 ? `, ${percent(quantized / frozen)} of them quantized` : ''
    return `training the adapters of ${adapters} weights: ${trained} parameters; the ${frozen} of the base model are frozen${share}`
  }
  if (quantized === 0) return undefined
  return `${percent(quantized / all)} of the model's parameters are quantized and stay frozen: only the others are trained (to train all, open the model in f32)`
}

/** Parameters of the model, counting quantized ones as the numbers that they represent. */
const countOf = (parameters: readonly NamedParameter[]) =>
  parameters.reduce((total, { parameter }) => total + weightBytes(parameter).elements, 0)

const percent = (share: number) => `${(100 * share).toFixed(1)} %`

function unsupportedPrecision(backend: Backend, precision: Precision): string | undefined {
  const unsupported =
    precision === 'fp8' && !backend.fp8Matmul
      ? 'does not support fp8'
      : precision === 'bf16' && !backend.bf16Matmul
        ? 'has no bf16 arithmetic that is faster than f32 on this machine'
        : undefined
  if (unsupported === undefined) return undefined
  const used = precision === 'fp8' && backend.bf16Matmul ? 'bf16' : 'f32'
  return `${backend.name} ${unsupported}: matrix products use ${used}`
}
