/** @file `added_tokens` of tokenizer.json. */
import type { AddedToken } from '../added-tokens.ts'
import { type BpeModel, MAX_ID } from '../model.ts'
import { asArray, asFlag, asId, asObject, asString, describe, unsupported, wrong } from './check.ts'

/** A file with a longer one is damaged or hostile. */
const LONGEST = 1024

export function readAddedTokens(value: unknown, model: BpeModel): AddedToken[] {
  if (value === undefined || value === null) return []
  const byId = new Map<number, AddedToken>()
  const byContent = new Map<string, AddedToken>()
  asArray(value, 'added_tokens').forEach((item, index) => {
    const where = `added_tokens[${index}]`
    const json = asObject(item, where)
    const content = asString(json.content, `${where}.content`)
    if (content === '') throw wrong(`${where}.content`, 'is empty')
    if (content.length > LONGEST) throw unsupported(`${where}.content`, `a token of ${content.length} characters`)
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
    const holder = byId.get(token.id)?.content ?? model.tokens[token.id]
    if (holder !== undefined && holder !== content) {
      throw wrong(`${where}.id`, `${describe(content)} and ${describe(holder)} have the same id ${token.id}`, {
        id: token.id,
      })
    }
    const other = byContent.get(content)?.id ?? model.idOf.get(content)
    if (other !== undefined && other !== token.id) {
      throw wrong(`${where}.id`, `${describe(content)} has the ids ${other} and ${token.id}`, {
        ids: [other, token.id],
      })
    }
    byId.set(token.id, token)
    byContent.set(content, token)
  })
  return [...byId.values()].sort((a, b) => a.id - b.id)
}
