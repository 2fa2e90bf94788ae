/**
 * @file Number ranges as regular expressions. The range rules of @mlc-ai/web-xgrammar 0.1.27 are not used because they accept invalid numbers: 144 to 199 for a maximum of
 * 143, and a lone minus sign for a minimum of -112.
 */

export interface Bounds {
  readonly minimum?: number
  readonly maximum?: number
  readonly exclusiveMinimum?: number
  readonly exclusiveMaximum?: number
}

/** Never all zeros, so that the number is strictly between two integers. */
const FRACTION = '\\.[0-9]{0,5}[1-9]'

/** EBNF of unbounded numbers: at most 15 integer digits, and always finite. */
export const INTEGER = '"0" | "-"? [1-9] [0-9]{0,14}'
export const NUMBER = '"-"? ("0" | [1-9] [0-9]{0,14}) ("." [0-9]{1,16})? ([eE] [+\\-]? [0-9]{1,2})?'

/**
 * The numbers within bounds, as alternatives of a regular expression: integers and, for `number`, fractions between two integers that are both within the bounds. Returns
 * undefined if there is no such number that a double represents exactly.
 */
export function numberRange(type: 'integer' | 'number', bounds: Bounds): string | undefined {
  const bound = (given: number | undefined, none: number) =>
    given === undefined || (Math.abs(given) > Number.MAX_SAFE_INTEGER && given > 0 === none > 0) ? none : given
  const minimum = bound(bounds.minimum, -Infinity)
  const maximum = bound(bounds.maximum, Infinity)
  const exclusiveMinimum = bound(bounds.exclusiveMinimum, -Infinity)
  const exclusiveMaximum = bound(bounds.exclusiveMaximum, Infinity)
  if (Math.max(minimum, exclusiveMinimum) > Number.MAX_SAFE_INTEGER) return undefined
  if (Math.min(maximum, exclusiveMaximum) < -Number.MAX_SAFE_INTEGER) return undefined
  const least = Math.max(Math.ceil(minimum), Math.floor(exclusiveMinimum) + 1)
  const most = Math.min(Math.floor(maximum), Math.ceil(exclusiveMaximum) - 1)
  const low = Math.ceil(Math.max(minimum, exclusiveMinimum))
  const high = Math.floor(Math.min(maximum, exclusiveMaximum))
  const whole = [...digits(Math.max(0, least), most), ...digits(Math.max(1, -most), -least).map(minus)]
  const between = [...digits(Math.max(0, low), high - 1), ...digits(Math.max(0, -high), -low - 1).map(minus)]
  const all = type === 'integer' ? whole : [...whole, ...between.map(one => `${one}${FRACTION}`)]
  return all.length === 0 ? undefined : all.join('|')
}

const minus = (text: string) => `-${text}`

/** Patterns for the integers from `least` to `most`, both at least 0. */
function digits(least: number, most: number): string[] {
  if (least > most) return []
  const from = BigInt(least).toString()
  if (most === Infinity) {
    const { length } = from
    const longer = `[1-9][0-9]{${length},${Math.max(length, 14)}}`
    return [...digits(least, 10 ** length - 1), longer]
  }
  const to = BigInt(most).toString()
  if (from.length === to.length) return sameLength(from, to)
  const split = 10 ** from.length
  return [...digits(least, split - 1), ...digits(split, most)]
}

/** Patterns for the integers between two decimal strings of the same length. */
function sameLength(from: string, to: string): string[] {
  if (from === '') return ['']
  const rest = from.length - 1
  const any = rest === 0 ? '' : `[0-9]{${rest}}`
  if (/^0*$/.test(from.slice(1)) && /^9*$/.test(to.slice(1))) return [`[${from[0]}-${to[0]}]${any}`]
  const under = (first: string, from: string, to: string) => sameLength(from, to).map(text => first + text)
  if (from[0] === to[0]) return under(from[0], from.slice(1), to.slice(1))
  const [after, before] = [Number(from[0]) + 1, Number(to[0]) - 1]
  return [
    ...under(from[0], from.slice(1), '9'.repeat(rest)),
    ...(after > before ? [] : [`[${after}-${before}]${any}`]),
    ...under(to[0], '0'.repeat(rest), to.slice(1)),
  ]
}
