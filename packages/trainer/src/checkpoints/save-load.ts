/** @file What a checkpoint holds: the model in the Hugging Face layout, or what stands beside it, the optimizer's state, the trainer's state. */
import { existsSync } from 'node:fs'
import { mkdir, open, readFile } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import {
  loadAdapters,
  openCheckpoint,
  readSafetensors,
  saveAdapters,
  saveCheckpoint,
  stateSource,
  type TensorSource,
  writeSafetensors,
} from '@moe/checkpoint'
import { isMoeError, loadStateDict, MoeError, namedAdapters, type StateEntry, stateDict } from '@moe/core'
import type { ConversationTemplate } from '../data/conversations.ts'
import { type DocumentTokens, documentTokens } from '../data/token-dataset.ts'
import type { TextTokenizer, TrainableModel } from '../model.ts'
import type { Optimizer } from '../optim/optimizer.ts'
import { otherCheckpoints, publishCheckpoint, reasonOf, STATE_FILE } from './checkpoint-folder.ts'
import {
  checkSameRun,
  decodeTrainerState,
  encodeTrainerState,
  type RunRecord,
  type TrainerState,
} from './trainer-state.ts'

const MODEL_FOLDER = 'model'
const ADAPTER_FILE = 'adapter_model.safetensors'
const OPTIMIZER_FILE = 'optimizer.safetensors'

/** What checkpoints have to do with of an optimizer. */
export interface StoredOptimizer extends Pick<Optimizer, 'name' | 'load'> {
  entries(): StateEntry[]
}

export interface CheckpointParts {
  readonly model: TrainableModel
  readonly optimizer: StoredOptimizer
  readonly tokenizer?: TextTokenizer
  readonly template?: ConversationTemplate | undefined
  /** Ids of the tokens around documents, as far as they were given. */
  readonly around?: DocumentTokens
}

/** Saves a checkpoint of the run in `out` and returns its path. See `publishCheckpoint` for what a failure leaves. */
export async function saveTraining(
  out: string,
  parts: CheckpointParts,
  state: TrainerState,
  keep: number,
): Promise<string> {
  const { model, optimizer, tokenizer, template, around = {} } = parts
  return publishCheckpoint(out, state.step, keep, async temporary => {
    const modelFolder = join(temporary, MODEL_FOLDER)
    await mkdir(modelFolder)
    if (isAdapted(model)) await saveAdapters(modelFolder, model, { base: model.source })
    else if (model.save === undefined) await saveCheckpoint(modelFolder, stateDict(model))
    else await model.save(modelFolder)
    const tokenizerFile = tokenizer?.toJSON?.()
    const config = template?.toJSON?.() ?? (tokenizer && tokenizerFile && tokenizerConfig(tokenizer, around))
    const beside = { 'tokenizer.json': tokenizerFile, 'tokenizer_config.json': config }
    for (const [name, content] of Object.entries(beside)) {
      if (content !== undefined) await writeFlushed(join(modelFolder, name), `${JSON.stringify(content, null, 2)}\n`)
    }
    await writeSafetensors(join(temporary, OPTIMIZER_FILE), optimizer.entries(), {
      metadata: { optimizer: optimizer.name },
    })
    // Last, because its presence makes the checkpoint complete.
    await writeFlushed(join(temporary, STATE_FILE), encodeTrainerState(state))
  })
}

/** What transformers wants to know besides `tokenizer.json`. */
function tokenizerConfig(tokenizer: TextTokenizer, around: DocumentTokens): Record<string, string | undefined> {
  const { bos, eos } = documentTokens(tokenizer, around)
  const named = (id: number | null) => (id === null ? undefined : tokenizer.idToToken?.(id))
  return { tokenizer_class: 'PreTrainedTokenizerFast', bos_token: named(bos), eos_token: named(eos) }
}

async function writeFlushed(path: string, text: string): Promise<void> {
  const file = await open(path, 'wx')
  try {
    await file.writeFile(text)
    await file.sync()
  } finally {
    await file.close()
  }
}

const isAdapted = (model: TrainableModel): boolean => namedAdapters(model).length > 0

/** A checkpoint whose files are there and whole: headers account for every byte. */
interface OpenedTraining {
  readonly state: TrainerState
  /** Or the adapters alone. */
  readonly model: TensorSource
  /** Folder of adapters, where these are all there is. */
  readonly adapters: string | null
  readonly optimizer: TensorSource
  close(): Promise<void>
}

async function openTraining(path: string): Promise<OpenedTraining> {
  const statePath = join(path, STATE_FILE)
  const text = await readFile(statePath, 'utf8').catch(cause => {
    throw new MoeError({
      code: 'E_CHECKPOINT',
      op: path,
      problem: `it is no checkpoint of a training run: ${basename(statePath)} cannot be read (${(cause as Error).message})`,
      fix: 'pass a step-… folder below the checkpoints folder of a run',
      cause,
    })
  })
  const state = decodeTrainerState(statePath, text)
  const folder = join(path, MODEL_FOLDER)
  const adapterFile = join(folder, ADAPTER_FILE)
  const adapters = existsSync(adapterFile) ? folder : null
  const model = adapters === null ? await openCheckpoint(folder) : await readSafetensors(adapterFile)
  try {
    const optimizer = await readSafetensors(join(path, OPTIMIZER_FILE))
    const close = async () => {
      await model.close()
      await optimizer.close()
    }
    return { state, model, adapters, optimizer, close }
  } catch (error) {
    await model.close()
    throw error
  }
}

/** The same error, and which other checkpoint of the run is whole. */
async function damaged(path: string, cause: unknown): Promise<unknown> {
  for (const other of otherCheckpoints(path)) {
    const opened = await openTraining(other).catch(() => undefined)
    if (opened === undefined) continue
    await opened.close()
    return new MoeError({
      code: 'E_CHECKPOINT',
      op: path,
      problem: `it cannot be resumed from: ${reasonOf(cause)}`,
      fix: `${other} is whole, pass it as resume`,
      details: { whole: other },
      cause,
    })
  }
  return cause
}

/**
 * Fills model and optimizer from a checkpoint. Everything is opened and compared first: on an error nothing was
 * changed.
 * @param run that goes on; null takes the checkpoint whatever its settings were
 * @throws MoeError E_CHECKPOINT for a damaged or foreign checkpoint (naming a whole one of the same run, if there is one) or other settings, E_STATE_DICT
 *   for another model
 */
export async function loadTraining(path: string, parts: CheckpointParts, run: RunRecord | null): Promise<TrainerState> {
  const stored = await openTraining(path).catch(async cause => {
    throw await damaged(path, cause)
  })
  try {
    if (run !== null) checkSameRun(path, stored.state.run, run)
    await fill(stored, parts)
    return stored.state
  } catch (error) {
    if (isMoeError(error)) throw error
    throw new MoeError({
      code: 'E_CHECKPOINT',
      op: path,
      problem: error instanceof Error ? error.message : String(error),
      fix: 'resume from another checkpoint of the run',
      cause: error,
    })
  } finally {
    await stored.close()
  }
}

async function fill(stored: OpenedTraining, { model, optimizer }: CheckpointParts): Promise<void> {
  const { optimizer: moments, state } = stored
  const name = moments.metadata['optimizer']
  if (name !== optimizer.name) {
    throw new MoeError({
      code: 'E_CHECKPOINT',
      op: moments.path,
      problem: `it is the state of ${name ?? 'an unnamed optimizer'}, not of ${optimizer.name}`,
      fix: `resume with the optimizer that the run was started with, or begin another run with the model in ${join(dirname(moments.path), MODEL_FOLDER)}; nothing was changed`,
    })
  }
  // Both compare all names and shapes before they change anything; the model comes last, because a failed run throws its
  // optimizer away.
  await optimizer.load(stateSource(moments), state.step)
  // A model's own `save` may store more than its parameters: copies of shared ones under the keys that other
  // programs look for.
  if (stored.adapters !== null) await loadAdapters(model, stored.adapters)
  else await loadStateDict(model, stateSource(stored.model), { ignore: () => true })
}
