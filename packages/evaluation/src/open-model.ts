/** @file A model and its tokenizer, from a folder. */
import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { MoeError, type WeightFormat } from '@moe/core'
import { DeepSeek } from '@moe/deepseek'
import { BpeTokenizer } from '@moe/tokenizer-bpe'
import { modelFolder } from '@moe/trainer'

/** What is evaluated, and which tokens begin its texts. */
export interface OpenedModel {
  readonly path: string
  readonly model: DeepSeek
  readonly tokenizer: BpeTokenizer
  /** Undefined: what the tokenizer puts there by itself. */
  readonly begin: number | null | undefined
  readonly prefix: number | undefined
}

/**
 * Opens a model in the Hugging Face layout, or the latest checkpoint of a run of `train`, on the default backend. Where tokenizer_config.json says `add_bos_token`, texts begin
 * with that token.
 * @param begin the token that texts begin with, or `none`
 * @throws MoeError, TokenizerError for files that are missing or damaged
 */
export async function openModel(
  folder: string,
  { weights, begin }: { readonly weights?: WeightFormat; readonly begin?: string },
): Promise<OpenedModel> {
  const path = modelFolder(folder)
  const tokenizer = await BpeTokenizer.fromFile(join(path, 'tokenizer.json'))
  const config = readConfig(join(path, 'tokenizer_config.json'))
  const idOf = (token: unknown) => {
    const text = (token as { content?: unknown } | null | undefined)?.content ?? token
    return typeof text === 'string' ? tokenizer.tokenToId(text) : undefined
  }
  const bos = idOf(config.bos_token)
  const tokens = { begin: config.add_bos_token === true ? bos : undefined, prefix: bos ?? idOf(config.eos_token) }
  if (begin !== undefined) {
    const given = begin === 'none' ? null : tokenizer.tokenToId(begin)
    if (given === undefined) {
      const problem = `there is no token ${begin} in the tokenizer`
      throw new MoeError({ code: 'E_ATTR', op: path, problem, fix: 'pass one that it has, or none' })
    }
    Object.assign(tokens, { begin: given })
  }
  const model = await DeepSeek.fromPretrained(path, { weights })
  return { path, model, tokenizer, ...tokens }
}

function readConfig(path: string): Readonly<Record<string, unknown>> {
  if (!existsSync(path)) return {}
  try {
    return Object(JSON.parse(readFileSync(path, 'utf8').replace(/^\uFEFF/, '')))
  } catch (cause) {
    throw new MoeError({ code: 'E_CHECKPOINT', op: path, problem: `is no JSON: ${(cause as Error).message}`, cause })
  }
}
