/**
 * @file Saves and loads checkpoints: the model in the Hugging Face layout (or its adapters), the optimizer state, and
 *   the trainer state.
 */
import {
  type Folder,
  type FolderLocation,
  loadAdapters,
  openFolder,
  openInFolder,
  readAll,
  readFrom,
  saveAdapters,
  saveCheckpoint,
  stateSource,
  subfolder,
  type TensorSource,
  targetFolder,
  writeInFolder,
  writeText,
} from '@moe/checkpoint'
import {
  isMoeError,
  type LocalParameter,
  loadStateDict,
  MoeError,
  namedAdapters,
  type StateEntry,
  stateDict,
} from '@moe/core'
import type { ConversationTemplate } from '../data/conversations.ts'
import { type DocumentTokens, documentTokens } from '../data/token-dataset.ts'
import type { TextTokenizer, TrainableModel } from '../model.ts'
import type { ModelEma } from '../model-ema.ts'
import type { Optimizer } from '../optim/optimizer.ts'
import { reasonOf, STATE_FILE } from './checkpoint-folder.ts'
import type { RunFolder, StoredCheckpoint } from './run-folder.ts'
import {
  checkSameRun,
  decodeTrainerState,
  encodeTrainerState,
  type RunRecord,
  type TrainerState,
} from './trainer-state.ts'
import type { WeightsOnRanks } from './weights-on-ranks.ts'

/** Folder of the model in a checkpoint. */
export const MODEL_FOLDER = 'model'
/** Folder of the averaged weights in a checkpoint, if the run has `ema`. */
export const EMA_FOLDER = 'ema'
const ADAPTER_FILE = 'adapter_model.safetensors'
const OPTIMIZER_FILE = 'optimizer.safetensors'

/** The part of an optimizer that checkpoints use. */
export interface StoredOptimizer extends Pick<Optimizer, 'name' | 'load'> {
  entries(): StateEntry[]
}

export interface CheckpointParts {
  readonly model: TrainableModel
  /** The parameters whose weights this rank holds, if ranks have parts of the model. */
  readonly weights?: readonly LocalParameter[] | undefined
  /** Makes the complete model readable, if ranks have parts of it. */
  readonly whole?: Pick<WeightsOnRanks, 'read'> | undefined
  readonly optimizer: StoredOptimizer
  readonly ema?: Pick<ModelEma, 'withAverages' | 'restore'> | undefined
  readonly tokenizer?: TextTokenizer
  readonly template?: ConversationTemplate | undefined
  /** Ids of the begin and end tokens, if they were given as options. */
  readonly documentIds?: DocumentTokens
}

/** Saves a checkpoint of a run. @throws as `RunFolder.publish` */
export async function saveTraining(
  folder: RunFolder,
  parts: CheckpointParts,
  state: TrainerState,
  keep: number,
): Promise<StoredCheckpoint> {
  const { optimizer, ema } = parts
  return folder.publish(state.step, keep, async location => {
    await saveModel(await subfolder('train', location, MODEL_FOLDER, { create: true }), parts)
    await ema?.withAverages(async () =>
      saveModel(await subfolder('train', location, EMA_FOLDER, { create: true }), parts),
    )
    const target = targetFolder('train', location)
    await writeInFolder(target, OPTIMIZER_FILE, optimizer.entries(), { metadata: { optimizer: optimizer.name } })
    // Last, because its presence makes the checkpoint complete.
    await writeText(target, STATE_FILE, encodeTrainerState(state))
  })
}

/** Saves the model with its current weights, and the tokenizer. */
async function saveModel(location: FolderLocation, parts: CheckpointParts): Promise<void> {
  const { model, whole, tokenizer, template, documentIds = {} } = parts
  if (isAdapted(model)) await saveAdapters(location as string, model, { base: model.source })
  else {
    const save = async () => {
      if (model.save === undefined) await saveCheckpoint(location, stateDict(model))
      else await model.save(location)
    }
    await (whole ? whole.read(save) : save())
  }
  const tokenizerFile = tokenizer?.toJSON?.()
  const config = template?.toJSON?.() ?? (tokenizer && tokenizerFile && tokenizerConfig(tokenizer, documentIds))
  const files = { 'tokenizer.json': tokenizerFile, 'tokenizer_config.json': config }
  for (const [name, content] of Object.entries(files)) {
    if (content === undefined) continue
    await writeText(targetFolder('train', location), name, `${JSON.stringify(content, null, 2)}\n`)
  }
}

/** The settings that transformers needs besides `tokenizer.json`. */
function tokenizerConfig(tokenizer: TextTokenizer, ids: DocumentTokens): Record<string, string | undefined> {
  const { bos, eos } = documentTokens(tokenizer, ids)
  const named = (id: number | null) => (id === null ? undefined : tokenizer.idToToken?.(id))
  return { tokenizer_class: 'PreTrainedTokenizerFast', bos_token: named(bos), eos_token: named(eos) }
}

const isAdapted = (model: TrainableModel): boolean => namedAdapters(model).length > 0

interface OpenedModel {
  /** The model's tensors, or only its adapters. */
  readonly tensors: TensorSource
  /** Folder of the adapters, if it contains only adapters. */
  readonly adapters: FolderLocation | null
  /** Its folder, for error messages. */
  readonly path: string
}

/** An open checkpoint. Its files are complete: their headers account for every byte. */
interface OpenedTraining {
  readonly state: TrainerState
  readonly model: OpenedModel
  /** The averaged weights, if they were saved. */
  readonly ema: OpenedModel | null
  readonly optimizer: TensorSource
  close(): Promise<void>
}

const MAX_STATE_BYTES = 2 ** 26

async function openTraining({ path, location }: StoredCheckpoint): Promise<OpenedTraining> {
  const folder = openFolder('train', location)
  const stateFile = await folder.open(STATE_FILE)
  if (stateFile === undefined) {
    throw new MoeError({
      code: 'E_CHECKPOINT',
      op: path,
      problem: `not a checkpoint of a training run: there is no ${STATE_FILE}`,
      fix: 'pass a step-… folder in the checkpoints folder of a run',
    })
  }
  const text = new TextDecoder().decode(await readAll(stateFile, MAX_STATE_BYTES))
  const state = decodeTrainerState(stateFile.path, text)
  const opened: TensorSource[] = []
  const close = async () => {
    for (const source of opened) await source.close()
  }
  const model = async (name: string) => {
    const found = await openModel(await subfolder('train', location, name))
    opened.push(found.tensors)
    return found
  }
  try {
    const own = await model(MODEL_FOLDER)
    const ema = state.averagedSteps === undefined ? null : await model(EMA_FOLDER)
    const optimizer = await openTensors(folder, OPTIMIZER_FILE)
    opened.push(optimizer)
    return { state, model: own, ema, optimizer, close }
  } catch (error) {
    await close()
    throw error
  }
}

async function openModel(location: FolderLocation): Promise<OpenedModel> {
  const folder = openFolder('train', location)
  const adapterFile = await folder.open(ADAPTER_FILE)
  const tensors = adapterFile === undefined ? await openInFolder(folder) : await readFrom(adapterFile)
  return { tensors, adapters: adapterFile === undefined ? null : location, path: folder.path }
}

async function openTensors(folder: Folder, name: string): Promise<TensorSource> {
  const file = await folder.open(name)
  if (file !== undefined) return readFrom(file)
  throw new MoeError({ code: 'E_CHECKPOINT', op: folder.pathOf(name), problem: 'opening failed: no such file' })
}

/** The error for a corrupt checkpoint, which names an intact one of the same run if there is one. */
async function corrupt(folder: RunFolder, checkpoint: StoredCheckpoint, cause: unknown): Promise<unknown> {
  for (const other of await folder.others(checkpoint)) {
    const opened = await openTraining(other).catch(() => undefined)
    if (opened === undefined) continue
    await opened.close()
    return new MoeError({
      code: 'E_CHECKPOINT',
      op: checkpoint.path,
      problem: `cannot resume from it: ${reasonOf(cause)}`,
      fix: `${other.path} is intact; pass it as resume`,
      details: { whole: other.path },
      cause,
    })
  }
  return cause
}

/**
 * Loads model and optimizer state from a checkpoint. Everything is opened and compared first, so that an error leaves
 * all unchanged.
 *
 * @param run the run to resume; null to accept a checkpoint with any settings
 * @throws MoeError E_CHECKPOINT for a corrupt checkpoint (naming an intact one of the same run, if there is one), one
 *   of another trainer, or one with other settings
 * @throws MoeError E_STATE_DICT for another model
 */
export async function loadTraining(
  folder: RunFolder,
  checkpoint: StoredCheckpoint,
  parts: CheckpointParts,
  run: RunRecord | null,
): Promise<TrainerState> {
  const { path } = checkpoint
  const stored = await openTraining(checkpoint).catch(async cause => {
    throw await corrupt(folder, checkpoint, cause)
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

async function fill(stored: OpenedTraining, { model, weights, optimizer, ema }: CheckpointParts): Promise<void> {
  const { optimizer: moments, state } = stored
  const name = moments.metadata['optimizer']
  if (name !== optimizer.name) {
    throw new MoeError({
      code: 'E_CHECKPOINT',
      op: moments.path,
      problem: `the checkpoint contains the state of ${name ?? 'an unnamed optimizer'}, not of ${optimizer.name}`,
      fix: `resume with the optimizer of the run, or start a new run with the model in ${stored.model.path}; nothing was changed`,
    })
  }
  // Each `load` compares all names and shapes before it changes anything. The model comes last: if it fails, the run
  // ends and its optimizer is discarded.
  await optimizer.load(stateSource(moments), state.step)
  if (ema !== undefined && stored.ema !== null) {
    await fillModel(model, stored.ema, weights)
    await ema.restore(state.averagedSteps ?? 0)
  }
  await fillModel(model, stored.model, weights)
}

async function fillModel(
  model: TrainableModel,
  { tensors, adapters }: OpenedModel,
  parameters: CheckpointParts['weights'],
): Promise<void> {
  // A model's own `save` may store more than its parameters, such as copies of shared ones under the keys that other
  // programs expect.
  if (adapters !== null) await loadAdapters(model, adapters as string)
  else await loadStateDict(model, stateSource(tensors), { ignore: () => true, parameters })
}
