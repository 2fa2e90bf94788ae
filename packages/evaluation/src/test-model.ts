/** @file For tests only: a character tokenizer, and a model with known probabilities. */
import type { Generation, TextTurnOptions, TokenLogProb } from '@moe/deepseek'
import type { EvaluatedModel, EvaluationTokenizer } from './index.ts'

/** A tokenizer with one token for each character: its code point. */
export const characters: EvaluationTokenizer = {
  encode: text => Array.from(text, character => character.codePointAt(0) as number),
  createDecodeStream: () => ({ push: id => String.fromCodePoint(id), end: () => '' }),
}

export const textOf = (ids: Iterable<number>): string => String.fromCodePoint(...ids)

/** The known probabilities: the log-probability of a character after a text, and the most likely one. */
export interface Known {
  readonly context?: number
  logProb(before: string, next: string): number
  /** Default: a space. */
  likeliest?(before: string): string
}

/** A model with known probabilities. Records its queries: the context and the scored text, which is empty for generation. */
export function knownModel({ context = 1000, logProb, likeliest = () => ' ' }: Known) {
  const queries: Array<[context: string, scored: string]> = []
  const model: EvaluatedModel = {
    config: { max_position_embeddings: context },
    endTokens: [0],
    async score(texts, { from = [], top = 0, signal, onProgress } = {}) {
      signal?.throwIfAborted()
      const result = texts.map((ids, i) => {
        const text = textOf(Array.from(ids))
        const first = Math.max(1, from[i] ?? 1)
        queries.push([text.slice(0, first), text.slice(first)])
        return Array.from(ids, (token, at): TokenLogProb | null => {
          if (at < first) return null
          const before = text.slice(0, at)
          const best = { token: likeliest(before).codePointAt(0) as number, logProb: 0 }
          return { token, logProb: logProb(before, text[at]), top: top > 0 ? [best] : [] }
        })
      })
      onProgress?.(1)
      return result
    },
    continuousBatch: () => ({
      dispose: () => undefined,
      generate: ((ids: ArrayLike<number>, { maxTokens = 0, stop = [] }: TextTurnOptions) => {
        const prompt = textOf(Array.from(ids))
        queries.push([prompt, ''])
        async function* generate() {
          let text = ''
          while (text.length < maxTokens) {
            text += likeliest(prompt + text)
            if (text.endsWith('\0')) break
          }
          const ends = [...stop, '\0'].map(end => text.indexOf(end as string)).filter(at => at >= 0)
          yield text.slice(0, Math.min(text.length, ...ends))
        }
        return generate() as unknown as Generation<string>
      }) as never,
    }),
  }
  return { model, queries }
}
