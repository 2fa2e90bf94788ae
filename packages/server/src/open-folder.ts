/** @file A model and what belongs to it, from a folder. */
import { existsSync, readFileSync } from 'node:fs'
import { basename, join, resolve } from 'node:path'
import { MoeError, type WeightFormat } from '@moe/core'
import { DeepSeek } from '@moe/deepseek'
import { BpeTokenizer } from '@moe/tokenizer-bpe'
import { type ChatConfig, ChatTemplate } from '@moe/tokenizer-bpe/data'
import { modelFolder } from '@moe/trainer'
import type { Served } from './wanted-texts.ts'

export interface OpenOptions {
  readonly weights?: WeightFormat
  /** Path of a Jinja file in place of the folder's own template. */
  readonly chatTemplate?: string
  /** Default: that of the folder. */
  readonly name?: string
}

/**
 * Opens a model in the Hugging Face layout, or the latest checkpoint of a run of `train`, on the default backend. A template is `chat_template.jinja`, or that of
 * tokenizer_config.json.
 * @throws MoeError, TokenizerError for files that are missing or damaged
 */
export async function openFolder(
  folder: string,
  options: OpenOptions = {},
): Promise<Served & { readonly model: DeepSeek; readonly path: string }> {
  const path = modelFolder(folder)
  const tokenizer = await BpeTokenizer.fromFile(join(path, 'tokenizer.json'))
  const chatTemplate = await readTemplate(path, options.chatTemplate)
  const model = await DeepSeek.fromPretrained(path, { weights: options.weights })
  return { path, model, tokenizer, chatTemplate, name: options.name ?? basename(resolve(folder)) }
}

async function readTemplate(folder: string, given: string | undefined): Promise<ChatTemplate | undefined> {
  const own = join(folder, 'chat_template.jinja')
  const file = given ?? (existsSync(own) ? own : undefined)
  const configFile = join(folder, 'tokenizer_config.json')
  // It also has the tokens that templates write.
  const config: ChatConfig = existsSync(configFile) ? parse(configFile) : {}
  const template = file === undefined ? config.chat_template : read(file)
  return template === undefined ? undefined : ChatTemplate.from({ ...config, chat_template: template })
}

function read(path: string): string {
  try {
    return readFileSync(path, 'utf8')
  } catch (cause) {
    throw new MoeError({
      code: 'E_CHECKPOINT',
      op: path,
      problem: `cannot be read: ${(cause as Error).message}`,
      cause,
    })
  }
}

function parse(path: string): ChatConfig {
  const text = read(path).replace(/^\uFEFF/, '')
  let config: unknown
  try {
    config = JSON.parse(text)
  } catch (cause) {
    throw new MoeError({ code: 'E_CHECKPOINT', op: path, problem: `is no JSON: ${(cause as Error).message}`, cause })
  }
  if (typeof config === 'object' && config !== null && !Array.isArray(config)) return config as ChatConfig
  throw new MoeError({ code: 'E_CHECKPOINT', op: path, problem: 'is no JSON object' })
}
