/** @file Validates calls of the tokenizer and of training. */
import type { DecodeOptions, EncodeOptions } from './options.ts'
import type { TiktokenOptions } from './tiktoken.ts'
import type { TrainBpeOptions } from './train/train.ts'
import { type CallRules, isId, isTexts, validateCall } from './validate-call.ts'
import type { ValidatedOp } from './validation.ts'

const encode = { addSpecialTokens: true, parseSpecialTokens: true, parseAddedTokens: true } as const

interface OptionsByOp extends Record<ValidatedOp, object> {
  readonly trainBpe: TrainBpeOptions
  readonly encode: EncodeOptions
  readonly encodeBatch: EncodeOptions & { readonly threads?: number }
  readonly decode: DecodeOptions
  readonly fromTiktoken: TiktokenOptions
}

const rules: { readonly [Op in ValidatedOp]: CallRules<OptionsByOp[Op]> } = {
  trainBpe: {
    options: {
      vocabSize: true,
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
      allowBinary: true,
      onProgress: ['a function', value => typeof value === 'function'],
      signal: ['an AbortSignal', value => typeof Object(value).aborted === 'boolean'],
    },
    input: [
      'an iterable of texts',
      input => input === undefined || Symbol.iterator in Object(input),
      'pass [text] or a generator of texts; use trainBpeAsync for texts that arrive asynchronously',
    ],
  },
  encode: { options: encode },
  encodeBatch: {
    options: {
      ...encode,
      threads: ['a whole number from 0', value => Number.isInteger(value) && (value as number) >= 0],
    },
    input: ['a list of texts', isTexts, 'pass an array; await promises first'],
  },
  decode: {
    options: { skipSpecialTokens: true },
    input: ['a list of ids', isList, 'pass an array; await promises first'],
  },
  fromTiktoken: {
    options: {
      preTokenizer: [
        'a name, a RegExp or { pattern: text }',
        value => isChoice(value, 'pattern', pattern => typeof pattern === 'string'),
        true,
      ],
      specialTokens: ['an object of ids by token text', value => typeof value === 'object'],
    },
    input: ['ranks', isRanks, 'pass the text or the bytes of a rank file, or a Map from ids to bytes'],
  },
}

/** Validates a call: see `validateCall`. */
export function validateTokenizerCall(op: ValidatedOp, options: object, input?: unknown): void {
  validateCall(op, rules[op] as CallRules<object>, options, input)
}

function isChoice(value: unknown, name: string, test: (value: unknown) => boolean): boolean {
  return typeof value === 'string' || value instanceof RegExp || test(Object(value)[name])
}

function isSpecialTokens(value: unknown): boolean {
  return Array.isArray(value) && value.every(token => typeof (Object(token).content ?? token) === 'string')
}

function isRanks(value: unknown): boolean {
  if (typeof value === 'string' || value instanceof Uint8Array) return true
  if (!(value instanceof Map)) return false
  return Array.from(value).every(([id, bytes]) => isId(id) && bytes instanceof Uint8Array)
}

function isList(input: unknown): boolean {
  if (typeof input !== 'object' || input === null) return false
  return Symbol.iterator in input || typeof (input as ArrayLike<number>).length === 'number'
}
