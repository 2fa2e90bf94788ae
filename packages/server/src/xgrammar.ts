/** @file @mlc-ai/web-xgrammar, an optional peer: which tokens keep a text within a grammar. */
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

/** What is used of it. Its own types are of a library for browsers. */
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

/** What Node makes of a file. */
interface Script {
  exports: XGrammar
  console: Console
  _compile(source: string, path: string, format: 'commonjs'): void
}

const { resolve } = createRequire(import.meta.url)

/**
 * Where it is.
 * @throws ApiError 400 where it is not installed
 */
export function findXGrammar(): string {
  try {
    return resolve('@mlc-ai/web-xgrammar')
  } catch (cause) {
    const message = 'this server has no grammars: where it runs, npm i @mlc-ai/web-xgrammar@0.1.27'
    throw new ApiError(400, message, { code: 'unsupported_parameter', cause })
  }
}

/**
 * Another instance of it, with memory of its own.
 * @param say is given what it would write to the console
 */
export function loadXGrammar(path: string, say: (line: string) => void): XGrammar {
  // It is a script in a package of modules, which neither import nor require reads; its console is another.
  const script = new Module(path) as unknown as Script
  const log = (...words: unknown[]) => say(words.join(' '))
  script.console = { ...console, log, warn: log, error: log }
  script._compile(`const { console } = module; ${readFileSync(path, 'utf8')}`, path, 'commonjs')
  return script.exports
}
