/** @file Reads config.json and generation_config.json of a checkpoint folder: the model's configuration, the quantization of its weights, and which weights belong to the text model. */
import { type Folder, type Int4Source, openInFolder, readAll, type TensorSource, unpackInt4 } from '@moe/checkpoint'
import { isMoeError, MoeError } from '@moe/core'
import { type DeepSeekConfigInput, ownKeys, parseConfig } from './config.ts'
import { isNested, type Json, stacksExperts, textConfig, textKey } from './model-types.ts'
import { parseQuantization } from './quantization.ts'
import { splitExperts } from './stacked-experts.ts'

const FILE = 'config.json'
const GENERATION_FILE = 'generation_config.json'
const MAX_BYTES = 64 * 2 ** 20

/**
 * Reads and validates the configuration of a folder, without filling in defaults.
 * @throws MoeError E_CHECKPOINT if it cannot be read, E_CONFIG for an invalid configuration
 */
export async function readConfig(folder: Folder): Promise<DeepSeekConfigInput> {
  const json = await readJson(folder, FILE)
  if (json === undefined) throw unreadable(folder, FILE, 'no such file')
  const config = withEndTokens(ownKeys(json), await readJson(folder, GENERATION_FILE))
  parseConfig(config)
  return config as DeepSeekConfigInput
}

/** Adds the end tokens of generation_config.json. A chat model may list the token that ends a turn only there; transformers and vLLM stop at it. */
function withEndTokens(config: Json, { eos_token_id: more }: Json = {}): Json {
  if (more == null) return config
  const ends = [...new Set([config.eos_token_id ?? [], more].flat())]
  return { ...config, eos_token_id: ends.length === 1 ? ends[0] : ends }
}

/** The weights of a folder. */
export interface FolderWeights extends AsyncDisposable {
  readonly checkpoint: TensorSource
  /** Rows and columns of a block with a common scale: `quantization_config.weight_block_size`, default 128 x 128. Null: one scale per matrix. */
  readonly block: readonly [number, number] | null
  /** Reads codes and scales of a weight, if it is stored as 4-bit codes. */
  readonly readInt4?: Int4Source['readInt4']
}

/**
 * Opens the weights of a folder, with one matrix per expert. For a multimodal model, only those of its text model, under the keys of a text model.
 * @throws MoeError E_UNSUPPORTED for quantization that cannot be read
 */
export async function openWeights(folder: Folder): Promise<FolderWeights> {
  const json = (await readJson(folder, FILE)) ?? {}
  const given = textConfig(json).quantization_config ?? json.quantization_config
  const { block, group, renamesScales = false } = parseQuantization(folder.pathOf(FILE), given)
  const opened = await openInFolder(folder)
  try {
    const text = isNested(json) ? withKeys(opened, textKey) : opened
    const split = stacksExperts(json) ? splitExperts(text, block) : text
    const weights = { block, [Symbol.asyncDispose]: () => opened.close() }
    if (renamesScales) return { ...weights, checkpoint: withKeys(split, scaleInvKey) }
    if (group === undefined) return { ...weights, checkpoint: split }
    const checkpoint = unpackInt4(split, group)
    return { ...weights, checkpoint, readInt4: checkpoint.readInt4 }
  } catch (error) {
    await opened.close()
    throw error
  }
}

/** `weight_scale_inv` for the scales that compressed-tensors calls `weight_scale`. Both are factors of the codes. */
const scaleInvKey = (key: string): string => (key.endsWith('.weight_scale') ? `${key}_inv` : key)

/** The tensors for which `rename` returns a key, under these keys. */
function withKeys(checkpoint: TensorSource, rename: (key: string) => string | undefined): TensorSource {
  const all = checkpoint.keys().map(key => [rename(key), key] as const)
  const stored = new Map(all.filter((pair): pair is [string, string] => pair[0] !== undefined))
  const of = (key: string) => stored.get(key) ?? key
  return {
    path: checkpoint.path,
    metadata: checkpoint.metadata,
    keys: () => [...stored.keys()],
    has: key => stored.has(key),
    info: key => checkpoint.info(of(key)),
    read: key => checkpoint.read(of(key)),
    close: () => checkpoint.close(),
    [Symbol.asyncDispose]: () => checkpoint.close(),
  }
}

/** Parses JSON, ignoring the byte order mark that some editors write. */
export const parseJson = (text: string): unknown => JSON.parse(text.replace(/^\uFEFF/, ''))

/** Returns undefined if there is no such file. */
async function readJson(folder: Folder, name: string): Promise<Json | undefined> {
  try {
    const file = await folder.open(name)
    if (file === undefined) return undefined
    const json = parseJson(new TextDecoder().decode(await readAll(file, MAX_BYTES)))
    if (typeof json !== 'object' || json === null) throw new Error('expected a JSON object')
    return json as Json
  } catch (cause) {
    if (isMoeError(cause) && cause.code !== 'E_CHECKPOINT') throw cause
    throw unreadable(folder, name, isMoeError(cause) ? cause.problem : (cause as Error).message, cause)
  }
}

const unreadable = (folder: Folder, name: string, reason: string, cause?: unknown): MoeError =>
  new MoeError({
    code: 'E_CHECKPOINT',
    op: folder.pathOf(name),
    problem: `cannot be read: ${reason}`,
    fix: 'pass a folder with config.json and safetensors files, for example checkpoints/step-…/model of a training run, or its URL',
    ...(cause !== undefined && { cause }),
  })
