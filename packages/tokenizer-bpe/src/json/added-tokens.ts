/** @file Reads `added_tokens` of tokenizer.json. */
import type { AddedToken } from '../added-tokens.ts'
import { type BpeModel, MAX_ID } from '../model.ts'
import { asArray, asFlag, asId, asObject, asString, describe, invalid, unsupported } from './check.ts'

/** Maximum length of an added token. Files with longer ones are corrupt or malicious. */
export const MAX_LENGTH = 1024

export function readAddedTokens(value: unknown, model: BpeModel): AddedToken[] {
  if (value === undefined || value === null) return []
  const byId = new Map<number, AddedToken>()
  const byContent = new Map<string, AddedToken>()
  asArray(value, 'added_tokens').forEach((item, index) => {
    const where = `added_tokens[${index}]`
    const json = asObject(item, where)
    const content = asString(json.content, `${where}.content`)
    if (content === '') throw invalid(`${where}.content`, 'is empty')
    if (content.length > MAX_LENGTH) throw unsupported(`${where}.content`, `a token of ${content.length} characters`)
    const special = asFlag(json.special, `${where}.special`, false)
    const token: AddedToken = {
      id: asId(json.id, `${where}.id`, MAX_ID),
      content,
      special,
      normalized: asFlag(json.normalized, `${where}.normalized`, !special),
      lstrip: asFlag(json.lstrip, `${where}.lstrip`, false),
      rstrip: asFlag(json.rstrip, `${where}.rstrip`, false),
      single_word: asFlag(json.single_word, `${where}.single_word`, false),
    }
    const sameId = byId.get(token.id)?.content ?? model.tokens[token.id]
    if (sameId !== undefined && sameId !== content) {
      throw invalid(`${where}.id`, `${describe(content)} and ${describe(sameId)} have the same id ${token.id}`, {
        id: token.id,
      })
    }
    const otherId = byContent.get(content)?.id ?? model.idOf.get(content)
    if (otherId !== undefined && otherId !== token.id) {
      throw invalid(`${where}.id`, `${describe(content)} has the ids ${otherId} and ${token.id}`, {
        ids: [otherId, token.id],
      })
    }
    byId.set(token.id, token)
    byContent.set(content, token)
  })
  return [...byId.values()].sort((a, b) => a.id - b.id)
}
