/** @file Compiles grammars and constrains texts to them with an instance of @mlc-ai/web-xgrammar, on the calling thread. */
import type { SupportedSchema } from './json-schema.ts'
import { INTEGER, NUMBER } from './number-range.ts'
import { THINK_END, THINK_START } from './reasoning.ts'
import { type Compiler, type Handle, loadXGrammar, type Matcher, type XGrammar } from './xgrammar.ts'

/** A tool call in a text: what it consists of, from the marker of calls on. */
export interface CallForm {
  readonly begin: string
  readonly content: readonly FormPart[]
  readonly end: string
}

/**
 * Part of a form: a literal string; JSON that matches a schema; reasoning up to and including its end, either already open or optional; any text; or, only as the last
 * part of a form without alternatives, any text in which everything that begins with a marker is one of the calls.
 */
export type FormPart =
  | string
  | SupportedSchema
  | { readonly thinking: 'open' | 'optional' }
  | { readonly anything: true }
  | { readonly marker: string; readonly calls: readonly CallForm[] }

/** Alternatives, each a sequence of parts. */
export type Form = ReadonlyArray<readonly FormPart[]>

/** Compiles grammars and determines which tokens they allow next in a text. Grammars and texts are identified by numbers. */
export interface GrammarHost {
  /** @throws Error if the form is invalid; the host then cannot compile any more, but texts that have started continue */
  compile(form: Form): Promise<number>
  begin(grammar: number): Promise<number>
  /**
   * Appends a token to a text (null: none yet) and returns the tokens that may follow, as a bit mask; empty after the end of the text.
   * @throws Error if the grammar does not allow the token
   */
  next(text: number, token: number | null): Promise<Int32Array>
  /** Frees a text. */
  end(text: number): void
  /** Frees everything. */
  close(): void
}

/** The tokens that texts consist of. */
export interface Vocabulary {
  /** Path of @mlc-ai/web-xgrammar. */
  readonly library: string
  /** The bytes of all tokens, concatenated. */
  readonly bytes: Uint8Array
  /** The end of each token in `bytes`. */
  readonly ends: Uint32Array
  /** Ids of the tokens that end a text. */
  readonly stops: readonly number[]
}

/** Maximum white space between two parts of JSON. Without a limit, models may generate it endlessly. */
const MAX_WHITESPACE = 1

/** Runs on the calling thread. */
export class LocalGrammars implements GrammarHost {
  readonly #library: XGrammar
  readonly #compiler: Compiler
  /** The last lines that the library wrote to the console, which contain the reasons of errors. */
  readonly #lines: string[]
  readonly #grammars: Handle[] = []
  readonly #texts = new Map<number, Matcher>()
  #begun = 0

  private constructor(library: XGrammar, compiler: Compiler, lines: string[]) {
    this.#library = library
    this.#compiler = compiler
    this.#lines = lines
  }

  static async open({ library: path, bytes, ends, stops }: Vocabulary): Promise<LocalGrammars> {
    const lines: string[] = []
    const library = loadXGrammar(path, line => {
      if (lines.push(line) > 100) lines.shift()
    })
    const tokens = Array.from(ends, (end, id) => bytes.subarray(id === 0 ? 0 : ends[id - 1], end))
    const info = await library.TokenizerInfo.createTokenizerInfo(tokens, 'raw', false, tokens.length, stops)
    return new LocalGrammars(library, await library.GrammarCompiler.createGrammarCompiler(info, false), lines)
  }

  async compile(form: Form): Promise<number> {
    try {
      const sequences = await Promise.all(form.map(parts => this.#sequence(parts)))
      const tag = { type: 'structural_tag', format: { type: 'or', elements: sequences } }
      return this.#grammars.push(await this.#compiler.compileStructuralTag(JSON.stringify(tag))) - 1
    } catch (cause) {
      const said = this.#lines.findLast(line => line.startsWith('[FATAL]'))
      throw new Error(said?.replace(/^.*\.cc:\d+: (Check failed: .* is false: )?/, '') ?? (cause as Error).message)
    }
  }

  async begin(grammar: number): Promise<number> {
    this.#texts.set(this.#begun, await this.#library.GrammarMatcher.createGrammarMatcher(this.#grammars[grammar]))
    return this.#begun++
  }

  async next(text: number, token: number | null): Promise<Int32Array> {
    const matcher = this.#texts.get(text)
    // The text was ended in the meantime.
    if (matcher === undefined) return new Int32Array(0)
    if (token !== null && !matcher.acceptToken(token)) throw new Error(`the grammar does not allow token ${token}`)
    return matcher.isTerminated() ? new Int32Array(0) : matcher.getNextTokenBitmask()
  }

  end(text: number): void {
    this.#texts.get(text)?.dispose()
    this.#texts.delete(text)
  }

  close(): void {
    for (const text of this.#texts.keys()) this.end(text)
  }

  async #sequence(parts: readonly FormPart[]): Promise<object> {
    return { type: 'sequence', elements: await Promise.all(parts.map(part => this.#element(part))) }
  }

  async #element(part: FormPart): Promise<object> {
    if (typeof part === 'string') return { type: 'const_string', value: part }
    if ('anything' in part) return grammar('root ::= [^\\0]*')
    if ('thinking' in part) {
      const optional = part.thinking === 'optional'
      const thought = { type: 'tag', begin: optional ? THINK_START : '', content: { type: 'any_text' }, end: THINK_END }
      const all = { type: 'sequence', elements: [thought, grammar('root ::= "\\n"{0,2}')] }
      return optional ? { type: 'or', elements: [grammar('root ::= ""'), all] } : all
    }
    if ('calls' in part) {
      const tags = part.calls.map(async ({ begin, content, end }) => {
        return { type: 'tag', begin, content: await this.#sequence(content), end }
      })
      return { type: 'triggered_tags', triggers: [part.marker], tags: await Promise.all(tags) }
    }
    const schema = JSON.stringify(part.schema)
    const made = await this.#library.Grammar.fromJSONSchema(schema, true, undefined, undefined, true, MAX_WHITESPACE)
    const text = made.toString()
    made.dispose()
    return grammar(corrected(text, part.rules))
  }
}

const grammar = (ebnf: string) => ({ type: 'grammar', grammar: ebnf })

/**
 * Corrects the grammar that the library generates for a schema: inserts our rules, limits numbers and white space, and excludes control characters from strings with length
 * limits. Also, the library writes "éb" as "\xe9b", which it would read back as one character.
 */
function corrected(grammar: string, rules: SupportedSchema['rules']): string {
  const named = grammar
    .replace(/^basic_integer ::= .*$/m, () => `basic_integer ::= ${INTEGER}`)
    .replace(/^basic_number ::= .*$/m, () => `basic_number ::= ${NUMBER}`)
    .replaceAll('[ \\n\\t]*', '[ \\n\\t]?')
    .replaceAll('[^\\"\\\\\\r\\n]', '[^\\0-\\x1f\\"\\\\]')
    .replaceAll(/\\x([0-9a-f]{2})/g, '\\u00$1')
  const lines = Object.values(rules).flatMap(rule => rule.lines)
  const whole = Object.entries(rules).reduce(
    (text, [place, { name }]) => text.replaceAll(`"\\"${place}\\""`, name),
    named,
  )
  return [whole, ...lines].join('\n')
}
