/** @file Reads config.json of a checkpoint folder: the model's configuration, the quantization of its weights, and which weights belong to the text model. */
import { DEFAULT_BLOCK, type Folder, openInFolder, readAll, type TensorSource } from '@moe/checkpoint'
import { isMoeError, MoeError, shown } from '@moe/core'
import { z } from 'zod'
import { type DeepSeekConfigInput, ownKeys, parseConfig } from './config.ts'
import { isNested, type Json, stacksExperts, textConfig, textKey } from './model-types.ts'
import { splitExperts } from './stacked-experts.ts'

const FILE = 'config.json'
const MAX_BYTES = 64 * 2 ** 20

/**
 * Reads and validates the configuration of a folder, without filling in defaults.
 * @throws MoeError E_CHECKPOINT if it cannot be read, E_CONFIG for an invalid configuration
 */
export async function readConfig(folder: Folder): Promise<DeepSeekConfigInput> {
  const json = await readJson(folder)
  if (json === undefined) throw unreadable(folder, 'no such file')
  const config = ownKeys(json)
  parseConfig(config)
  return config as DeepSeekConfigInput
}

const fp8 = z.object({
  quant_method: z.literal('fp8'),
  weight_block_size: z
    .tuple([z.int().positive(), z.int().positive()])
    .nullable()
    .default([...DEFAULT_BLOCK]),
})

/** The weights of a folder. */
export interface FolderWeights extends AsyncDisposable {
  readonly checkpoint: TensorSource
  /** Rows and columns of a block with a common scale: `quantization_config.weight_block_size`, default 128 x 128. Null: one scale per matrix. */
  readonly block: readonly [number, number] | null
}

/**
 * Opens the weights of a folder, with one matrix per expert. For a multimodal model, only those of its text model, under the keys of a text model.
 * @throws MoeError E_UNSUPPORTED for quantization other than fp8 blocks
 */
export async function openWeights(folder: Folder): Promise<FolderWeights> {
  const json = (await readJson(folder)) ?? {}
  const block = scaleBlock(folder, json)
  const opened = await openInFolder(folder)
  try {
    const text = isNested(json) ? textWeights(opened) : opened
    const checkpoint = stacksExperts(json) ? splitExperts(text, block) : text
    return { checkpoint, block, [Symbol.asyncDispose]: () => opened.close() }
  } catch (error) {
    await opened.close()
    throw error
  }
}

function scaleBlock(folder: Folder, json: Json): readonly [number, number] | null {
  const quantization = textConfig(json).quantization_config ?? json.quantization_config
  if (quantization === undefined || quantization === null) return DEFAULT_BLOCK
  const parsed = fp8.safeParse(quantization)
  if (parsed.success) return parsed.data.weight_block_size
  const { quant_method: method, weight_block_size: block } = quantization as Record<string, unknown>
  throw new MoeError({
    code: 'E_UNSUPPORTED',
    op: folder.pathOf(FILE),
    problem: `unsupported quantization: quant_method ${shown(method)}, weight_block_size ${shown(block)}`,
    fix: 'use a checkpoint in f32, f16, bf16, or fp8 with a weight_block_size of two numbers or null (if its tensors are in one of these formats, remove quantization_config from its config.json)',
  })
}

function textWeights(checkpoint: TensorSource): TensorSource {
  const all = checkpoint.keys().map(key => [textKey(key), key] as const)
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
async function readJson(folder: Folder): Promise<Json | undefined> {
  try {
    const file = await folder.open(FILE)
    if (file === undefined) return undefined
    const json = parseJson(new TextDecoder().decode(await readAll(file, MAX_BYTES)))
    if (typeof json !== 'object' || json === null) throw new Error('expected a JSON object')
    return json as Json
  } catch (cause) {
    if (isMoeError(cause) && cause.code !== 'E_CHECKPOINT') throw cause
    throw unreadable(folder, isMoeError(cause) ? cause.problem : (cause as Error).message, cause)
  }
}

const unreadable = (folder: Folder, reason: string, cause?: unknown): MoeError =>
  new MoeError({
    code: 'E_CHECKPOINT',
    op: folder.pathOf(FILE),
    problem: `cannot be read: ${reason}`,
    fix: 'pass a folder with config.json and safetensors files, for example checkpoints/step-…/model of a training run, or its URL',
    ...(cause !== undefined && { cause }),
  })
