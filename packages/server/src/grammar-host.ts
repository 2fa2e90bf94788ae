/** @file Where grammars are made and texts are held to them: in memory of @mlc-ai/web-xgrammar, on this thread or another. */
import type { SupportedSchema } from './json-schema.ts'
import { INTEGER, NUMBER } from './number-range.ts'
import { THINK, THOUGHT } from './reasoning.ts'
import { type Compiler, type Handle, loadXGrammar, type Matcher, type XGrammar } from './xgrammar.ts'

/** A text as it is written, JSON of a schema, reasoning up to its end, which may have to be begun or not be there, or anything. */
export type FormPart =
  | string
  | SupportedSchema
  | { readonly thinking: 'begun' | 'perhaps' }
  | { readonly anything: true }

/** One of several sequences. */
export type Form = ReadonlyArray<readonly FormPart[]>

/** Makes grammars, and tells which tokens keep texts within them. Grammars and texts have numbers. */
export interface GrammarHost {
  /** @throws Error with what is wrong with the form; nothing more can be made there then, and texts that have begun go on */
  compile(form: Form): Promise<number>
  begin(grammar: number): Promise<number>
  /** What may come next in a text, behind this token: a bit for each, none behind its end. @throws Error for a token that may not */
  next(text: number, token: number | null): Promise<Int32Array>
  /** Forgets a text. */
  end(text: number): void
  /** Forgets all. */
  close(): void
}

/** What grammars are of. */
export interface Vocabulary {
  /** Of @mlc-ai/web-xgrammar. */
  readonly library: string
  /** Of all tokens, end to end. */
  readonly bytes: Uint8Array
  /** Where each ends. */
  readonly ends: Uint32Array
  /** Ids of the tokens that end a text. */
  readonly stops: readonly number[]
}

/** White space between two parts of JSON: without a bound, models that are unsure write it for ever. */
const MOST_WHITESPACE = 1

/** Grammars on the thread that calls. */
export class LocalGrammars implements GrammarHost {
  readonly #library: XGrammar
  readonly #compiler: Compiler
  /** What the library has said. */
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
      const sequences = await Promise.all(
        form.map(async parts => ({
          type: 'sequence',
          elements: await Promise.all(parts.map(part => this.#element(part))),
        })),
      )
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
    // Its text has ended meanwhile.
    if (matcher === undefined) return new Int32Array(0)
    if (token !== null && !matcher.acceptToken(token)) throw new Error(`token ${token} is not of the grammar`)
    return matcher.isTerminated() ? new Int32Array(0) : matcher.getNextTokenBitmask()
  }

  end(text: number): void {
    this.#texts.get(text)?.dispose()
    this.#texts.delete(text)
  }

  close(): void {
    for (const text of this.#texts.keys()) this.end(text)
  }

  async #element(part: FormPart): Promise<object> {
    if (typeof part === 'string') return { type: 'const_string', value: part }
    if ('anything' in part) return grammar('root ::= [^\\0]*')
    if ('thinking' in part) {
      const perhaps = part.thinking === 'perhaps'
      const thought = { type: 'tag', begin: perhaps ? THINK : '', content: { type: 'any_text' }, end: THOUGHT }
      const all = { type: 'sequence', elements: [thought, grammar('root ::= "\\n"{0,2}')] }
      return perhaps ? { type: 'or', elements: [grammar('root ::= ""'), all] } : all
    }
    const schema = JSON.stringify(part.schema)
    const made = await this.#library.Grammar.fromJSONSchema(schema, true, undefined, undefined, true, MOST_WHITESPACE)
    const text = made.toString()
    made.dispose()
    return grammar(corrected(text, part.rules))
  }
}

const grammar = (ebnf: string) => ({ type: 'grammar', grammar: ebnf })

/**
 * The grammar of a schema with its own rules, without numbers or white space for ever, and without control characters in strings of some length. It writes "éb" as "\xe9b",
 * and would read that as one character.
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
