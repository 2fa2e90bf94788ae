/** @file Reads `post_processor` of tokenizer.json: special tokens around a text, and how offsets are trimmed. */
import type { AddedToken } from '../added-tokens.ts'
import { feature } from '../features.ts'
import { asArray, asFlag, asObject, describe, unsupported } from './check.ts'

export interface PostProcessor {
  /** Ids to add before the text. */
  readonly before: readonly number[]
  /** Ids to add after the text. */
  readonly after: readonly number[]
  /** Whether offsets exclude white space at the ends of tokens. */
  readonly trimOffsets: boolean
  /** Whether the pre-tokenizer may have added a space at the start, which is not trimmed. */
  readonly prefixSpace: boolean
}

/** @param ids number of ids */
export function readPostProcessor(value: unknown, tokens: readonly AddedToken[], ids: number): PostProcessor {
  const before: number[] = []
  const after: number[] = []
  let trimOffsets = false
  let prefixSpace = false
  const walk = (item: unknown, where: string): void => {
    if (item === undefined || item === null) return
    const json = asObject(item, where)
    switch (json.type) {
      case 'Sequence':
        asArray(json.processors, `${where}.processors`).forEach((inner, i) => {
          walk(inner, `${where}.processors[${i}]`)
        })
        return
      case 'ByteLevel':
        trimOffsets = asFlag(json.trim_offsets, `${where}.trim_offsets`, true)
        prefixSpace = asFlag(json.add_prefix_space, `${where}.add_prefix_space`, true)
        return
      case 'TemplateProcessing': {
        const found = feature('template')(json, where, tokens, ids)
        before.push(...found.before)
        after.push(...found.after)
        return
      }
      default:
        throw unsupported(`${where}.type`, describe(json.type))
    }
  }
  walk(value, 'post_processor')
  return { before, after, trimOffsets, prefixSpace }
}
