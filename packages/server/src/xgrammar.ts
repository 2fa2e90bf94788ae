/** @file Loads @mlc-ai/web-xgrammar, an optional peer dependency that computes which tokens a grammar allows next. */
import { readFileSync } from 'node:fs'
import { createRequire, Module } from 'node:module'
import { ApiError } from './errors.ts'

export interface Handle {
  dispose(): void
}

export interface Matcher extends Handle {
  getNextTokenBitmask(): Promise<Int32Array>
  acceptToken(id: number): boolean
  isTerminated(): boolean
}

interface Grammar extends Handle {
  toString(): string
}

export interface Compiler extends Handle {
  compileStructuralTag(json: string): Promise<Handle>
}

/** The part of its API that the server uses. Its own type definitions require the DOM library. */
export interface XGrammar {
  readonly Grammar: {
    fromJSONSchema(
      schema: string,
      anyWhitespace: boolean,
      indent: undefined,
      separators: undefined,
      strict: boolean,
      mostWhitespace: number,
    ): Promise<Grammar>
  }
  readonly TokenizerInfo: {
    createTokenizerInfo(
      tokens: readonly Uint8Array[],
      kind: 'raw',
      prefixed: boolean,
      size: number,
      ends: readonly number[],
    ): Promise<Handle>
  }
  readonly GrammarCompiler: { createGrammarCompiler(info: Handle, cached: boolean): Promise<Compiler> }
  readonly GrammarMatcher: { createGrammarMatcher(compiled: Handle): Promise<Matcher> }
}

/** A CommonJS module in Node, including internals. */
interface Script {
  exports: XGrammar
  console: Console
  _compile(source: string, path: string, format: 'commonjs'): void
}

const { resolve } = createRequire(import.meta.url)

/**
 * Returns the path of the library.
 * @throws ApiError 400 if it is not installed
 */
export function findXGrammar(): string {
  try {
    return resolve('@mlc-ai/web-xgrammar')
  } catch (cause) {
    const message = 'structured output needs an optional package: on the server, run npm i @mlc-ai/web-xgrammar@0.1.27'
    throw new ApiError(400, message, { code: 'unsupported_parameter', cause })
  }
}

/**
 * Loads a new instance of the library, with its own memory.
 * @param log called with each line that the library writes to the console
 */
export function loadXGrammar(path: string, log: (line: string) => void): XGrammar {
  // The file is a CommonJS script in a package of ES modules, so neither import nor require can load it. Its console is replaced.
  const script = new Module(path) as unknown as Script
  const write = (...words: unknown[]) => log(words.join(' '))
  script.console = { ...console, log: write, warn: write, error: write }
  script._compile(`const { console } = module; ${readFileSync(path, 'utf8')}`, path, 'commonjs')
  return script.exports
}
