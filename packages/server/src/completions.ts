/** @file `POST /v1/completions`: continues a text, or fills a gap in one. */
import { DEEPSEEK_FIM_TOKENS, fillInTheMiddlePrompt } from '@moe/tokenizer-bpe/data'
import { z } from 'zod'
import { choicesEndpoint } from './choices.ts'
import { encodeText } from './encode-text.ts'
import { ApiError } from './errors.ts'
import { generationRequest, type ServedModel } from './generation-request.ts'
import { completionLogProbs } from './log-probs.ts'
import { MAX_TEXTS, parseFields, sharedFields } from './request-fields.ts'
import type { FinishReason } from './text-engine.ts'
import type { Prompt } from './text-parts.ts'

/** As in OpenAI's API. */
const DEFAULT_MAX_TOKENS = 16

const isId = (given: unknown) => Number.isSafeInteger(given) && (given as number) >= 0
const isListOf = (isItem: (item: unknown) => boolean) => (given: unknown) =>
  Array.isArray(given) && given.length > 0 && given.every(isItem)

/** Not a union of lists, which would report every item of a long prompt as invalid in the other kinds of lists. */
const isPrompt = (given: unknown) =>
  typeof given === 'string' ||
  [isListOf(isId), isListOf(item => typeof item === 'string'), isListOf(isListOf(isId))].some(fits => fits(given))

const fields = z.object({
  ...sharedFields,
  prompt: z
    .custom<string | string[] | number[] | number[][]>(isPrompt, {
      error: 'expected a string, a list of token ids, or a list of either',
    })
    .nullish(),
  suffix: z.string().nullish(),
  logprobs: z.int().min(0).max(5).nullish(),
  echo: z.boolean().nullish(),
})

/** What fields of the other endpoints are called here. */
const renamed = {
  max_completion_tokens: 'max_tokens',
  max_output_tokens: 'max_tokens',
  input: 'prompt',
}

const choice = (index: number, text: string, finish: FinishReason | null, logProbs: object | null) => ({
  index,
  text,
  logprobs: logProbs,
  finish_reason: finish,
})

export const completions = choicesEndpoint({
  prefix: 'cmpl-',
  object: 'text_completion',
  chunkObject: 'text_completion',
  async parse(body, served) {
    const parsed = parseFields(fields, body, renamed)
    const prompt = parsed.prompt ?? ''
    const many: ReadonlyArray<string | number[]> =
      typeof prompt === 'string' ? [prompt] : isIds(prompt) ? [prompt] : prompt
    if (many.length > MAX_TEXTS) {
      const message = `prompt: expected at most ${MAX_TEXTS} prompts, got ${many.length}: send several requests`
      throw new ApiError(400, message, { param: 'prompt' })
    }
    const { suffix, echo, logprobs: logProbs } = parsed
    const asked = suffix ? many.map(one => infill(one, suffix, echo ?? false, served)) : many
    const prompts: Prompt[] = []
    for (const one of asked) prompts.push(typeof one === 'string' ? await encode(one, served) : checkIds(one, served))
    return {
      ...generationRequest(served, parsed, prompts, 'prompt', DEFAULT_MAX_TOKENS),
      echo: echo ?? false,
      logProbs: logProbs ?? undefined,
      thinking: 'none',
    }
  },
  choice: (index, { text, logProbs }, finish) => choice(index, text, finish, logProbs),
  opening: () => undefined,
  parts: (index, { text, logProbs }) => [choice(index, text, null, logProbs)],
  end: (index, finish) => choice(index, '', finish, null),
  logProbs: completionLogProbs,
})

const isIds = (prompt: string[] | number[] | number[][]): prompt is number[] => typeof prompt[0] === 'number'

/** An empty prompt starts a document: with the begin token or, if there is none, after an end token. */
async function encode(text: string, { model, tokenizer }: ServedModel): Promise<Prompt> {
  const ids = await encodeText(tokenizer, text)
  const { bos_token_id: begin, eos_token_id: end } = model.config
  const first = begin ?? (Array.isArray(end) ? end[0] : end)
  return ids.length > 0 || first == null ? { ids, added: tokenizer.encode('').length } : { ids: [first], added: 1 }
}

/** The prompt for a text between a prefix and a suffix. */
function infill(prefix: string | number[], suffix: string, echo: boolean, { tokenizer }: ServedModel): string {
  const refuse = (problem: string) => new ApiError(400, `suffix: ${problem}`, { param: 'suffix' })
  const missing = Object.values(DEEPSEEK_FIM_TOKENS).filter(token => tokenizer.tokenToId(token) === undefined)
  if (missing.length > 0) throw refuse(`the tokenizer of this model has no ${missing.join(', ')}`)
  if (typeof prefix !== 'string') throw refuse('it requires a prompt of text, not of token ids')
  if (echo) throw refuse('it cannot be combined with echo')
  return fillInTheMiddlePrompt(prefix, suffix)
}

function checkIds(ids: number[], { model }: ServedModel): Prompt {
  const unknown = ids.find(id => id >= model.config.vocab_size)
  if (unknown === undefined) return { ids, added: 0 }
  const message = `prompt: token id ${unknown} is out of range, the vocabulary of this model has ${model.config.vocab_size} tokens`
  throw new ApiError(400, message, { param: 'prompt' })
}
