/** @file Tokenized data to train and evaluate on: token streams, and mixtures of several. */
import { isTokenStream, type TokenStream } from './token-stream.ts'

/** A source of a mixture's training data. */
export interface Source {
  /** Its name in reports. */
  readonly name: string
  /** Its tokens. */
  readonly data: TokenStream
  /** Its share of the rows, from 0 to 1. */
  readonly share: number
}

/** Training data from several sources. Created by `mixture`. */
export interface Mixture {
  /** The sources, in the order in which they were given. */
  readonly sources: readonly Source[]
}

/**
 * Data that is already tokenized: in memory (`TokenDataset`), on disk (`tokenFiles`), or from several sources
 * (`mixture`).
 */
export interface TokenData {
  /** Tokens to train on. */
  readonly training: TokenStream | Mixture
  /** Held-out tokens to evaluate on: one stream, or several by name, each evaluated separately. Default: none. */
  readonly validation?: TokenStream | Readonly<Record<string, TokenStream>>
}

/** The sources of training data. A single stream is a source without a name. */
export const sourcesOf = (training: TokenStream | Mixture): readonly Source[] =>
  isTokenStream(training) ? [{ name: '', data: training, share: 1 }] : training.sources

/** Whether this is tokenized data: a stream or a mixture. */
export const isTokens = (training: unknown): training is TokenStream | Mixture =>
  isTokenStream(training) || Array.isArray((training as Partial<Mixture> | undefined)?.sources)

/** Held-out streams with their names. A single stream has the name ''. */
export function namedStreams(validation: TokenData['validation']): (readonly [string, TokenStream])[] {
  if (validation === undefined) return []
  return isTokenStream(validation) ? [['', validation]] : Object.entries(validation)
}
