/** @file Forms that texts can be held to. */
import type { AllowedTokens, TokenConstraint } from '@moe/deepseek'
import type { BpeTokenizer } from '@moe/tokenizer-bpe'
import { ApiError } from './errors.ts'
import { placeOf, type SupportedSchema } from './json-schema.ts'
import { INTEGER, NUMBER } from './number-range.ts'
import { type Compiler, type Handle, loadXGrammar, type Matcher, type XGrammar } from './xgrammar.ts'

/** A text as it is written, or JSON of a schema. */
export type FormPart = string | SupportedSchema

/** One of several sequences. */
export type Form = ReadonlyArray<readonly FormPart[]>

/** White space between two parts of JSON: without a bound, models that are unsure write it for ever. */
const MOST_WHITESPACE = 1

/** Characters of texts with lengths times the vocabulary: each takes about half a microsecond a token, in which the server does nothing else. */
const MOST_LENGTHS = 2 ** 22

/** Grammars of an instance, whose memory only grows. */
const MOST_GRAMMARS = 64

interface Instance {
  readonly library: XGrammar
  readonly compiler: Compiler
  readonly grammars: Map<string, Handle>
  /** What it has said. */
  readonly lines: string[]
}

/** Constraints for the texts of one tokenizer, by @mlc-ai/web-xgrammar, which is loaded when the first is asked for. */
export class Grammars {
  readonly #tokenizer: BpeTokenizer
  readonly #ends: readonly number[]
  readonly #written: string
  #instance: Promise<Instance> | undefined

  /**
   * @param ends ids of the tokens that end a text
   * @param written text of which control tokens may be in a form
   */
  constructor(tokenizer: BpeTokenizer, ends: readonly number[], written = '') {
    this.#tokenizer = tokenizer
    this.#ends = ends
    this.#written = written
  }

  /**
   * A constraint for each of so many texts.
   * @param param field of the request that asks for it
   * @throws ApiError 400 where there is no grammar of it, or no library
   */
  async constraints(form: Form, count: number, param: string): Promise<FormConstraint[]> {
    if (this.#ends.length === 0)
      throw new ApiError(
        400,
        `${param}: this model has no token that ends a text: its config.json needs eos_token_id`,
        { param },
      )
    const parts = form.flat().filter(part => typeof part !== 'string')
    const characters = parts.reduce((sum, part) => sum + part.characters, 0)
    const most = Math.floor(MOST_LENGTHS / this.#tokenizer.vocabSize)
    if (characters > most) {
      const message = `${param}: minLength and maxLength add up to ${characters}, with this model's vocabulary to ${most} at most`
      throw new ApiError(400, `${message}: leave them out where they are large`, { param })
    }
    this.#instance ??= open(this.#tokenizer, this.#ends, this.#written)
    const { library, grammars, compiler, lines } = await this.#instance.catch(error => {
      this.#instance = undefined
      throw error
    })
    const key = JSON.stringify(form)
    try {
      const grammar = grammars.get(key) ?? (await compile(library, compiler, form))
      grammars.set(key, grammar)
      if (grammars.size >= MOST_GRAMMARS) this.#instance = undefined
      const all: FormConstraint[] = []
      while (all.length < count)
        all.push(new FormConstraint(await library.GrammarMatcher.createGrammarMatcher(grammar)))
      return all
    } catch (cause) {
      // It ends where it fails, with its stack as it was then. Texts that have begun go on.
      this.#instance = undefined
      const reason = lines
        .findLast(line => line.startsWith('[FATAL]'))
        ?.replace(/^.*\.cc:\d+: (Check failed: .* is false: )?/, '')
      const message = `${param}: no grammar can be made of it: ${reason ?? (cause as Error).message}`
      throw new ApiError(400, message.slice(0, 500), { param, cause })
    }
  }
}

async function open(tokenizer: BpeTokenizer, ends: readonly number[], written: string): Promise<Instance> {
  const lines: string[] = []
  const library = loadXGrammar(line => {
    if (lines.push(line) > 100) lines.shift()
  })
  const none = new Uint8Array(0)
  const added = new Set(tokenizer.addedTokens.flatMap(({ id, content }) => (written.includes(content) ? [] : id)))
  const tokens = Array.from({ length: tokenizer.vocabSize }, (_, id) => {
    // What is added, such as control tokens, is no part of JSON.
    if (added.has(id) || tokenizer.idToToken(id) === undefined) return none
    const bytes = tokenizer.tokenBytes(id)
    // Nor are control characters, which it would allow in strings of some length; line feeds it would not.
    return bytes.some(byte => byte < 0x20 && byte !== 0x0a) ? none : bytes
  })
  const info = await library.TokenizerInfo.createTokenizerInfo(tokens, 'raw', false, tokens.length, ends)
  const compiler = await library.GrammarCompiler.createGrammarCompiler(info, false)
  return { library, compiler, grammars: new Map(), lines }
}

async function compile(library: XGrammar, compiler: Compiler, form: Form) {
  const partOf = async (part: FormPart) => {
    if (typeof part === 'string') return { type: 'const_string', value: part }
    const schema = JSON.stringify(part.schema)
    const grammar = await library.Grammar.fromJSONSchema(schema, true, undefined, undefined, true, MOST_WHITESPACE)
    const text = grammar.toString()
    grammar.dispose()
    return { type: 'grammar', grammar: corrected(text, part.rules) }
  }
  const sequences = await Promise.all(
    form.map(async parts => ({ type: 'sequence', elements: await Promise.all(parts.map(partOf)) })),
  )
  const tag = { type: 'structural_tag', format: { type: 'or', elements: sequences } }
  return compiler.compileStructuralTag(JSON.stringify(tag))
}

/** The grammar of a schema with its own rules, and without numbers or white space for ever. */
function corrected(grammar: string, rules: readonly string[]): string {
  const named = grammar
    .replace(/^basic_integer ::= .*$/m, () => `basic_integer ::= ${INTEGER}`)
    .replace(/^basic_number ::= .*$/m, () => `basic_number ::= ${NUMBER}`)
    .replaceAll('[ \\n\\t]*', '[ \\n\\t]?')
  return rules.reduce((text, rule, i) => text.replaceAll(`"\\"${placeOf(i)}\\""`, `(${rule})`), named)
}

/** Holds one text to a form. */
export class FormConstraint implements TokenConstraint {
  readonly #matcher: Matcher

  /** Use `Grammars.constraints`. */
  constructor(matcher: Matcher) {
    this.#matcher = matcher
  }

  allowed(): Promise<AllowedTokens> {
    return this.#matcher.getNextTokenBitmask()
  }

  accept(token: number): void {
    if (!this.#matcher.acceptToken(token)) throw new Error(`token ${token} is not of the grammar`)
  }

  /** Frees what it holds, when its text is made. */
  dispose(): void {
    this.#matcher.dispose()
  }
}
