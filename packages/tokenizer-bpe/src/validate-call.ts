/** @file Validates options and inputs of calls, also for callers without a type checker. */
import { TokenizerError } from './errors.ts'
import { describe } from './json/check.ts'
import { MAX_ID } from './model.ts'

type Test = (value: unknown) => boolean

/**
 * The value of an option that would otherwise be misinterpreted or fail later: what is expected, how to check it, and
 * whether the option is required.
 */
export type OptionRule = readonly [expected: string, test: Test, required?: true]

/** What is expected of the input of a call, how to check it, and how to fix it. */
export type InputRule = readonly [expected: string, test: Test, fix: string]

/** How to validate a call. */
export interface CallRules<Options> {
  /** A rule for each option, or true if its value needs none. The type requires all names. */
  readonly options: { readonly [Name in keyof Options]-?: OptionRule | true }
  readonly input?: InputRule
}

/** The rule of the option `random`. */
export const randomRule: OptionRule = [
  'a function that returns numbers in [0, 1), for example randomNumbers(seed)',
  value => typeof value === 'function',
  true,
]

/** Whether a value is a list of texts. */
export function isTexts(value: unknown): boolean {
  return Array.isArray(value) && value.every(text => typeof text === 'string')
}

/** Whether a value can be the id of a token. */
export function isId(value: unknown): boolean {
  return Number.isInteger(value) && (value as number) >= 0 && (value as number) < MAX_ID
}

/**
 * Validates the options and the input of a call: options must be an object with known names and valid values. Undefined
 * values count as missing.
 * @throws TokenizerError E_CONFIG, and E_DATA for an invalid input
 */
export function validateCall<Options extends object>(
  op: string,
  rules: CallRules<Options>,
  options: Options,
  input?: unknown,
): void {
  const known = rules.options
  const names = Object.keys(known).join(', ')
  const refuse = (problem: string, fix: string) => new TokenizerError({ code: 'E_CONFIG', op, problem, fix })
  if (typeof options !== 'object' || !options) {
    throw refuse(`expected an options object, got ${describe(options)}`, `pass an object: { ${names} }`)
  }
  for (const name in options) {
    if (!Object.hasOwn(known, name) && options[name] !== undefined) {
      throw refuse(`unknown option ${name}`, `known options are ${names}`)
    }
  }
  for (const [name, rule] of Object.entries<OptionRule | true>(known)) {
    if (rule === true) continue
    const [expected, test, required = false] = rule
    const value = options[name as keyof Options]
    if (value === undefined ? !required : test(value)) continue
    throw refuse(`${name} is ${describe(value)}`, `pass ${expected}`)
  }
  const [expected, test, fix] = rules.input ?? []
  if (test?.(input) === false) {
    const problem = `expected ${expected}, got ${describe(input)}`
    throw new TokenizerError({ code: 'E_DATA', op, problem, fix })
  }
}
