/** @file What a call is asked first: mostly whether anybody reads its options. Who writes JavaScript, or spreads objects, learns it from no compiler. */
import type { ChatOptions } from './data/chat-template.ts'
import type { FillInTheMiddleOptions } from './data/fill-in-the-middle.ts'
import type { PackOptions } from './data/pack-documents.ts'
import type { SplitTokensOptions } from './data/split-tokens.ts'
import { TokenizerError } from './errors.ts'
import { describe } from './json/check.ts'
import type { TiktokenOptions } from './tiktoken.ts'
import type { DecodeOptions, EncodeOptions } from './tokenizer.ts'
import type { TrainOptions } from './train/train.ts'

/** The options of everything that takes some. */
export interface OptionsByOp {
  readonly trainBpe: TrainOptions
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

/** All their names: an object that lacks one, or has another, does not compile. */
const names: { readonly [Op in keyof OptionsByOp]: { readonly [Name in keyof OptionsByOp[Op]]-?: true } } = {
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

/** What is no input of an op: what it is called, and whether something is one. */
const inputs: { readonly [Op in keyof OptionsByOp]?: readonly [name: string, is: (input: unknown) => boolean] } = {
  encodeBatch: ['list of texts', input => Array.isArray(input) && input.every(text => typeof text === 'string')],
  decode: ['list of ids', isList],
}

function isList(input: unknown): boolean {
  if (typeof input !== 'object' || input === null) return false
  return Symbol.iterator in input || typeof (input as ArrayLike<number>).length === 'number'
}

/**
 * Refuses options that are no object, and names that nobody reads; what is undefined is not given.
 * @throws TokenizerError E_CONFIG, and E_DATA for an input of another kind
 */
export function checkCall<Op extends keyof OptionsByOp>(op: Op, options: OptionsByOp[Op], input?: unknown): void {
  const known: object = names[op]
  const refused = (problem: string) =>
    new TokenizerError({ code: 'E_CONFIG', op, problem, fix: `there are ${Object.keys(known).join(', ')}` })
  if (typeof options !== 'object' || !options) throw refused(`the options are ${describe(options)}`)
  for (const name in options) {
    if (!Object.hasOwn(known, name) && options[name] !== undefined) throw refused(`there is no option ${name}`)
  }
  const [wanted, is] = inputs[op] ?? []
  if (is?.(input) === false) {
    const problem = `got ${describe(input)}, no ${wanted}`
    throw new TokenizerError({ code: 'E_DATA', op, problem, fix: 'pass them in an array, and await what is a promise' })
  }
}
