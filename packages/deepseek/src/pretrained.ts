/** @file Checkpoints in the Hugging Face layout. */
import { resolve } from 'node:path'
import {
  adapterBase,
  type CheckpointPlace,
  type Folder,
  type FolderOptions,
  type FolderPlace,
  folderOptionNames,
  isScaleKey,
  loadAdapters,
  onDisk,
  openFolder,
  readF32,
  saveCheckpoint,
  type TensorEntry,
  type TensorSource,
  targetFolder,
  writeText,
} from '@moe/checkpoint'
import { checkOptions, loadStateDict, MoeError, namedAdapters, type StateSource, stateDict } from '@moe/core'
import { configJson, type DeepSeekConfig, type DeepSeekConfigInput, isMoELayer, parseConfig } from './config.ts'
import { type FolderWeights, openWeights, readConfig } from './config-file.ts'
import { countParameters } from './count-parameters.ts'
import type { DeepSeek } from './model.ts'

/** Keys that repeat the shared embedding and head inside every MTP layer. */
const sharedCopies = (model: DeepSeek): Array<[copy: string, of: string]> => {
  const { num_hidden_layers: layers, num_nextn_predict_layers: depth, tie_word_embeddings: tied } = model.config
  if (model.config.mtp_separate_embeddings) return []
  const head = tied ? 'model.embed_tokens.weight' : 'lm_head.weight'
  return Array.from({ length: depth }, (_, k) => `model.layers.${layers + k}`).flatMap(prefix => [
    [`${prefix}.embed_tokens.weight`, 'model.embed_tokens.weight'] as [string, string],
    [`${prefix}.shared_head.head.weight`, head] as [string, string],
  ])
}

/** Without shared experts transformers keeps (and asks for) empty matrices in their place. */
const emptySharedExperts = (model: DeepSeek): TensorEntry[] => {
  const { n_shared_experts: shared, hidden_size: hidden, num_hidden_layers, num_nextn_predict_layers } = model.config
  if (shared > 0) return []
  const entry = (name: string, shape: number[]): TensorEntry => ({
    name,
    shape,
    dtype: 'f32',
    data: new Float32Array(0),
  })
  return Array.from({ length: num_hidden_layers + num_nextn_predict_layers }, (_, layer) => layer)
    .filter(layer => isMoELayer(model.config, layer))
    .map(layer => `model.layers.${layer}.mlp.shared_experts`)
    .flatMap(prefix => [
      entry(`${prefix}.gate_proj.weight`, [0, hidden]),
      entry(`${prefix}.up_proj.weight`, [0, hidden]),
      entry(`${prefix}.down_proj.weight`, [hidden, 0]),
    ])
}

/** What a file would not have room for. @throws MoeError E_UNSUPPORTED */
export function refuseAdapters(op: string, model: DeepSeek): void {
  if (namedAdapters(model).length === 0) return
  throw new MoeError({
    code: 'E_UNSUPPORTED',
    op,
    problem: 'the model has adapters, which the file would not hold',
    fix: 'fold them in first: await mergeAdapters(model). Or save them alone: await saveAdapters(folder, model) of @moe/checkpoint',
  })
}

/** Internal: see `DeepSeek.save`. */
export async function savePretrained(model: DeepSeek, place: FolderPlace): Promise<void> {
  const folder = targetFolder('save', place)
  refuseAdapters('save', model)
  const entries: TensorEntry[] = stateDict(model).map(({ name, dtype, shape, data }) => ({ name, dtype, shape, data }))
  const byName = new Map(entries.map(entry => [entry.name, entry]))
  for (const [copy, of] of sharedCopies(model)) entries.push({ ...(byName.get(of) as TensorEntry), name: copy })
  entries.push(...emptySharedExperts(model))
  await saveCheckpoint(place, entries, { metadata: { format: 'pt' } })
  await writeText(folder, 'config.json', configJson(model.config))
}

/** Internal: see `DeepSeek.fromPretrained`. */
export async function loadPretrained(
  place: CheckpointPlace,
  options: FolderOptions,
  make: (config: DeepSeekConfigInput) => DeepSeek,
): Promise<DeepSeek> {
  const folder = openFolder('fromPretrained', place, options)
  if (!onDisk('fromPretrained', place)) return openModel(folder, make)
  const base = await adapterBase(place)
  const model = await openModel(base === undefined ? folder : openFolder('fromPretrained', base, options), make)
  model.source = resolve(base ?? folder.path)
  if (base === undefined) return model
  try {
    await loadAdapters(model, place)
  } catch (error) {
    model.dispose()
    throw error
  }
  return model
}

async function openModel(folder: Folder, make: (config: DeepSeekConfigInput) => DeepSeek): Promise<DeepSeek> {
  const config = await readConfig(folder)
  await using weights = await openWeights(folder)
  checkSize(folder.path, parseConfig(config), weights.checkpoint)
  const model = make(config)
  try {
    await fill(model, weights)
  } catch (error) {
    model.dispose()
    throw error
  }
  return model
}

/**
 * Fills a model from a checkpoint folder, on the disk or by its address. bf16 and f16 weights become f32, and fp8 ones, whose blocks are as its config.json says.
 * @throws MoeError E_STATE_DICT when keys or shapes do not fit; the model is then unchanged.
 */
export async function loadWeights(model: DeepSeek, place: CheckpointPlace, options: FolderOptions = {}): Promise<void> {
  checkOptions('loadWeights', options, folderOptionNames)
  await using weights = await openWeights(openFolder('loadWeights', place, options))
  await fill(model, weights)
}

/** Before memory is taken for a model: that the checkpoint can fill a good part of it. What exactly is missing is told once the model is there. */
function checkSize(folder: string, config: DeepSeekConfig, checkpoint: TensorSource): void {
  const { total, mtp } = countParameters(config)
  const elements = checkpoint
    .keys()
    .filter(key => !isScaleKey(checkpoint, key))
    .reduce((sum, key) => sum + checkpoint.info(key).shape.reduce((product, size) => product * size, 1), 0)
  if (total + mtp <= 2 * elements) return
  throw new MoeError({
    code: 'E_STATE_DICT',
    op: folder,
    problem: `config.json describes a model of ${total + mtp} parameters, its tensors have ${elements} elements`,
    fix: 'the two are not of one model, or tensors are missing',
  })
}

async function fill(model: DeepSeek, { checkpoint, block }: FolderWeights): Promise<void> {
  const source: StateSource = {
    keys: () => checkpoint.keys().filter(key => !isScaleKey(checkpoint, key)),
    info: key => ({ dtype: 'f32', shape: checkpoint.info(key).shape }),
    read: async key => (await readF32(checkpoint, key, { block })).data,
  }
  const copies = new Set([
    ...sharedCopies(model).map(([copy]) => copy),
    ...emptySharedExperts(model).map(({ name }) => name),
  ])
  const { num_hidden_layers: layers, num_nextn_predict_layers: depth } = model.config
  const beyond = (key: string) => Number(/^model\.layers\.(\d+)\./.exec(key)?.[1] ?? -1) >= layers + depth
  const tied = (key: string) => model.config.tie_word_embeddings && key === 'lm_head.weight'
  await loadStateDict(model, source, {
    ignore: key => copies.has(key) || beyond(key) || tied(key) || key.endsWith('rotary_emb.inv_freq'),
  })
}
