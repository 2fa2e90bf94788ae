/** @file Response format of completions and chat completions: a list of choices, complete or in chunks. */
import type { Endpoint, GeneratedPart, StreamEvent, Usage } from './endpoint.ts'
import type { FinishReason } from './text-engine.ts'

interface Choices extends Pick<Endpoint, 'prefix' | 'parse' | 'logProbs'> {
  readonly object: string
  readonly chunkObject: string
  /** A complete element of `choices`. */
  choice(index: number, part: GeneratedPart, finish: FinishReason): object
  /** In a stream: the element before any text of the choice. */
  opening(index: number): object | undefined
  /** In a stream: a part of the text, as the elements of one or more chunks. */
  parts(index: number, part: GeneratedPart): readonly object[]
  /** In a stream: the end of the choice. */
  end(index: number, finish: FinishReason): object
}

export function choicesEndpoint(choices: Choices): Endpoint {
  const { prefix, parse, logProbs, object, chunkObject } = choices
  return {
    prefix,
    parse,
    logProbs,
    body: (head, texts, usage) => ({
      ...head,
      object,
      choices: texts.map((text, i) => choices.choice(i, text, text.finish)),
      usage: usageOf(usage),
    }),
    stream(head, { includeUsage }) {
      const chunk = (all: readonly object[], usage: object | null = null): StreamEvent[] => [
        { data: JSON.stringify({ ...head, object: chunkObject, choices: all, ...(includeUsage ? { usage } : {}) }) },
      ]
      return {
        begin: () => [],
        opening(index) {
          const opening = choices.opening(index)
          return opening ? chunk([opening]) : []
        },
        part: (index, part) => choices.parts(index, part).flatMap(one => chunk([one])),
        end: (index, finish) => chunk([choices.end(index, finish)]),
        over: usage => (includeUsage ? chunk([], usageOf(usage)) : []),
        failed: error => [{ data: JSON.stringify(error) }],
        last: [{ data: '[DONE]' }],
      }
    },
  }
}

const usageOf = ({ prompt, generated, cachedTokens, reasoning }: Usage) => ({
  prompt_tokens: prompt,
  completion_tokens: generated,
  total_tokens: prompt + generated,
  prompt_tokens_details: { cached_tokens: cachedTokens },
  ...(reasoning > 0 && { completion_tokens_details: { reasoning_tokens: reasoning } }),
})
