/** @file The post-processor TemplateProcessing of tokenizer.json. */
import type { AddedToken } from '../added-tokens.ts'
import type { Parts } from '../parts.ts'
import { asArray, asId, asObject, asString, describe, type JsonObject, unsupported, wrong } from './check.ts'

/** The ids that a template puts before and after a text. */
export function readTemplate(json: JsonObject, where: string, tokens: readonly AddedToken[], ids: number) {
  const before: number[] = []
  const after: number[] = []
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
  return { before, after }
}

export const parts: Partial<Parts> = { template: readTemplate }
