/** @file Reads the post-processor TemplateProcessing of tokenizer.json. */
import type { AddedToken } from '../added-tokens.ts'
import { asArray, asId, asObject, asString, describe, invalid, type JsonObject, unsupported } from './check.ts'

/**
 * Returns the ids that a template adds before and after a text.
 * @param ids number of ids
 */
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
        throw unsupported(at, 'a template that does not contain the text once')
      seenText = true
      return
    }
    const name = asString(asObject(piece.SpecialToken, at).id, `${at}.id`)
    const entry = Object.hasOwn(special, name) ? asObject(special[name], `${where}.special_tokens`) : undefined
    const found = entry
      ? asArray(entry.ids, `${where}.special_tokens.ids`).map(id => asId(id, `${where}.special_tokens.ids`, ids))
      : tokens.filter(token => token.content === name).map(token => token.id)
    if (found.length === 0) throw invalid(at, `the template contains ${describe(name)}, which is not a token`)
    ;(seenText ? after : before).push(...found)
  })
  if (!seenText) throw invalid(`${where}.single`, 'the template does not contain the text')
  return { before, after }
}

export const features = { template: readTemplate }
