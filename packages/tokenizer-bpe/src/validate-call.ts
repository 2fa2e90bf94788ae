/** @file Validates options and inputs of calls, also for callers without a type checker. */
import type { ChatOptions } from './data/chat-template.ts'
import type { FillInTheMiddleOptions } from './data/fill-in-the-middle.ts'
import type { PackOptions } from './data/pack-documents.ts'
import type { SplitTokensOptions } from './data/split-tokens.ts'
import { TokenizerError } from './errors.ts'
import { describe } from './json/check.ts'
import { MAX_ID } from './model.ts'
import type { TiktokenOptions } from './tiktoken.ts'
import type { DecodeOptions, EncodeOptions } from './tokenizer.ts'
import type { TrainBpeOptions } from './train/train.ts'

/** Options by function. */
export interface OptionsByOp {
  readonly trainBpe: TrainBpeOptions
  readonly encode: EncodeOptions
  readonly encodeBatch: EncodeOptions & { readonly threads?: number }
  readonly decode: DecodeOptions
  readonly fromTiktoken: TiktokenOptions
  readonly 'ChatTemplate.render': ChatOptions
  readonly fillInTheMiddle: FillInTheMiddleOptions
  readonly packDocuments: PackOptions
  readonly MergedTokenSplitter: SplitTokensOptions
}

const encode = { addSpecialTokens: true, parseSpecialTokens: true, parseAddedTokens: true } as const

/** All option names. The types require each object to be complete. */
const optionNames: { readonly [Op in keyof OptionsByOp]: { readonly [Name in keyof OptionsByOp[Op]]-?: true } } = {
  trainBpe: {
    vocabSize: true,
    preTokenizer: true,
    normalizer: true,
    specialTokens: true,
    minFrequency: true,
    initialAlphabet: true,
    maxTokenLength: true,
    allowBinary: true,
    onProgress: true,
    signal: true,
  },
  encode,
  encodeBatch: { ...encode, threads: true },
  decode: { skipSpecialTokens: true },
  fromTiktoken: { preTokenizer: true, specialTokens: true },
  'ChatTemplate.render': { addGenerationPrompt: true, variables: true },
  fillInTheMiddle: { rate: true, random: true, tokens: true },
  packDocuments: { length: true, endOfText: true },
  MergedTokenSplitter: { rate: true, random: true },
}

type Test = (value: unknown) => boolean
type Rule = readonly [expected: string, test: Test, required?: true]

/** Validation of inputs: what is expected, how to check it, and how to fix it. */
const inputRules: { readonly [Op in keyof OptionsByOp]?: readonly [expected: string, test: Test, fix: string] } = {
  trainBpe: [
    'an iterable of texts',
    input => input === undefined || Symbol.iterator in Object(input),
    'pass [text] or a generator of texts; use trainBpeAsync for texts that arrive asynchronously',
  ],
  encodeBatch: ['a list of texts', isTexts, 'pass an array; await promises first'],
  decode: ['a list of ids', isList, 'pass an array; await promises first'],
  packDocuments: [
    'an iterable of documents',
    input => typeof input === 'object' && Symbol.iterator in Object(input),
    'pass a list of ids for each document: texts.map(text => tokenizer.encode(text))',
  ],
  fromTiktoken: ['ranks', isRanks, 'pass the text or the bytes of a rank file, or a Map from ids to bytes'],
}

const random: Rule = [
  'a function that returns numbers in [0, 1), for example randomNumbers(seed)',
  value => typeof value === 'function',
  true,
]

/** Validation of option values that would otherwise be misinterpreted or fail later. */
const optionRules: { readonly [Op in keyof OptionsByOp]?: Readonly<Record<string, Rule>> } = {
  trainBpe: {
    preTokenizer: [
      'a name, a RegExp or { patterns: [text, ...] }',
      value => isChoice(value, 'patterns', patterns => isTexts(patterns) && (patterns as string[]).length > 0),
    ],
    normalizer: ['NFC, NFD, NFKC or NFKD', value => /^NFK?[CD]$/.test(String(value))],
    specialTokens: ['a list of texts, or of { content: text, ... }', isSpecialTokens],
    minFrequency: ['a number from 0', value => typeof value === 'number' && value >= 0],
    initialAlphabet: [
      "'bytes', 'seen' or { characters: text }",
      value => value === 'bytes' || value === 'seen' || typeof Object(value).characters === 'string',
    ],
    maxTokenLength: ['a number from 1', value => typeof value === 'number' && value >= 1],
    onProgress: ['a function', value => typeof value === 'function'],
    signal: ['an AbortSignal', value => typeof Object(value).aborted === 'boolean'],
  },
  encodeBatch: { threads: ['a whole number from 0', value => Number.isInteger(value) && (value as number) >= 0] },
  fromTiktoken: {
    preTokenizer: [
      'a name, a RegExp or { pattern: text }',
      value => isChoice(value, 'pattern', pattern => typeof pattern === 'string'),
      true,
    ],
    specialTokens: ['an object of ids by token text', value => typeof value === 'object'],
  },
  fillInTheMiddle: {
    random,
    tokens: [
      'three texts: { begin, hole, end }',
      value => isTexts(['begin', 'hole', 'end'].map(name => Object(value)[name])),
    ],
  },
  packDocuments: { endOfText: ['the id of a token', isId, true] },
  MergedTokenSplitter: { random },
}

function isChoice(value: unknown, name: string, test: Test): boolean {
  return typeof value === 'string' || value instanceof RegExp || test(Object(value)[name])
}

function isTexts(value: unknown): boolean {
  return Array.isArray(value) && value.every(text => typeof text === 'string')
}

function isSpecialTokens(value: unknown): boolean {
  return Array.isArray(value) && value.every(token => typeof (Object(token).content ?? token) === 'string')
}

function isRanks(value: unknown): boolean {
  if (typeof value === 'string' || value instanceof Uint8Array) return true
  if (!(value instanceof Map)) return false
  return Array.from(value).every(([id, bytes]) => isId(id) && bytes instanceof Uint8Array)
}

function isId(value: unknown): boolean {
  return Number.isInteger(value) && (value as number) >= 0 && (value as number) < MAX_ID
}

function isList(input: unknown): boolean {
  if (typeof input !== 'object' || input === null) return false
  return Symbol.iterator in input || typeof (input as ArrayLike<number>).length === 'number'
}

/**
 * Validates the options and the input of a call: options must be an object with known names and valid values. Undefined
 * values count as missing.
 * @throws TokenizerError E_CONFIG, and E_DATA for an invalid input
 */
export function validateCall<Op extends keyof OptionsByOp>(op: Op, options: OptionsByOp[Op], input?: unknown): void {
  const known: object = optionNames[op]
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
  for (const [name, [expected, test, required = false]] of Object.entries<Rule>(optionRules[op] ?? {})) {
    const value = options[name as keyof typeof options]
    if (value === undefined ? !required : test(value)) continue
    throw refuse(`${name} is ${describe(value)}`, `pass ${expected}`)
  }
  const [expected, test, fix] = inputRules[op] ?? []
  if (test?.(input) === false) {
    const problem = `expected ${expected}, got ${describe(input)}`
    throw new TokenizerError({ code: 'E_DATA', op, problem, fix })
  }
}
