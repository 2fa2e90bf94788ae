/** @file The queries that tasks make to a model. */
import { MoeError, type Precision } from '@moe/core'
import type { ContinuousBatch, ContinuousBatchOptions, DeepSeek, Generation, TextTurnOptions } from '@moe/deepseek'
import { type EvaluationTokenizer, type Scored, TextEncoder } from './encode.ts'
import type { Likelihood, ModelQueries } from './scorers.ts'

/** A model that can be evaluated, such as a `DeepSeek`. */
export interface EvaluatedModel {
  /** The context length, and the token at the start of texts. */
  readonly config: { readonly max_position_embeddings: number; readonly bos_token_id?: number | null | undefined }
  /** Ids of the tokens that end a text. */
  readonly endTokens: readonly number[]
  /** Returns log-probabilities of texts, as `DeepSeek.score` does. */
  score: DeepSeek['score']
  /** Generates texts, as `DeepSeek.continuousBatch` does. Only generation tasks use it. */
  continuousBatch(options?: ContinuousBatchOptions): Pick<ContinuousBatch, 'generate' | 'dispose'>
}

/** Maximum number of tokens that are scored at a time. */
const MAX_TOKENS = 2 ** 21

interface QueryOptions {
  readonly tokenizer: EvaluationTokenizer
  readonly bos?: number | null
  readonly prefix?: number
  readonly precision?: Precision
  readonly maxTexts?: number
  readonly signal?: AbortSignal
}

export const abortedBy = (signal: AbortSignal): MoeError =>
  new MoeError({ code: 'E_ABORTED', op: 'evaluateTask', problem: 'aborted by its signal', cause: signal.reason })

export class BatchedQueries implements ModelQueries {
  readonly encoder: TextEncoder
  readonly #model: EvaluatedModel
  readonly #options: QueryOptions
  /** Called with the fraction of the current queries that is done. */
  onProgress: (done: number) => void = () => undefined

  constructor(model: EvaluatedModel, options: QueryOptions) {
    this.#model = model
    this.#options = options
    const { max_position_embeddings: context, bos_token_id: configured } = model.config
    const { tokenizer, bos, prefix = configured ?? model.endTokens[0] } = options
    this.encoder = new TextEncoder({ tokenizer, context, bos, prefix })
  }

  async score(texts: readonly Scored[], greedy: boolean): Promise<Likelihood[]> {
    const result: Likelihood[] = []
    for (const some of parts(texts)) {
      const onProgress = (done: number) => this.onProgress((result.length + done * some.length) / texts.length)
      result.push(...(await this.#scorePart(some, greedy, onProgress)))
    }
    return result
  }

  async #scorePart(
    texts: readonly Scored[],
    greedy: boolean,
    onProgress: (done: number) => void,
  ): Promise<Likelihood[]> {
    const { precision, signal } = this.#options
    const scores = await this.#model.score(
      texts.map(({ ids }) => ids),
      {
        from: texts.map(({ from }) => from),
        top: greedy ? 1 : 0,
        precision,
        signal,
        onProgress,
      },
    )
    return scores.map((all, i) => {
      const tokens = all.slice(texts[i].from).flatMap(one => one ?? [])
      return {
        logProb: tokens.reduce((sum, { logProb }) => sum + logProb, 0),
        greedy: greedy && tokens.every(({ token, top }) => top[0].token === token),
      }
    })
  }

  async generate(
    prompts: ReadonlyArray<readonly number[]>,
    options: Pick<TextTurnOptions, 'maxTokens' | 'stop'>,
  ): Promise<string[]> {
    const { tokenizer, precision, signal, maxTexts } = this.#options
    const batch = this.#model.continuousBatch({ precision, maxTexts })
    let done = 0
    try {
      return await Promise.all(
        prompts.map(async prompt => {
          const text = await textOf(batch.generate(prompt, { ...options, tokenizer, signal }))
          this.onProgress(++done / prompts.length)
          return text
        }),
      )
    } finally {
      batch.dispose()
    }
  }
}

/** Parts of the texts with a limited number of tokens, since the log-probability of a token takes about 100 bytes until they are summed up. */
function* parts(texts: readonly Scored[]): Generator<readonly Scored[]> {
  let start = 0
  let tokens = 0
  for (const [i, { ids }] of texts.entries()) {
    if (i > start && tokens + ids.length > MAX_TOKENS) {
      yield texts.slice(start, i)
      start = i
      tokens = 0
    }
    tokens += ids.length
  }
  if (start < texts.length) yield texts.slice(start)
}

async function textOf(generation: Generation<string>): Promise<string> {
  let text = ''
  for await (const part of generation) text += part
  return text
}
