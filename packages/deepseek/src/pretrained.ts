/** @file Loads and saves models in the Hugging Face layout. */
import { resolve } from 'node:path'
import {
  adapterBase,
  type CheckpointLocation,
  type Folder,
  type FolderLocation,
  type FolderOptions,
  isDiskPath,
  isScaleKey,
  loadAdapters,
  openFolder,
  readF32,
  readFp8,
  saveCheckpointWithText,
  type TensorEntry,
  type TensorSource,
  targetFolder,
} from '@moe/checkpoint'
import {
  deferWeights,
  keep,
  type LoadOptions,
  type LocalParameter,
  loadStateDict,
  MoeError,
  namedAdapters,
  namedParameters,
  QuantizedParameter,
  Random,
  randn,
  type StateSource,
  scope,
  stateDict,
} from '@moe/core'
import {
  configJson,
  type DeepSeekConfig,
  type DeepSeekConfigInput,
  isMoELayer,
  parseConfig,
  sharesIndexer,
} from './config.ts'
import { type FolderWeights, openWeights, readConfig } from './config-file.ts'
import { countParameters } from './count-parameters.ts'
import { modelTypes } from './model-types.ts'
import type { Network } from './network.ts'
import { stackExperts } from './stacked-experts.ts'

/** Keys under which every MTP layer repeats the shared embedding and head. */
const sharedCopies = (model: Network): Array<[copy: string, of: string]> => {
  const { num_hidden_layers: layers, num_nextn_predict_layers: depth, tie_word_embeddings: tied } = model.config
  if (model.config.mtp_separate_embeddings) return []
  const head = tied ? 'model.embed_tokens.weight' : 'lm_head.weight'
  return Array.from({ length: depth }, (_, k) => `model.layers.${layers + k}`).flatMap(prefix => [
    [`${prefix}.embed_tokens.weight`, 'model.embed_tokens.weight'] as [string, string],
    [`${prefix}.shared_head.head.weight`, head] as [string, string],
  ])
}

/** Without shared experts, transformers writes (and requires) empty matrices for them. */
const emptySharedExperts = (model: Network): TensorEntry[] => {
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

/** Throws for a model with adapters, which the file cannot contain. @throws MoeError E_UNSUPPORTED */
export function refuseAdapters(op: string, model: Network): void {
  if (namedAdapters(model).length === 0) return
  throw new MoeError({
    code: 'E_UNSUPPORTED',
    op,
    problem: 'the model has adapters, which this file format does not contain',
    fix: 'merge them first: await mergeAdapters(model), or save only the adapters: await saveAdapters(folder, model) of @moe/checkpoint',
  })
}

/** Internal: see `DeepSeek.save`. */
export async function savePretrained(model: Network, location: FolderLocation): Promise<void> {
  targetFolder('save', location)
  refuseAdapters('save', model)
  const entries: TensorEntry[] = stateDict(model).map(({ name, dtype, shape, data }) => ({ name, dtype, shape, data }))
  const byName = new Map(entries.map(entry => [entry.name, entry]))
  for (const [copy, of] of sharedCopies(model)) entries.push({ ...(byName.get(of) as TensorEntry), name: copy })
  entries.push(...emptySharedExperts(model))
  const written = modelTypes[model.config.model_type].stacksExperts ? stackExperts(entries) : entries
  const config = { name: 'config.json', text: configJson(model.config) }
  await saveCheckpointWithText(location, written, { metadata: { format: 'pt' } }, config)
}

/** Internal: see `DeepSeek.fromPretrained`. */
export async function loadPretrained<Model extends Network>(
  location: CheckpointLocation,
  options: FolderOptions,
  make: (config: DeepSeekConfigInput) => Model,
  partOf?: (model: Model) => readonly LocalParameter[],
): Promise<Model> {
  const folder = openFolder('fromPretrained', location, options)
  if (!isDiskPath('fromPretrained', location)) return openModel(folder, make, partOf)
  const base = await adapterBase(location)
  if (base !== undefined && partOf !== undefined) {
    throw new MoeError({
      code: 'E_UNSUPPORTED',
      op: 'fromPretrained',
      problem: `${folder.path} contains adapters, which can only be added to a whole model`,
      fix: 'open it without the option parameters, merge the adapters (await mergeAdapters(model)), and save the model',
    })
  }
  const model = await openModel(base === undefined ? folder : openFolder('fromPretrained', base, options), make, partOf)
  model.source = resolve(base ?? folder.path)
  if (base === undefined) return model
  try {
    await loadAdapters(model, location)
  } catch (error) {
    model.dispose()
    throw error
  }
  return model
}

async function openModel<Model extends Network>(
  folder: Folder,
  make: (config: DeepSeekConfigInput) => Model,
  partOf?: (model: Model) => readonly LocalParameter[],
): Promise<Model> {
  const config = await readConfig(folder)
  await using weights = await openWeights(folder)
  const own = parseConfig(config)
  checkSize(folder.path, own, weights.checkpoint)
  const model = partOf === undefined ? make(config) : deferWeights(() => make(config))
  try {
    const parameters = partOf?.(model)
    const newIndexers = model.config.index_topk !== null && own.index_topk === null
    await fillWeights(model, weights, { newIndexers, parameters })
    // Weights that are not loaded are not those of a new model either.
    if (parameters !== undefined) for (const { parameter } of namedParameters(model)) parameter.elsewhere = null
  } catch (error) {
    model.dispose()
    throw error
  }
  return model
}

/** Checks, before memory is allocated, that the checkpoint is large enough for the model. Missing weights are reported in detail when it is read. @throws MoeError E_STATE_DICT */
export function checkSize(folder: string, config: DeepSeekConfig, checkpoint: TensorSource): void {
  const { total, mtp } = countParameters(config)
  const elements = checkpoint
    .keys()
    .filter(key => !isScaleKey(checkpoint, key))
    .reduce((sum, key) => sum + checkpoint.info(key).shape.reduce((product, size) => product * size, 1), 0)
  if (total + mtp <= 2 * elements) return
  throw new MoeError({
    code: 'E_STATE_DICT',
    op: folder,
    problem: `config.json describes a model of ${total + mtp} parameters, but the checkpoint has only ${elements}`,
    fix: 'use the config.json and weights of the same model, and check that no shard is missing',
  })
}

/**
 * Loads the weights of an open checkpoint. With `newIndexers`, the checkpoint has no indexers, and those of the model get random weights.
 * @throws MoeError E_STATE_DICT if keys or shapes do not match; the model then stays unchanged
 */
export async function fillWeights(
  model: Network,
  { checkpoint, block, readInt4 }: FolderWeights,
  { newIndexers = false, parameters }: { newIndexers?: boolean } & Pick<LoadOptions, 'parameters'> = {},
): Promise<void> {
  const source: StateSource = {
    keys: () => checkpoint.keys().filter(key => !isScaleKey(checkpoint, key)),
    info: key => ({ dtype: 'f32', shape: checkpoint.info(key).shape }),
    read: async key => (await readF32(checkpoint, key, { block })).data,
    readQuantized: async (key, like) => {
      const [rows, columns] = like.block
      if (like.format !== 'int4') return readFp8(checkpoint, key, like, { block })
      if (rows !== 1) return undefined
      const weight = await readInt4?.(key)
      return weight && weight.scale.length * columns === weight.shape[0] * weight.shape[1] ? weight : undefined
    },
  }
  const copies = new Set([
    ...sharedCopies(model).map(([copy]) => copy),
    ...emptySharedExperts(model).map(({ name }) => name),
  ])
  const { num_hidden_layers: layers, num_nextn_predict_layers: depth } = model.config
  const beyond = (key: string) => layerOf(key) >= layers + depth
  const unused = (key: string) => isOfIndexer(key) && sharesIndexer(model.config, layerOf(key))
  const tied = (key: string) => model.config.tie_word_embeddings && key === 'lm_head.weight'
  await loadStateDict(model, source, {
    ignore: key =>
      copies.has(key) ||
      beyond(key) ||
      unused(key) ||
      tied(key) ||
      key.endsWith('rotary_emb.inv_freq') ||
      isOfActivations(key),
    optional: key => newIndexers && isOfIndexer(key),
    parameters,
  })
  if (newIndexers) drawIndexers(model)
}

/** Whether a tensor is the scale of rounded activations. Here, activations are not rounded to fp8. */
const isOfActivations = (key: string) => /([._]activation|\.input)_scale$/.test(key)

/** The layer that a weight belongs to; -1 for others. */
const layerOf = (key: string): number => Number(/^model\.layers\.(\d+)\./.exec(key)?.[1] ?? -1)

const isOfIndexer = (key: string) => key.includes('.self_attn.indexer.')

/** Draws the matrices of all indexers, as the constructor would with seed 0. */
function drawIndexers(model: Network): void {
  const { backend } = model
  const std = model.config.initializer_range
  for (const { name, parameter } of namedParameters(model)) {
    if (!isOfIndexer(name) || parameter.rank !== 2) continue
    if (parameter instanceof QuantizedParameter) {
      throw new MoeError({
        code: 'E_UNSUPPORTED',
        op: 'fromPretrained',
        problem: 'new indexers must be trained, but quantized weights cannot be',
        fix: 'open the model without the option weights, and train it',
      })
    }
    parameter.assign(keep(scope(() => randn(parameter.shape, new Random(0).fork(name), { std, backend }))))
  }
}
