/** @file `post_processor` of tokenizer.json: which special tokens go before and after a text. */
import type { AddedToken } from '../added-tokens.ts'
import { asArray, asFlag, asId, asObject, asString, describe, unsupported, wrong } from './check.ts'

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
        const special = asObject(json.special_tokens ?? {}, `${where}.special_tokens`)
        let seenText = false
        asArray(json.single, `${where}.single`).forEach((part, i) => {
          const at = `${where}.single[${i}]`
          const piece = asObject(part, at)
          if (piece.Sequence !== undefined) {
            if (seenText || asObject(piece.Sequence, at).id !== 'A')
              throw unsupported(at, 'a template that does not hold the text once')
            seenText = true
            return
          }
          const name = asString(asObject(piece.SpecialToken, at).id, `${at}.id`)
          const entry = Object.hasOwn(special, name) ? asObject(special[name], `${where}.special_tokens`) : undefined
          const found = entry
            ? asArray(entry.ids, `${where}.special_tokens.ids`).map(id => asId(id, `${where}.special_tokens.ids`, ids))
            : tokens.filter(token => token.content === name).map(token => token.id)
          if (found.length === 0) throw wrong(at, `the template names ${describe(name)}, which is no token`)
          ;(seenText ? after : before).push(...found)
        })
        if (!seenText) throw wrong(`${where}.single`, 'the template does not hold the text')
        return
      }
      default:
        throw unsupported(`${where}.type`, describe(json.type))
    }
  }
  walk(value, 'post_processor')
  return { before, after, trimOffsets, prefixSpace }
}
