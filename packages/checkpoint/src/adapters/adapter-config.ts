/** @file `adapter_config.json`: what PEFT says of low-rank adapters beside their tensors. */
import { readFile, stat } from 'node:fs/promises'
import { checkpointError, fileError, shown } from '../checkpoint-error.ts'
import { parseStrictJson } from '../strict-json.ts'

export const CONFIG_FILE = 'adapter_config.json'
export const TENSOR_FILE = 'adapter_model.safetensors'

/** Before its own keys, PEFT writes what it wraps a model in. */
export const PREFIX = 'base_model.model.'

/** What decides how adapters count. */
export interface AdapterConfig {
  /** Rows of A. */
  readonly rank: number
  /** What B A is multiplied by. */
  readonly scale: number
  /** Folder of the model that they were made for, or its name on the Hub. */
  readonly base: string | undefined
}

/** Of 256 experts in 61 layers it may list every one. */
const MAX_BYTES = 2 ** 24

/** Fields that change what adapters mean, or say that there is more than them: none of these may say anything. */
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

/** Ways to begin that leave the base as it is. The others take something out of its weights, which the file does not tell of. */
const plainStarts: readonly unknown[] = [undefined, null, true, false, 'gaussian', 'orthogonal', 'eva']

/** @throws MoeError E_CHECKPOINT when it cannot be read, is none, or asks for more than adapters of one rank */
export async function readAdapterConfig(path: string): Promise<AdapterConfig> {
  const config = await readObject(path)
  const refuse = (field: string, needed: string) =>
    checkpointError(path, `${field} is ${shown(config[field])}, ${needed} is supported`)
  if (config['peft_type'] !== 'LORA') throw refuse('peft_type', '"LORA"')
  const { r: rank, lora_alpha: alpha, base_model_name_or_path: base } = config
  if (!Number.isSafeInteger(rank) || (rank as number) < 1) throw refuse('r', 'a whole number from 1')
  if (typeof alpha !== 'number' || !(alpha > 0 && Number.isFinite(alpha)))
    throw refuse('lora_alpha', 'a positive number')
  if ((config['bias'] ?? 'none') !== 'none') throw refuse('bias', '"none"')
  if (!plainStarts.includes(config['init_lora_weights']))
    throw refuse('init_lora_weights', 'a start that leaves the base as it is')
  for (const field of unsupported) if (!saysNothing(config[field])) throw refuse(field, 'none')
  const scaled = config['use_rslora'] === true ? Math.sqrt(rank as number) : (rank as number)
  return {
    rank: rank as number,
    scale: alpha / scaled,
    base: typeof base === 'string' && base !== '' ? base : undefined,
  }
}

function saysNothing(value: unknown): boolean {
  if (value === undefined || value === null || value === false) return true
  return typeof value === 'object' && Object.keys(value).length === 0
}

async function readObject(path: string): Promise<Record<string, unknown>> {
  let bytes: Uint8Array
  try {
    const stats = await stat(path)
    // A pipe would be waited for.
    if (!stats.isFile()) throw new Error('is no regular file')
    if (stats.size > MAX_BYTES) throw new Error(`has ${stats.size} bytes, more than ${MAX_BYTES}`)
    bytes = await readFile(path)
  } catch (cause) {
    throw fileError(path, 'reading', cause, `pass a folder with ${CONFIG_FILE} and ${TENSOR_FILE}`)
  }
  let value: unknown
  try {
    value = parseStrictJson(bytes, 8)
  } catch (cause) {
    throw checkpointError(path, `is not JSON: ${(cause as Error).message}`, undefined, {}, cause)
  }
  if (typeof value === 'object' && value !== null && !Array.isArray(value)) return value as Record<string, unknown>
  throw checkpointError(path, 'holds no object')
}

/** The file as PEFT writes it. `targets`: paths of what is adapted, or their last parts where these are no others'. */
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
