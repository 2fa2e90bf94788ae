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

/** Maximum number of decimals. */
const PLACES = 6

/** Decimals, the last of which is not 0, so that the number is strictly between two integers. */
const decimals = (places: number) => `[0-9]{0,${places - 1}}[1-9]`
const FRACTION = `\\.${decimals(PLACES)}`

/** EBNF of unbounded numbers: at most 15 integer digits, and always finite. */
export const INTEGER = '"0" | "-"? [1-9] [0-9]{0,14}'
export const NUMBER = '"-"? ("0" | [1-9] [0-9]{0,14}) ("." [0-9]{1,16})? ([eE] [+\\-]? [0-9]{1,2})?'

/**
 * The numbers within bounds, as alternatives of a regular expression: integers that a double represents exactly and, for `number`, numbers with up to six decimals. Returns
 * undefined if there is none.
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
  const from = { value: Math.max(minimum, exclusiveMinimum), isIncluded: minimum > exclusiveMinimum }
  const to = { value: Math.min(maximum, exclusiveMaximum), isIncluded: maximum < exclusiveMaximum }
  const negated = ({ value, isIncluded }: Bound): Bound => ({ value: -value, isIncluded })
  const parts = [...nearBounds(from, to), ...nearBounds(negated(to), negated(from)).map(minus)]
  const all = type === 'integer' ? whole : [...whole, ...between.map(one => `${one}${FRACTION}`), ...parts]
  return all.length === 0 ? undefined : all.join('|')
}

interface Bound {
  readonly value: number
  readonly isIncluded: boolean
}

/** Patterns for the positive numbers between two bounds with the integer part of one that is not an integer. */
function nearBounds(from: Bound, to: Bound): string[] {
  const parts = [from, to].flatMap(({ value }) =>
    value > 0 && !Number.isInteger(value) && value < Infinity ? Math.floor(value) : [],
  )
  return [...new Set(parts)].flatMap(part => {
    const all = 10 ** PLACES - 1
    const least = from.value < part ? 1 : Math.max(1, millionths(from, 1))
    const most = to.value >= part + 1 ? all : millionths(to, -1)
    if (part + 1 <= from.value || part >= to.value || least > most) return []
    if (least === 1 && most === all) return [part + FRACTION]
    const text = (count: number) => String(count).padStart(PLACES, '0').replace(/0+$/, '')
    const found = decimalsBetween(least === 1 ? '' : text(least), most === all ? undefined : text(most), PLACES)
    return found.filter(one => one !== '').map(one => `${part}\\.${one}`)
  })
}

/** The fraction of a positive bound in millionths, up to the next number within it in a direction. */
function millionths({ value, isIncluded }: Bound, direction: 1 | -1): number {
  // Numbers below a millionth may be written with an exponent.
  const [, fraction = ''] = value < 1e-6 ? ['', '0000001'] : String(value).split('.')
  const whole = Number(fraction.slice(0, PLACES).padEnd(PLACES, '0'))
  if (fraction.length > PLACES) return direction > 0 ? whole + 1 : whole
  return isIncluded ? whole : whole + direction
}

/** Patterns for up to `places` decimals, the last of which is not 0, from `least` to `most` in alphabetical order. An empty text comes first. */
function decimalsBetween(least: string, most: string | undefined, places: number): string[] {
  if (most === '') return ['']
  const any = places > 0 ? `(?:${decimals(places)})?` : ''
  if (least === '' && most === undefined) return [any]
  const [low, high] = [Number(least[0] ?? -1), Number(most?.[0] ?? 10)]
  const isBound = (digit: number) => digit >= 0 && digit <= 9
  const atBounds = [...new Set([low, high])].filter(isBound).flatMap(digit => {
    const rests = decimalsBetween(
      digit === low ? least.slice(1) : '',
      digit === high ? most?.slice(1) : undefined,
      places - 1,
    )
    return rests.filter(rest => digit > 0 || rest !== '').map(rest => `${digit}${rest}`)
  })
  const rest = places > 1 ? `(?:${decimals(places - 1)})?` : ''
  const [first, last] = [Math.max(low + 1, 1), high - 1]
  return [
    ...(least === '' ? [''] : []),
    ...(low < 0 && high > 0 && places > 1 ? [`0${decimals(places - 1)}`] : []),
    ...(first > last ? [] : [`[${first}-${last}]${rest}`]),
    ...atBounds,
  ]
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
