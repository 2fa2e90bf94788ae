/** @file `post_processor` of tokenizer.json: which special tokens go before and after a text. */
import type { AddedToken } from '../added-tokens.ts'
import { part } from '../parts.ts'
import { asArray, asFlag, asObject, describe, unsupported } from './check.ts'

export interface PostProcessor {
  readonly before: readonly number[]
  readonly after: readonly number[]
  /** Whether offsets leave out the white space at the ends of tokens. */
  readonly trimOffsets: boolean
  /** Whether that white space may be a space that the pre-tokenizer put there, at the start. */
  readonly prefixSpace: boolean
}

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
        const found = part('template')(json, where, tokens, ids)
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
