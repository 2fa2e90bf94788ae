/** @file The config.json of a checkpoint's folder: the model's configuration, and how its weights are quantized. */
import { readFile, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { DEFAULT_BLOCK } from '@moe/checkpoint'
import { MoeError } from '@moe/core'
import { z } from 'zod'
import { type DeepSeekConfigInput, ownKeys, parseConfig } from './config.ts'

const FILE = 'config.json'

/**
 * The checked configuration of a folder, as it stands there.
 * @throws MoeError E_CHECKPOINT when it cannot be read, E_CONFIG for faults of the configuration
 */
export async function readConfig(folder: string): Promise<DeepSeekConfigInput> {
  const config = ownKeys(await readJson(folder))
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
export async function readScaleBlock(folder: string): Promise<readonly [number, number]> {
  const exists = await stat(join(folder, FILE)).then(
    () => true,
    () => false,
  )
  const { quantization_config: quantization } = exists ? await readJson(folder) : {}
  if (quantization === undefined || quantization === null) return DEFAULT_BLOCK
  const parsed = fp8.safeParse(quantization)
  if (parsed.success) return parsed.data.weight_block_size
  const { quant_method: method, weight_block_size: block } = quantization as Record<string, unknown>
  throw new MoeError({
    code: 'E_UNSUPPORTED',
    op: join(folder, FILE),
    problem: `the weights are quantized by ${JSON.stringify(method)}, weight_block_size ${JSON.stringify(block)}`,
    fix: 'pass a checkpoint in f32, f16, bf16, or fp8 with two numbers as weight_block_size (where its tensors are such, take quantization_config out of its config.json)',
  })
}

/** JSON, also behind the byte order mark that some editors begin files with. */
export const parseJson = (text: string): unknown => JSON.parse(text.replace(/^\uFEFF/, ''))

async function readJson(folder: string): Promise<Record<string, unknown>> {
  const path = join(folder, FILE)
  try {
    // A pipe would be waited for.
    if (!(await stat(path)).isFile()) throw new Error('it is no regular file')
    const json = parseJson(await readFile(path, 'utf8'))
    if (typeof json !== 'object' || json === null) throw new Error('it holds no object')
    return json as Record<string, unknown>
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause)
    throw new MoeError({
      code: 'E_CHECKPOINT',
      op: path,
      problem: `cannot be read: ${reason}`,
      fix: 'pass a local folder with config.json and safetensors files, such as checkpoints/step-…/model of a training run; nothing is downloaded',
      cause,
    })
  }
}
