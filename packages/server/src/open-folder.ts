/** @file Opens a model, its tokenizer and its chat template from a folder. */
import { existsSync, readFileSync } from 'node:fs'
import { basename, join, resolve } from 'node:path'
import { MoeError, type WeightFormat } from '@moe/core'
import { DeepSeek, type FromPretrainedOptions } from '@moe/deepseek'
import { BpeTokenizer } from '@moe/tokenizer-bpe'
import { type ChatConfig, ChatTemplate } from '@moe/tokenizer-bpe/data'
import { modelFolder } from '@moe/trainer'
import type { ServedModel } from './generation-request.ts'

export interface OpenOptions {
  readonly weights?: WeightFormat | undefined
  /** As in `DeepSeek.fromPretrained`: the parameters to load, if this rank has only a part of the model. */
  readonly parameters?: FromPretrainedOptions['parameters']
  /** Path of a Jinja file that replaces the folder's template. */
  readonly chatTemplate?: string | undefined
  /** Name of the model for clients. Default: the name of the folder. */
  readonly name?: string | undefined
}

/** A model opened from a folder. */
export interface OpenedModel extends ServedModel {
  readonly model: DeepSeek
  /** The folder of its weights. */
  readonly path: string
}

/**
 * Opens a model in the Hugging Face layout, or the latest checkpoint of a training run, on the default backend. The chat template is `chat_template.jinja`, or else that
 * of `tokenizer_config.json`. If the latter sets `add_bos_token`, texts start with that token, as in transformers.
 * @throws MoeError, TokenizerError if a file is missing or corrupt
 */
export async function openFolder(folder: string, options: OpenOptions = {}): Promise<OpenedModel> {
  const path = modelFolder(folder)
  const configFile = join(path, 'tokenizer_config.json')
  const plain = await BpeTokenizer.fromFile(join(path, 'tokenizer.json'))
  const config: ChatConfig = existsSync(configFile) ? parse(configFile) : {}
  const tokenizer = config.add_bos_token === true ? await withBegin(plain, config.bos_token) : plain
  const chatTemplate = await readTemplate(path, config, options.chatTemplate)
  const model = await DeepSeek.fromPretrained(path, { weights: options.weights, parameters: options.parameters })
  return { path, model, tokenizer, chatTemplate, name: options.name ?? basename(resolve(folder)) }
}

/** A tokenizer that adds a token at the start of texts, unless it adds one already. */
async function withBegin(tokenizer: BpeTokenizer, token: unknown): Promise<BpeTokenizer> {
  const text = (token as { content?: unknown } | null | undefined)?.content ?? token
  const id = typeof text === 'string' ? tokenizer.tokenToId(text) : undefined
  if (id === undefined || tokenizer.encode('').length > 0) return tokenizer
  const special = { SpecialToken: { id: text, type_id: 0 } }
  const sequence = (name: string) => ({ Sequence: { id: name, type_id: 0 } })
  const post_processor = {
    type: 'TemplateProcessing',
    single: [special, sequence('A')],
    pair: [special, sequence('A'), sequence('B')],
    special_tokens: { [text as string]: { id: text, ids: [id], tokens: [text] } },
  }
  return BpeTokenizer.fromJSONAsync({ ...tokenizer.toJSON(), post_processor })
}

/** @param config also defines the special tokens that templates use */
async function readTemplate(
  folder: string,
  config: ChatConfig,
  given: string | undefined,
): Promise<ChatTemplate | undefined> {
  const own = join(folder, 'chat_template.jinja')
  const file = given ?? (existsSync(own) ? own : undefined)
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
      problem: `cannot read the file: ${(cause as Error).message}`,
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
    throw new MoeError({
      code: 'E_CHECKPOINT',
      op: path,
      problem: `the file is not valid JSON: ${(cause as Error).message}`,
      cause,
    })
  }
  if (typeof config === 'object' && config !== null && !Array.isArray(config)) return config as ChatConfig
  throw new MoeError({ code: 'E_CHECKPOINT', op: path, problem: 'the file does not contain a JSON object' })
}
