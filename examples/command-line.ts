/** @file The command line of an example: its options, `--help`, and errors without a stack trace. */
import { parseArgs } from 'node:util'
import { isMoeError } from '@moe/core'

/** An invalid command line. It ends the program with exit code 2. */
export class UsageError extends Error {}

/** An option or a positional argument. */
interface Option<T> {
  readonly type: 'string' | 'boolean'
  /**
   * Returns the value.
   * @param given the text of each occurrence
   * @throws UsageError if a text is invalid
   */
  read(given: readonly string[], name: string): T
}

type Options = Readonly<Record<string, Option<unknown>>>
type Values<O extends Options> = { readonly [name in keyof O]: ReturnType<O[name]['read']> }

/** True if given. */
export const flag = (): Option<boolean> => ({ type: 'boolean', read: given => given.length > 0 })

/** A list of texts: the option may be repeated. */
export const list = (): Option<readonly string[]> => ({ type: 'string', read: given => given })

/** Any text. */
export const text = <F extends string | undefined = undefined>(fallback?: F): Option<string | F> =>
  single(fallback, 'a text', value => value)

/** One of several texts. */
export const oneOf = <const T extends string, F extends T | undefined = undefined>(
  choices: readonly T[],
  fallback?: F,
) => single(fallback, `one of ${choices.join(', ')}`, value => choices.find(choice => choice === value))

/** A finite number. */
export const number = <F extends number | undefined = undefined>(fallback?: F): Option<number | F> =>
  single(fallback, 'a number', numberIf(Number.isFinite))

/** A finite number above 0. */
export const positive = <F extends number | undefined = undefined>(fallback?: F): Option<number | F> =>
  single(
    fallback,
    'a number above 0',
    numberIf(value => value > 0 && Number.isFinite(value)),
  )

/** An integer of at least `least`. */
export const integer = <F extends number | undefined = undefined>(least: number, fallback?: F): Option<number | F> =>
  single(
    fallback,
    `an integer of at least ${least}`,
    numberIf(value => Number.isSafeInteger(value) && value >= least),
  )

const numberIf = (valid: (value: number) => boolean) => (given: string) =>
  given.trim() !== '' && valid(Number(given)) ? Number(given) : undefined

/** The last occurrence counts. @param parse returns undefined for an invalid text */
function single<T, F>(fallback: F | undefined, expected: string, parse: (given: string) => T | undefined) {
  const read = (given: readonly string[], name: string): T | F => {
    if (given.length === 0) return fallback as F
    const value = parse(given[given.length - 1])
    if (value !== undefined) return value
    throw new UsageError(`${name} is "${given[given.length - 1]}", expected ${expected}`)
  }
  return { type: 'string', read } as const
}

/** What an example accepts. */
interface Accepted<O extends Options, P extends Options> {
  readonly options?: O
  /** Positional arguments, in their order. All may be omitted. */
  readonly positionals?: P
}

interface Command<O extends Options, P extends Options> extends Accepted<O, P> {
  /** How the example is started, for example `node examples/fine-tuning.ts`. */
  readonly command: string
  /** The text of `--help`. */
  readonly help: string
}

/**
 * Returns the options and arguments of this program, by name. `--help` prints the help and exits. After this call, an
 * error whose message says what to do ends the program with that message alone: exit code 2 for an invalid command
 * line, else 1.
 */
export function commandLine<O extends Options = Record<never, never>, P extends Options = Record<never, never>>({
  command,
  help,
  ...accepted
}: Command<O, P>): Values<O & P> {
  process.on('uncaughtException', error => {
    const usage = error instanceof UsageError
    const shown = usage ? `${error.message}\nSee ${command} --help.` : isExpected(error) ? error.message : error.stack
    process.stderr.write(`${shown}\n`)
    process.exit(usage ? 2 : 1)
  })
  // The reader of the output may close it, as `| head` does.
  for (const stream of [process.stdout, process.stderr]) stream.on('error', () => process.exit())
  const values = readArguments(process.argv.slice(2), accepted)
  if (values !== 'help') return values
  process.stdout.write(help)
  process.exit()
}

/**
 * Returns the values of options and arguments by name, or `'help'` if `--help` is among them.
 * @throws UsageError if the arguments are invalid
 */
export function readArguments<O extends Options, P extends Options>(
  args: readonly string[],
  accepted: Accepted<O, P>,
): Values<O & P> | 'help' {
  const options: Options = accepted.options ?? {}
  const positionals = Object.entries(accepted.positionals ?? {})
  const types = Object.entries(options).map(([name, { type }]) => [name, { type }] as const)
  const { tokens } = parseArgs({
    args: [...args],
    strict: false,
    tokens: true,
    options: { ...Object.fromEntries(types), help: { type: 'boolean', short: 'h' } },
  })
  const given = new Map<string, string[]>()
  for (const token of tokens) {
    if (token.kind !== 'option') continue
    const { name, rawName, value } = token
    if (name === 'help') return 'help'
    if (!Object.hasOwn(options, name)) throw new UsageError(`unknown option ${rawName}`)
    const isFlag = options[name].type === 'boolean'
    if (isFlag && value !== undefined) throw new UsageError(`${rawName} takes no value, got "${value}"`)
    if (!isFlag && value === undefined) throw new UsageError(`${rawName} needs a value`)
    given.set(name, [...(given.get(name) ?? []), value ?? ''])
  }
  const words = tokens.flatMap(token => (token.kind === 'positional' ? [token.value] : []))
  if (words.length > positionals.length) throw new UsageError(`unexpected argument "${words[positionals.length]}"`)
  return Object.fromEntries([
    ...Object.entries(options).map(([name, option]) => [name, option.read(given.get(name) ?? [], `--${name}`)]),
    ...positionals.map(([name, option], i) => [name, option.read(words.slice(i, i + 1), name.toUpperCase())]),
  ])
}

/** Errors of the libraries, and of system calls: their messages say what is wrong. */
const isExpected = (error: Error): boolean => isMoeError(error) || error.name === 'TokenizerError' || 'syscall' in error
