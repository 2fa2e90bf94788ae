/** @file The config.json of a checkpoint's folder: the model's configuration, and how its weights are quantized. */
import { DEFAULT_BLOCK, type Folder, readAll } from '@moe/checkpoint'
import { isMoeError, MoeError } from '@moe/core'
import { z } from 'zod'
import { type DeepSeekConfigInput, ownKeys, parseConfig } from './config.ts'

const FILE = 'config.json'
const MAX_BYTES = 64 * 2 ** 20

/**
 * The checked configuration of a folder, as it stands there.
 * @throws MoeError E_CHECKPOINT when it cannot be read, E_CONFIG for faults of the configuration
 */
export async function readConfig(folder: Folder): Promise<DeepSeekConfigInput> {
  const json = await readJson(folder)
  if (json === undefined) throw unreadable(folder, 'there is no such file')
  const config = ownKeys(json)
  parseConfig(config)
  return config as DeepSeekConfigInput
}

const fp8 = z.object({
  quant_method: z.literal('fp8'),
  weight_block_size: z
    .tuple([z.int().positive(), z.int().positive()])
    .nullish()
    .transform(block => block ?? DEFAULT_BLOCK),
})

/**
 * Rows and columns of the blocks that share a scale in an fp8 checkpoint: `quantization_config.weight_block_size`, 128 x 128 where nothing is said.
 * @throws MoeError E_UNSUPPORTED for weights quantized in another way
 */
export async function readScaleBlock(folder: Folder): Promise<readonly [number, number]> {
  const { quantization_config: quantization } = (await readJson(folder)) ?? {}
  if (quantization === undefined || quantization === null) return DEFAULT_BLOCK
  const parsed = fp8.safeParse(quantization)
  if (parsed.success) return parsed.data.weight_block_size
  const { quant_method: method, weight_block_size: block } = quantization as Record<string, unknown>
  throw new MoeError({
    code: 'E_UNSUPPORTED',
    op: folder.pathOf(FILE),
    problem: `the weights are quantized by ${JSON.stringify(method)}, weight_block_size ${JSON.stringify(block)}`,
    fix: 'pass a checkpoint in f32, f16, bf16, or fp8 with two numbers as weight_block_size (where its tensors are such, take quantization_config out of its config.json)',
  })
}

/** JSON, also behind the byte order mark that some editors begin files with. */
export const parseJson = (text: string): unknown => JSON.parse(text.replace(/^\uFEFF/, ''))

/** Undefined where there is no such file. */
async function readJson(folder: Folder): Promise<Record<string, unknown> | undefined> {
  try {
    const file = await folder.open(FILE)
    if (file === undefined) return undefined
    const json = parseJson(new TextDecoder().decode(await readAll(file, MAX_BYTES)))
    if (typeof json !== 'object' || json === null) throw new Error('it holds no object')
    return json as Record<string, unknown>
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
    fix: 'pass a folder with config.json and safetensors files, such as checkpoints/step-…/model of a training run, or its address on the web',
    ...(cause !== undefined && { cause }),
  })
