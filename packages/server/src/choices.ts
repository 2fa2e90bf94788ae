/** @file Answers of the two older endpoints: lists of choices, whole or in chunks. */
import type { Endpoint, Made, StreamEvent, Usage } from './endpoint.ts'
import type { FinishReason } from './text-engine.ts'

interface Choices extends Pick<Endpoint, 'prefix' | 'wanted' | 'logProbs'> {
  readonly object: string
  readonly chunkObject: string
  /** One of `choices`, whole. */
  choice(index: number, made: Made, finish: FinishReason): object
  /** The same in a stream: before any text; a part of it; at its end. */
  opening(index: number): object | undefined
  part(index: number, made: Made): object
  end(index: number, finish: FinishReason): object
}

export function choicesEndpoint(choices: Choices): Endpoint {
  const { prefix, wanted, logProbs, object, chunkObject } = choices
  return {
    prefix,
    wanted,
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
        part: (index, made) => chunk([choices.part(index, made)]),
        end: (index, finish) => chunk([choices.end(index, finish)]),
        over: usage => (includeUsage ? chunk([], usageOf(usage)) : []),
        failed: error => [{ data: JSON.stringify(error) }],
        last: [{ data: '[DONE]' }],
      }
    },
  }
}

const usageOf = ({ prompt, made, reused }: Usage) => ({
  prompt_tokens: prompt,
  completion_tokens: made,
  total_tokens: prompt + made,
  prompt_tokens_details: { cached_tokens: reused },
})
