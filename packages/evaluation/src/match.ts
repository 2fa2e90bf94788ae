/** @file Compares generated texts with answers. */
import { MoeError } from '@moe/core'
import type { Item, Match } from './task.ts'

type Matcher = (text: string, answers: readonly string[], item: Item) => number

/** Returns a function that scores a text: 1 or 0, or any number that a task's own function returns. @throws MoeError E_CONFIG for an invalid regular expression */
export function matcherOf(name: string, match: Match | ((text: string, item: Item) => boolean | number)): Matcher {
  if (typeof match === 'function') return (text, _answers, item) => Number(match(text, item))
  const extract = match.extract === undefined ? null : regularExpression(name, match.extract)
  const ignored = (match.ignore ?? []).map(source => regularExpression(name, source))
  const plain = (text: string) => {
    let rest = text.trim()
    for (const pattern of ignored) rest = rest.replace(pattern, '')
    if (match.ignoreCase) rest = rest.toLowerCase()
    if (match.ignorePunctuation) rest = rest.replace(/[!-/:-@[-`{-~]/g, '')
    return rest.trim()
  }
  return (text, answers) => {
    const found = extract === null ? text : extracted(text, extract, match.pick)
    if (found === undefined) return 0
    const normalized = plain(found)
    return answers.some(answer => plain(answer) === normalized) ? 1 : 0
  }
}

function extracted(text: string, pattern: RegExp, pick: Match['pick']): string | undefined {
  const all = [...text.matchAll(pattern)]
  const found = pick === 'last' ? all[all.length - 1] : all[0]
  if (found === undefined) return undefined
  return found.length === 1 ? found[0] : found.slice(1).find(group => group)
}

function regularExpression(name: string, source: string): RegExp {
  try {
    return new RegExp(source, 'g')
  } catch (cause) {
    const problem = `${name}: ${(cause as Error).message}`
    throw new MoeError({ code: 'E_CONFIG', op: 'evaluateTask', problem, cause })
  }
}
