/**
 * @file The tokenizer: converts text to ids and back. Created from tokenizer.json, from tiktoken ranks, or by training.
 */
import { type AddedToken, AddedTokenFinder, type Ignored } from './added-tokens.ts'
import type { EncodePool } from './batch/pool.ts'
import { BoundaryTable } from './bpe/boundary-table.ts'
import { Encoder, IdBuffer, PADDING } from './bpe/encoder.ts'
import { MergeTable } from './bpe/merge-table.ts'
import { PieceMerger } from './bpe/piece-merger.ts'
import { DecodeStream } from './decode-stream.ts'
import { TokenizerError } from './errors.ts'
import { type FeatureName, type Features, feature, loadFeatures } from './features.ts'
import { readAddedTokens } from './json/added-tokens.ts'
import { invalid, type JsonObject, unsupported } from './json/check.ts'
import { checkDecoder, needsNormalizer, parseFile } from './json/file.ts'
import { readModel, writeModel } from './json/model.ts'
import { type PostProcessor, readPostProcessor } from './json/post-processor.ts'
import { compilePreTokenizer, loadPreTokenizer } from './json/pre-tokenizer.ts'
import type { BpeModel } from './model.ts'
import type { Normalizer } from './normalizer.ts'
import { OffsetCollector } from './offsets.ts'
import type { DecodeOptions, EncodeOptions } from './options.ts'
import type { PreTokenizer } from './pre-tokenizer.ts'
import type { PreTokenizerName } from './pre-tokenizers.ts'
import type { TiktokenOptions } from './tiktoken.ts'
import { validation } from './validation.ts'

/** Ids with their positions in the text. */
export interface EncodingWithOffsets {
  /** The ids, as returned by `encode`. */
  readonly ids: Uint32Array
  /**
   * Start and end of token i at `2 * i` and `2 * i + 1`, in UTF-16 code units. Tokens that share a character all cover
   * it.
   */
  readonly offsets: Uint32Array
}

/** The components of a tokenizer.json other than the model, as in the file. */
export interface TokenizerParts {
  readonly normalizer?: unknown
  readonly pre_tokenizer: unknown
  readonly post_processor?: unknown
  readonly decoder?: unknown
}

const utf8 = new TextEncoder()

/** Minimum number of characters of a batch that uses threads by default, since each must first load the tokenizer. */
const MIN_THREADED_CHARACTERS = 1 << 23

/** Maximum size of the buffers that are kept between calls: bytes of text, or ids. */
const MAX_KEPT_SCRATCH = 1 << 20

/**
 * A byte-level BPE tokenizer, with the same ids as Hugging Face tokenizers. It is immutable. Create one with
 * `trainBpe`, `fromFile`, `fromJSON` or `fromTiktoken`.
 */
export class BpeTokenizer {
  readonly #model: BpeModel
  readonly #parts: TokenizerParts
  readonly #added: readonly AddedToken[]
  readonly #addedById = new Map<number, AddedToken>()
  readonly #addedBytes = new Map<number, Uint8Array>()
  readonly #idOfAdded = new Map<string, number>()
  readonly #post: PostProcessor
  readonly #normalizer: Normalizer | undefined
  readonly #preTokenizer: PreTokenizer
  readonly #encoder: Encoder
  /** Finds added tokens before normalization. */
  readonly #rawFinder: AddedTokenFinder
  /** Finds added tokens after normalization. */
  readonly #normalizedFinder: AddedTokenFinder
  readonly #out = new IdBuffer()
  #scratch = new Uint8Array(4096)
  #view = new DataView(this.#scratch.buffer)

  /** Number of ids: the largest plus one, including added tokens. */
  readonly vocabSize: number

  /** Use `trainBpe`, `BpeTokenizer.fromFile`, `fromJSON` or `fromTiktoken`. @internal */
  constructor(
    model: BpeModel,
    added: readonly AddedToken[],
    parts: TokenizerParts,
    preTokenizer: PreTokenizer = compilePreTokenizer(parts.pre_tokenizer),
  ) {
    this.#model = model
    this.#parts = parts
    this.#added = added
    let size = model.tokens.length
    for (const token of added) {
      if (token.id >= size) size = token.id + 1
      this.#addedById.set(token.id, token)
      this.#addedBytes.set(token.id, utf8.encode(token.content))
      this.#idOfAdded.set(token.content, token.id)
    }
    this.vocabSize = size
    this.#post = readPostProcessor(parts.post_processor, added, size)
    checkDecoder(parts.decoder)
    const normalizer = needsNormalizer(parts.normalizer) ? feature('normalizer')(parts.normalizer) : undefined
    this.#normalizer = normalizer
    this.#preTokenizer = preTokenizer
    const table = MergeTable.of(model.merges, model.byteToken, model.tokens.length)
    const merger = new PieceMerger(table, model.byteToken, model.options.unknown, model.options.fuseUnknown)
    const lookup = model.options.ignoreMerges
      ? new (feature('tokenLookup'))(model.bytes, model.starts, model.pieceLengths)
      : undefined
    this.#encoder = new Encoder(
      merger,
      this.#preTokenizer.scanner,
      lookup,
      () => new BoundaryTable(model.bytes, model.starts, model.lengths),
    )
    const contentOf = (token: AddedToken) => this.#addedBytes.get(token.id)!
    this.#rawFinder = new AddedTokenFinder(
      added.filter(token => !token.normalized),
      contentOf,
    )
    this.#normalizedFinder = new AddedTokenFinder(
      added.filter(token => token.normalized),
      normalizer ? token => utf8.encode(normalizer(token.content)) : contentOf,
    )
  }

  /**
   * Reads a tokenizer.json file. Requires a file system (Node, Deno, Bun); in a browser, fetch the file and use
   * `fromJSONAsync`.
   * @throws TokenizerError as `fromJSON`, and E_FORMAT if the file cannot be read
   */
  static async fromFile(path: string | URL): Promise<BpeTokenizer> {
    return BpeTokenizer.fromJSONAsync(await feature('files').readText(path))
  }

  /** As `fromJSON`; in browsers, it first fetches the code that the tokenizer needs. */
  static async fromJSONAsync(json: string | object): Promise<BpeTokenizer> {
    const file = parseFile(json)
    const names: FeatureName[] = []
    if (needsNormalizer(file.normalizer)) names.push('normalizer')
    if ((file.model as JsonObject | undefined)?.ignore_merges) names.push('tokenLookup')
    if (JSON.stringify(file.post_processor)?.includes('TemplateProcessing')) names.push('template')
    await Promise.all([loadPreTokenizer(file.pre_tokenizer), loadFeatures(...names)])
    return BpeTokenizer.fromJSON(file)
  }

  /**
   * Creates a tokenizer from the content of a tokenizer.json, as text or parsed.
   * @throws TokenizerError E_FORMAT for a corrupt file; E_UNSUPPORTED, naming the component, for features that this
   * package does not support or, in browsers, that require `fromJSONAsync`
   */
  static fromJSON(json: string | object): BpeTokenizer {
    const file = parseFile(json)
    if (file.model === undefined) throw invalid('model', 'is missing')
    for (const part of ['truncation', 'padding']) {
      if (file[part] !== undefined && file[part] !== null) {
        throw unsupported(part, `a ${part} policy`, `set "${part}" to null and apply it to the ids`)
      }
    }
    const model = readModel(file.model)
    return new BpeTokenizer(model, readAddedTokens(file.added_tokens, model), {
      normalizer: file.normalizer,
      pre_tokenizer: file.pre_tokenizer,
      post_processor: file.post_processor,
      decoder: file.decoder,
    })
  }

  /**
   * Creates a tokenizer from a rank file of tiktoken (`cl100k_base.tiktoken`: each line is a base64 token and its
   * rank).
   * @param options.preTokenizer the encoding's pattern, as a name, as tiktoken's `pat_str` (`{ pattern }`) or as a
   * RegExp
   * @param options.specialTokens ids of special tokens, by text
   */
  static fromTiktoken(
    ranks: string | Uint8Array | ReadonlyMap<number, Uint8Array>,
    options: TiktokenOptions,
  ): BpeTokenizer {
    return fromTiktokenFile(feature('tiktoken')(ranks, options, patternsOf))
  }

  /** As `fromTiktoken`; in browsers, it first fetches the code that the tokenizer needs. */
  static async fromTiktokenAsync(
    ranks: string | Uint8Array | ReadonlyMap<number, Uint8Array>,
    options: TiktokenOptions,
  ): Promise<BpeTokenizer> {
    validation.check?.('fromTiktoken', options, ranks)
    const { preTokenizer } = options
    await loadFeatures('tiktoken', 'tokenLookup', ...(typeof preTokenizer === 'string' ? [preTokenizer] : []))
    const file = feature('tiktoken')(ranks, options, patternsOf)
    await loadPreTokenizer(file.preTokenizer)
    return fromTiktokenFile(file)
  }

  /**
   * Encodes a text. Lone surrogates are treated as U+FFFD. Takes time linear in the length of any text, so large texts
   * can be passed whole.
   * @returns the ids, in a new array
   */
  encode(text: string, options: EncodeOptions = {}): Uint32Array {
    validation.check?.('encode', options)
    return this.#encode(text, options)
  }

  #encode(text: string, options: EncodeOptions, offsets?: OffsetCollector): Uint32Array {
    const out = this.#out
    out.length = 0
    const special = (ids: readonly number[]) => {
      if (options.addSpecialTokens === false) return
      for (const id of ids) {
        out.push(id)
        offsets?.add(0, 0)
      }
    }
    special(this.#post.before)
    this.#encodeText(text, ignoredBy(options), out, offsets)
    special(this.#post.after)
    const ids = out.ids.slice(0, out.length)
    if (out.ids.length > MAX_KEPT_SCRATCH) out.ids = new Uint32Array(256)
    return ids
  }

  /** @param offsets can only be collected for texts that the normalizer does not change */
  #encodeText(text: string, ignored: Ignored, out: IdBuffer, offsets?: OffsetCollector): void {
    const end = this.#load(text)
    // The finders search up to the end of their array.
    const bytes = this.#scratch.subarray(0, end)
    const normalizer = this.#normalizer
    const added = (token: AddedToken, from: number, to: number) => {
      out.push(token.id)
      offsets?.add(from, to)
    }
    let first = true
    const ordinary = (from: number, to: number) => this.#encodeSegment(from, to, first && from === 0, out, offsets)
    if (normalizer === undefined || offsets) {
      const normalized = (from: number, to: number) =>
        this.#normalizedFinder.split(bytes, from, to, ignored, ordinary, added)
      this.#rawFinder.split(bytes, 0, end, ignored, normalized, added)
    } else {
      const decoder = new TextDecoder('utf-8', { ignoreBOM: true })
      const segments: (string | AddedToken)[] = []
      this.#rawFinder.split(
        bytes,
        0,
        end,
        ignored,
        (from, to) => segments.push(decoder.decode(bytes.subarray(from, to))),
        token => segments.push(token),
      )
      segments.forEach((segment, i) => {
        if (typeof segment !== 'string') {
          out.push(segment.id)
          return
        }
        first = i === 0
        const length = this.#load(normalizer(segment))
        const inner = this.#scratch.subarray(0, length)
        this.#normalizedFinder.split(inner, 0, length, ignored, ordinary, added)
      })
    }
    if (this.#scratch.length > MAX_KEPT_SCRATCH) this.#resize(4096)
  }

  /** Encodes a part of the scratch buffer that contains no added tokens. */
  #encodeSegment(from: number, to: number, first: boolean, out: IdBuffer, offsets?: OffsetCollector): void {
    const prepared = this.#preTokenizer.prepare?.(this.#scratch, from, to, first)
    const { bytes, length, origin } = prepared ?? { bytes: this.#scratch, length: to }
    const view = prepared ? new DataView(bytes.buffer) : this.#view
    this.#encoder.encode(
      bytes,
      view,
      prepared ? 0 : from,
      length,
      out,
      offsets?.pieces(this.#model, out, bytes, origin),
    )
  }

  /**
   * Encodes a text and returns the position of each token.
   * @throws TokenizerError E_UNSUPPORTED if the normalizer changes the text, since positions are then lost
   */
  encodeWithOffsets(text: string, options: EncodeOptions = {}): EncodingWithOffsets {
    validation.check?.('encode', options)
    checkText(text)
    if (this.#normalizer !== undefined && this.#normalizer(text) !== text) {
      throw new TokenizerError({
        code: 'E_UNSUPPORTED',
        op: 'encodeWithOffsets',
        problem: 'the normalizer changes this text',
        fix: 'normalize the text first',
      })
    }
    const offsets = new OffsetCollector(text, this.#post.trimOffsets, this.#post.prefixSpace)
    return { ids: this.#encode(text, options, offsets), offsets: offsets.finish() }
  }

  /**
   * Encodes a text that arrives in parts, and yields ids in parts. Together they equal `encode` of the whole text
   * without the special tokens around it. Text is buffered up to a space between two ASCII letters, where pieces end
   * regardless of what follows. If the pre-tokenizer has no hand-written scanner, all of the text is buffered.
   */
  async *encodeStream(
    parts: AsyncIterable<string> | Iterable<string>,
    options: EncodeOptions = {},
  ): AsyncGenerator<Uint32Array> {
    const { splitStream } = await import('./encode-stream.ts')
    const plain = { ...options, addSpecialTokens: false }
    const added = this.#preTokenizer.prepare === undefined ? this.#added : undefined
    for await (const text of splitStream(parts, added)) yield this.encode(text, plain)
  }

  /**
   * Encodes many texts, using worker threads if they are available and the batch is large enough. Results equal those
   * of `encode`.
   * @param options.threads number of threads for this batch; default one per core; 0 or 1 uses the calling thread.
   * Threads are kept for later batches.
   */
  async encodeBatch(
    texts: readonly string[],
    options: EncodeOptions & { readonly threads?: number } = {},
  ): Promise<Uint32Array[]> {
    validation.check?.('encodeBatch', options, texts)
    const { threads, ...encodeOptions } = options
    const size = texts.reduce((sum, text) => sum + text.length, 0)
    if (threads === undefined ? size < MIN_THREADED_CHARACTERS : threads < 2)
      return texts.map(text => this.encode(text, encodeOptions))
    this.#pool ??= import('./batch/pool.ts').then(({ EncodePool }) => new EncodePool(() => JSON.stringify(this)))
    const ids = await (await this.#pool).encode(texts, encodeOptions, threads)
    return ids ?? texts.map(text => this.encode(text, encodeOptions))
  }
  #pool: Promise<EncodePool> | undefined

  /** Writes a text as UTF-8 to the scratch buffer and returns its length. */
  #load(text: string): number {
    checkText(text)
    const need = text.length * 3 + PADDING
    if (need > this.#scratch.length)
      this.#resize(need < MAX_KEPT_SCRATCH ? Math.max(need, this.#scratch.length * 2) : need)
    return utf8.encodeInto(text, this.#scratch).written
  }

  #resize(bytes: number): void {
    this.#scratch = new Uint8Array(bytes)
    this.#view = new DataView(this.#scratch.buffer)
  }

  /**
   * Decodes ids. Invalid UTF-8 becomes U+FFFD, as in Hugging Face tokenizers.
   * @throws TokenizerError E_UNKNOWN_TOKEN for an id outside the vocabulary
   */
  decode(ids: Iterable<number>, options: DecodeOptions = {}): string {
    validation.check?.('decode', options, ids)
    const skip = options.skipSpecialTokens ?? false
    const list = 'length' in ids ? (ids as unknown as ArrayLike<number>) : Array.from(ids)
    let bytes = new Uint8Array(list.length * 6 + 64)
    let at = 0
    for (let i = 0; i < list.length; i++) {
      const id = list[i]
      const token = this.#bytesOf(id, skip)
      if (at + token.length > bytes.length) {
        const grown = new Uint8Array(Math.max(bytes.length * 2, at + token.length))
        grown.set(bytes.subarray(0, at))
        bytes = grown
      }
      if (token.length < 32) for (let b = 0; b < token.length; b++) bytes[at + b] = token[b]
      else bytes.set(token, at)
      at += token.length
    }
    return new TextDecoder('utf-8', { ignoreBOM: true }).decode(bytes.subarray(0, at))
  }

  /** Creates a decoder for ids that arrive one at a time. It only returns complete characters. */
  createDecodeStream(options: DecodeOptions = {}): DecodeStream {
    validation.check?.('decode', options, [])
    const skip = options.skipSpecialTokens ?? false
    return new DecodeStream(id => this.#bytesOf(id, skip))
  }

  #bytesOf(id: number, skipSpecial: boolean): Uint8Array {
    const added = this.#addedById.get(id)
    if (added !== undefined) return skipSpecial && added.special ? EMPTY : this.#addedBytes.get(id)!
    if (this.#model.tokens[id] === undefined) {
      throw new TokenizerError({
        code: 'E_UNKNOWN_TOKEN',
        op: 'decode',
        problem: `unknown id ${id}, the vocabulary has ${this.vocabSize} ids`,
        details: { id, vocabSize: this.vocabSize },
      })
    }
    return this.#model.bytesOf(id)
  }

  /** Returns the bytes of a token, for example to count bits per byte. Do not modify them. */
  tokenBytes(id: number): Uint8Array {
    return this.#bytesOf(id, false)
  }

  /** Returns the id of a token: an added token by its text, others in the byte alphabet (`Ġthe`). */
  tokenToId(token: string): number | undefined {
    return this.#idOfAdded.get(token) ?? this.#model.idOf.get(token)
  }

  /** Returns the token of an id; the inverse of `tokenToId`. */
  idToToken(id: number): string | undefined {
    return this.#addedById.get(id)?.content ?? this.#model.tokens[id]
  }

  /** Added tokens, sorted by id. */
  get addedTokens(): readonly AddedToken[] {
    return this.#added
  }

  /** Number of merges. */
  get mergeCount(): number {
    return this.#model.merges.length / 3
  }

  /** The pre-tokenizer: the name of a hand-written scanner, or `steps` if it is interpreted, which is slower. */
  get preTokenizer(): string {
    return this.#preTokenizer.name
  }

  /** Returns the content of a tokenizer.json, which Hugging Face tokenizers can open. */
  toJSON(): Record<string, unknown> {
    return {
      version: '1.0',
      truncation: null,
      padding: null,
      added_tokens: this.#added,
      normalizer: this.#parts.normalizer ?? null,
      pre_tokenizer: this.#parts.pre_tokenizer,
      post_processor: this.#parts.post_processor ?? null,
      decoder: this.#parts.decoder ?? {
        type: 'ByteLevel',
        add_prefix_space: true,
        trim_offsets: true,
        use_regex: true,
      },
      model: writeModel(this.#model),
    }
  }

  /** Writes tokenizer.json, completely or not at all. Requires a file system. @throws TokenizerError E_FORMAT */
  async save(path: string | URL): Promise<void> {
    await feature('files').writeText(path, `${JSON.stringify(this.toJSON())}\n`)
  }
}

const EMPTY = new Uint8Array(0)

const patternsOf = (name: PreTokenizerName) => feature(name).patterns

const fromTiktokenFile = ({ model, added, preTokenizer }: ReturnType<Features['tiktoken']>): BpeTokenizer =>
  new BpeTokenizer(model, readAddedTokens(added, model), { pre_tokenizer: preTokenizer })

function checkText(text: unknown): void {
  if (typeof text !== 'string')
    throw new TokenizerError({ code: 'E_DATA', op: 'encode', problem: `expected a string, got ${typeof text}` })
}

const ignoredBy = ({ parseSpecialTokens = true, parseAddedTokens = true }: EncodeOptions): Ignored =>
  parseAddedTokens ? (parseSpecialTokens ? 0 : 1) : 2
