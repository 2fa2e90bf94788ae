/** @file Reads `quantization_config` of a config.json: how the weights of a checkpoint are stored. */
import { DEFAULT_BLOCK } from '@moe/checkpoint'
import { MoeError, shown } from '@moe/core'
import { z } from 'zod'

/** How weights are stored, beside those in f32, f16 and bf16. */
export interface Quantization {
  /** Rows and columns of a block of an fp8 weight with a common scale, or null for one scale per matrix. */
  readonly block: readonly [number, number] | null
  /** Whether the scales of fp8 weights are called `weight_scale`, as those of compressed-tensors, instead of `weight_scale_inv`. */
  readonly renamesScales?: boolean
  /** Columns with a common scale in weights of packed 4-bit codes, or null for one scale per row. Undefined if there are none. */
  readonly group?: number | null
}

const positive = z.int().positive()
const pair = z.tuple([positive, positive])
/** Columns of a block of whole rows. */
const allColumns = Number.MAX_SAFE_INTEGER

/** DeepSeek, GLM, Mistral. */
const fp8 = z
  .object({ quant_method: z.literal('fp8'), weight_block_size: pair.nullable().default([...DEFAULT_BLOCK]) })
  .transform(({ weight_block_size }): Quantization => ({ block: weight_block_size }))

const codes = z.object({ symmetric: z.literal(true), dynamic: z.literal(false).nullish() })
/** The weights that compressed-tensors packs; `actorder: "group"` permutes columns. */
const int4 = codes.extend({
  num_bits: z.literal(4),
  type: z.literal('int'),
  actorder: z.enum(['weight', 'static']).or(z.literal(false)).nullish(),
})
const float8 = codes.extend({ num_bits: z.literal(8), type: z.literal('float') })

const packed = (group: number | null): Quantization => ({ block: DEFAULT_BLOCK, group })
const packedWeights = z.union([
  int4.extend({ strategy: z.literal('group'), group_size: positive }).transform(({ group_size }) => packed(group_size)),
  int4.extend({ strategy: z.literal('channel') }).transform(() => packed(null)),
])

const inBlocks = (block: Quantization['block']): Quantization => ({ block, renamesScales: true })
const floatWeights = z.union([
  float8
    .extend({ strategy: z.literal('block'), block_structure: pair })
    .transform(({ block_structure }) => inBlocks(block_structure)),
  float8.extend({ strategy: z.literal('channel') }).transform(() => inBlocks([1, allColumns])),
  float8.extend({ strategy: z.literal('tensor') }).transform(() => inBlocks(null)),
])

/** compressed-tensors, where all groups of modules have the same kind of weights. */
const compressed = (format: string, weights: z.ZodType<Quantization>) =>
  z
    .object({
      quant_method: z.literal('compressed-tensors'),
      format: z.literal(format),
      quantization_status: z.literal('compressed').nullish(),
      config_groups: z.record(z.string(), z.object({ weights, format: z.literal(format).nullish() })),
    })
    .transform(({ config_groups }) => Object.values(config_groups).map(group => group.weights))
    .refine(all => all.length > 0 && all.every(one => JSON.stringify(one) === JSON.stringify(all[0])))
    .transform(all => all[0])

const known = z.union([fp8, compressed('pack-quantized', packedWeights), compressed('float-quantized', floatWeights)])

/**
 * Parses a `quantization_config`. Activations are never quantized, whatever it says about them.
 * @param path names the file in error messages
 * @throws MoeError E_UNSUPPORTED for formats that cannot be read
 */
export function parseQuantization(path: string, given: unknown): Quantization {
  if (given === undefined || given === null) return { block: DEFAULT_BLOCK }
  const parsed = known.safeParse(given)
  if (parsed.success) return parsed.data
  const {
    quant_method: method,
    weight_block_size: block,
    format,
    config_groups,
  } = Object(given) as Record<string, unknown>
  const details =
    method === 'compressed-tensors'
      ? `format ${shown(format)}, config_groups ${shown(config_groups)}`
      : `weight_block_size ${shown(block)}`
  throw new MoeError({
    code: 'E_UNSUPPORTED',
    op: path,
    problem: `unsupported quantization: quant_method ${shown(method)}, ${details}`,
    fix:
      'use a checkpoint in f32, f16 or bf16; in fp8 with a weight_block_size of two numbers or null; or of compressed-tensors, with all weights in symmetric 4-bit integers ' +
      '(format pack-quantized, strategy group or channel) or in fp8 (format float-quantized). If its tensors are in f32, f16, bf16 or fp8 blocks, remove quantization_config from its config.json',
  })
}
