/** @file Checks the token ids that callers pass. */
import { MoeError, shown } from '@moe/core'
import type { DeepSeekConfig } from './config.ts'

/** @throws MoeError E_ATTR for an invalid sequence of token ids */
export function checkIds(
  op: 'generate' | 'score',
  { vocab_size: vocabulary }: DeepSeekConfig,
  ids: ArrayLike<number>,
): void {
  const name = op === 'generate' ? 'prompt' : 'text'
  const refused = (problem: string, fix?: string) => new MoeError({ code: 'E_ATTR', op, problem, fix })
  const given: unknown = ids
  if (Array.isArray(ids?.[0]) || ArrayBuffer.isView(ids?.[0])) {
    throw refused(`expected the token ids of one ${name}, got a list of ${name}s`, `call ${op} for each of them`)
  }
  if (typeof given === 'string' || typeof ids?.length !== 'number') {
    const what = typeof given === 'string' ? 'a string' : shown(given)
    throw refused(`expected the token ids of the ${name}, got ${what}`, 'pass tokenizer.encode(text)')
  }
  if (ids.length === 0) throw refused(`the ${name} is empty`, 'pass at least one token, for example bos')
  for (let i = 0; i < ids.length; i++) {
    if (Number.isInteger(ids[i]) && ids[i] >= 0 && ids[i] < vocabulary) continue
    throw refused(`token ${i} is ${ids[i]}, outside the vocabulary of ${vocabulary}`)
  }
}
