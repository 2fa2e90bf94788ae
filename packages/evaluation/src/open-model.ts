/** @file Opens a model and its tokenizer from a folder. */
import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { MoeError, type WeightFormat } from '@moe/core'
import { DeepSeek, type FromPretrainedOptions } from '@moe/deepseek'
import { BpeTokenizer } from '@moe/tokenizer-bpe'
import { modelFolder } from '@moe/trainer'

/** A model, its tokenizer, and the tokens at the start of its texts. */
export interface OpenedModel {
  readonly path: string
  readonly model: DeepSeek
  readonly tokenizer: BpeTokenizer
  /** Undefined: what the tokenizer adds. */
  readonly bos: number | null | undefined
  readonly prefix: number | undefined
}

/**
 * Opens a model in the Hugging Face layout, or the latest checkpoint of a run of `train`, on the default backend. If tokenizer_config.json sets `add_bos_token`, texts start
 * with that token.
 * @param options.bos the token at the start of texts, or `none`
 * @param options.parameters as in `DeepSeek.fromPretrained`: the parameters to load, if this rank has only a part of the model
 * @throws MoeError, TokenizerError for missing or corrupt files
 */
export async function openModel(
  folder: string,
  {
    weights,
    bos,
    parameters,
  }: {
    readonly weights?: WeightFormat | undefined
    readonly bos?: string | undefined
    readonly parameters?: FromPretrainedOptions['parameters']
  },
): Promise<OpenedModel> {
  const path = modelFolder(folder)
  const tokenizer = await BpeTokenizer.fromFile(join(path, 'tokenizer.json'))
  const config = readConfig(join(path, 'tokenizer_config.json'))
  const idOf = (token: unknown) => {
    const text = (token as { content?: unknown } | null | undefined)?.content ?? token
    return typeof text === 'string' ? tokenizer.tokenToId(text) : undefined
  }
  const configured = idOf(config.bos_token)
  const tokens = {
    bos: config.add_bos_token === true ? configured : undefined,
    prefix: configured ?? idOf(config.eos_token),
  }
  if (bos !== undefined) {
    const given = bos === 'none' ? null : tokenizer.tokenToId(bos)
    if (given === undefined) {
      const problem = `the tokenizer has no token ${bos}`
      throw new MoeError({ code: 'E_ATTR', op: path, problem, fix: 'pass one of its tokens, or none' })
    }
    Object.assign(tokens, { bos: given })
  }
  const model = await DeepSeek.fromPretrained(path, { weights, parameters })
  return { path, model, tokenizer, ...tokens }
}

function readConfig(path: string): Readonly<Record<string, unknown>> {
  if (!existsSync(path)) return {}
  try {
    return Object(JSON.parse(readFileSync(path, 'utf8').replace(/^\uFEFF/, '')))
  } catch (cause) {
    throw new MoeError({ code: 'E_CHECKPOINT', op: path, problem: `invalid JSON: ${(cause as Error).message}`, cause })
  }
}
