/**
 * @file Translates patterns of tiktoken (`pat_str`, the syntax of Rust's fancy-regex) to Oniguruma's, which
 * tokenizer.json uses.
 */
import { TokenizerError } from '../errors.ts'

/** Escapes, starts of groups, counts with what follows them, and single characters. */
const TOKENS = /\\[pPux]\{[^}]*\}|\\.|\(\?(?:[a-zA-Z-]*[:)]|P?<\w+>|<?[=!]|>)|\{\d+(?:,\d*)?\}[+?]?|./gsu

const EQUIVALENTS: Record<string, string> = { '^': '\\A', $: '\\z' }

/**
 * Returns the pattern in Oniguruma's Ruby syntax, where `^` and `$` match at every line, `(?s)` is `(?m)`, and a plus
 * after a count (`\p{N}{1,3}+`) is a repetition instead of possessive.
 * @throws TokenizerError E_PATTERN for flags and set operators that have no equivalent
 */
export function toOniguruma(pattern: string): string {
  let out = ''
  /** Where the last repeatable item starts in `out`, and the open groups. */
  let item = 0
  const groups: number[] = []
  let brackets = 0
  let before = ''
  for (const [token] of pattern.matchAll(TOKENS)) {
    if (brackets > 0) {
      if ((before === '-' || before === '~') && token === before) throw unsupported(pattern, token + token)
      // A bracket that comes first is a literal.
      if (token === '[') brackets++
      else if (token === ']' && !(before === '[' || before === '[^')) brackets--
      out += token
      before = token === '^' && before === '[' ? '[^' : token
      continue
    }
    before = token
    if (token.startsWith('{') && token.length > 1) {
      out = token.endsWith('+') ? `${out.slice(0, item)}(?>${out.slice(item)}${token.slice(0, -1)})` : out + token
    } else if (/^[*+?]$/.test(token)) out += token
    else if (token === ')') {
      item = groups.pop() ?? 0
      out += token
    } else {
      item = out.length
      const flags = /^\(\?([a-zA-Z-]*)[:)]$/.exec(token)
      if (/[mRU]/.test(flags?.[1] ?? '')) throw unsupported(pattern, token)
      if (token.startsWith('(') && !flags?.[0].endsWith(')')) groups.push(item)
      if (token === '[') brackets = 1
      out += flags ? token.replaceAll('s', 'm') : (EQUIVALENTS[token] ?? token.replace('(?P<', '(?<'))
    }
  }
  return out
}

function unsupported(pattern: string, what: string): TokenizerError {
  return new TokenizerError({
    code: 'E_PATTERN',
    op: 'pattern',
    problem: `${what} is not supported in ${JSON.stringify(pattern.slice(0, 120))}`,
  })
}
