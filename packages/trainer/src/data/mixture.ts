/** @file Several sources of tokens in fixed proportions. */
import { checkOptions, MoeError, shown } from '@moe/core'
import type { TokenData } from '../options.ts'
import { isTokenStream, type TokenStream } from './token-stream.ts'

/** A stream of tokens that is a part of what is trained on. */
export interface Source {
  /** What it is called in reports. */
  readonly name: string
  /** Its tokens. */
  readonly data: TokenStream
  /** Its share of the rows, of 1. */
  readonly share: number
}

/** Sources, each of which gives its share of the rows. */
export interface Mixture {
  /** In the order in which they were given. */
  readonly sources: readonly Source[]
}

/** A source of a mixture. */
export interface MixturePart {
  /** What `tokenFiles` gives, or other token data. What it holds out is measured on by the source's name. */
  readonly data: Omit<TokenData, 'training'> & { readonly training: TokenStream }
  /** Its share of the rows, in proportion to the weights of the others. */
  readonly weight: number
}

/**
 * Data of several sources, such as `mixture({ web: { data: tokenFiles('web'), weight: 4 }, code: { data: tokenFiles('code'), weight: 1 } })`. Which source a row comes from
 * is a function of its place alone, and any stretch of rows has the proportions of the weights, but for a row or two. Each source has epochs of its own.
 * @throws MoeError E_CONFIG for weights that are not positive numbers
 */
export function mixture(parts: Readonly<Record<string, MixturePart>>): TokenData {
  const given = Object.entries(parts ?? {})
  if (given.length === 0) throw refusal(`the sources are ${shown(parts)}`, 'name some: { web: { data, weight: 1 } }')
  const validation: [string, TokenStream][] = []
  for (const [name, part] of given) {
    checkOptions('mixture', part, { data: true, weight: true })
    const { data, weight } = part
    if (!(Number.isFinite(weight) && weight > 0))
      throw refusal(`the weight of ${name} is ${shown(weight)}`, 'give a positive number; leave out what is not wanted')
    if (!isTokenStream(data?.training)) {
      const fix = 'pass { data: tokenFiles(folder), weight }, or { training: TokenDataset.fromTexts(texts, tokenizer) }'
      throw refusal(`the data of ${name} has no tokens to train on`, fix)
    }
    for (const [part, stream] of namedStreams(data.validation))
      validation.push([part ? `${name}.${part}` : name, stream])
  }
  const sum = given.reduce((total, [, { weight }]) => total + weight, 0)
  const sources = given.map(([name, { data, weight }]) => ({ name, data: data.training, share: weight / sum }))
  return { training: { sources }, ...(validation.length > 0 && { validation: Object.fromEntries(validation) }) }
}

/** The sources of what is trained on: a stream by itself is one without a name. */
export const sourcesOf = (training: TokenStream | Mixture): readonly Source[] =>
  isTokenStream(training) ? [{ name: '', data: training, share: 1 }] : training.sources

/** Whether these are tokens, of one source or of several. */
export const isTokens = (training: unknown): training is TokenStream | Mixture =>
  isTokenStream(training) || Array.isArray((training as Partial<Mixture> | undefined)?.sources)

/** Held-out streams with their names; one by itself has none. */
export function namedStreams(validation: TokenData['validation']): (readonly [string, TokenStream])[] {
  if (validation === undefined) return []
  return isTokenStream(validation) ? [['', validation]] : Object.entries(validation)
}

const refusal = (problem: string, fix: string) => new MoeError({ code: 'E_CONFIG', op: 'mixture', problem, fix })
