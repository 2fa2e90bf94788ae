/** @file Reads and writes `adapter_config.json`, PEFT's description of LoRA adapters. */
import { readFile, stat } from 'node:fs/promises'
import { checkpointError, fileError, shown } from '../checkpoint-error.ts'
import { parseStrictJson } from '../strict-json.ts'

export const CONFIG_FILE = 'adapter_config.json'
export const TENSOR_FILE = 'adapter_model.safetensors'

/** PEFT prepends this to every key, because it wraps the base model. */
export const PREFIX = 'base_model.model.'

/** The adapter settings that this package uses. */
export interface AdapterConfig {
  /** The rank: the number of rows of A. */
  readonly rank: number
  /** The factor of BA: `lora_alpha / rank`, or `lora_alpha / sqrt(rank)` with rsLoRA. */
  readonly scale: number
  /** Folder of the base model, or its name on the Hugging Face Hub. */
  readonly base: string | undefined
}

/** Large enough for a config that lists every one of 256 experts in 61 layers. */
const MAX_BYTES = 2 ** 24

/** PEFT features that are not supported: these fields must be absent, null, false or empty. */
const unsupported = [
  'use_dora',
  'lora_bias',
  'fan_in_fan_out',
  'modules_to_save',
  'rank_pattern',
  'alpha_pattern',
  'target_parameters',
  'layer_replication',
  'trainable_token_indices',
  'alora_invocation_tokens',
  'use_qalora',
  'use_bdlora',
  'arrow_config',
  'monteclora_config',
  'kasa_config',
]

/** Initializations that leave the base weights unchanged. The others modify them, and the file does not contain the modified weights. */
const supportedInitializations: readonly unknown[] = [undefined, null, true, false, 'gaussian', 'orthogonal', 'eva']

/** @throws MoeError E_CHECKPOINT if the file cannot be read, is not an adapter config, or uses unsupported PEFT features */
export async function readAdapterConfig(path: string): Promise<AdapterConfig> {
  const config = await readObject(path)
  const refuse = (field: string, needed: string) =>
    checkpointError(path, `${field} is ${shown(config[field])}; only ${needed} is supported`)
  if (config['peft_type'] !== 'LORA') throw refuse('peft_type', '"LORA"')
  const { r: rank, lora_alpha: alpha, base_model_name_or_path: base } = config
  if (!Number.isSafeInteger(rank) || (rank as number) < 1) throw refuse('r', 'a positive integer')
  if (typeof alpha !== 'number' || !(alpha > 0 && Number.isFinite(alpha)))
    throw refuse('lora_alpha', 'a positive number')
  if ((config['bias'] ?? 'none') !== 'none') throw refuse('bias', '"none"')
  if (!supportedInitializations.includes(config['init_lora_weights']))
    throw refuse('init_lora_weights', 'an initialization that leaves the base weights unchanged')
  for (const field of unsupported) if (!isUnset(config[field])) throw refuse(field, 'null, false or empty')
  const scaled = config['use_rslora'] === true ? Math.sqrt(rank as number) : (rank as number)
  return {
    rank: rank as number,
    scale: alpha / scaled,
    base: typeof base === 'string' && base !== '' ? base : undefined,
  }
}

function isUnset(value: unknown): boolean {
  if (value === undefined || value === null || value === false) return true
  return typeof value === 'object' && Object.keys(value).length === 0
}

async function readObject(path: string): Promise<Record<string, unknown>> {
  let bytes: Uint8Array
  try {
    const stats = await stat(path)
    // Reading a pipe would block.
    if (!stats.isFile()) throw new Error('not a regular file')
    if (stats.size > MAX_BYTES) throw new Error(`it has ${stats.size} bytes, more than the limit of ${MAX_BYTES}`)
    bytes = await readFile(path)
  } catch (cause) {
    throw fileError(path, 'reading', cause, `pass a folder with ${CONFIG_FILE} and ${TENSOR_FILE}`)
  }
  let value: unknown
  try {
    value = parseStrictJson(bytes, 8)
  } catch (cause) {
    throw checkpointError(path, `invalid JSON: ${(cause as Error).message}`, undefined, {}, cause)
  }
  if (typeof value === 'object' && value !== null && !Array.isArray(value)) return value as Record<string, unknown>
  throw checkpointError(path, 'expected a JSON object')
}

/**
 * The text of `adapter_config.json`, as PEFT writes it.
 *
 * @param targets paths of the adapted weights, or only their last components if no other weight has the same ones
 */
export function adapterConfigJson({ rank, scale, base }: AdapterConfig, targets: readonly string[]): string {
  const config = {
    base_model_name_or_path: base ?? null,
    bias: 'none',
    fan_in_fan_out: false,
    inference_mode: true,
    init_lora_weights: true,
    lora_alpha: scale * rank,
    lora_dropout: 0,
    modules_to_save: null,
    peft_type: 'LORA',
    r: rank,
    target_modules: targets,
    task_type: 'CAUSAL_LM',
    use_dora: false,
    use_rslora: false,
  }
  return `${JSON.stringify(config, null, 2)}\n`
}
