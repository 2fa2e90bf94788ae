/** @file `POST /v1/completions`: goes on with a text. */
import { z } from 'zod'
import { choicesEndpoint } from './choices.ts'
import { ApiError } from './errors.ts'
import { completionLogProbs } from './log-probs.ts'
import { MOST_TEXTS, parseFields, sharedFields } from './request-fields.ts'
import type { FinishReason } from './text-engine.ts'
import { type Prompt, type Served, wantedTexts } from './wanted-texts.ts'

/** As OpenAI has it. */
const MOST_TOKENS = 16

const id = z.int().nonnegative()

const fields = z.object({
  ...sharedFields,
  prompt: z
    .union([z.string(), z.array(z.string()).min(1), z.array(id).min(1), z.array(z.array(id)).min(1)], {
      error: 'expected a text, token ids, or a list of texts or of lists of ids',
    })
    .nullish(),
  logprobs: z.int().min(0).max(5).nullish(),
  echo: z.boolean().nullish(),
})

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
  async wanted(body, served) {
    const parsed = parseFields(fields, body)
    const prompt = parsed.prompt ?? ''
    const many: ReadonlyArray<string | number[]> =
      typeof prompt === 'string' ? [prompt] : isIds(prompt) ? [prompt] : prompt
    if (many.length > MOST_TEXTS) {
      const message = `prompt: ${many.length} prompts are more than ${MOST_TEXTS}: send several requests`
      throw new ApiError(400, message, { param: 'prompt' })
    }
    const prompts = many.map(one => (typeof one === 'string' ? encode(one, served) : known(one, served)))
    const { echo, logprobs: logProbs } = parsed
    return {
      ...wantedTexts(served, parsed, prompts, 'prompt', MOST_TOKENS),
      echo: echo ?? false,
      logProbs: logProbs ?? undefined,
      thinking: 'over',
    }
  },
  choice: (index, { text, logProbs }, finish) => choice(index, text, finish, logProbs),
  opening: () => undefined,
  part: (index, { text, logProbs }) => choice(index, text, null, logProbs),
  end: (index, finish) => choice(index, '', finish, null),
  logProbs: completionLogProbs,
})

const isIds = (prompt: string[] | number[] | number[][]): prompt is number[] => typeof prompt[0] === 'number'

/** Without a text a document begins: with its begin token, or behind the end of another. */
function encode(text: string, { model, tokenizer }: Served): Prompt {
  const ids = tokenizer.encode(text)
  const { bos_token_id: begin, eos_token_id: end } = model.config
  const first = begin ?? (Array.isArray(end) ? end[0] : end)
  return ids.length > 0 || first == null ? { ids, added: tokenizer.encode('').length } : { ids: [first], added: 1 }
}

function known(ids: number[], { model }: Served): Prompt {
  const unknown = ids.find(id => id >= model.config.vocab_size)
  if (unknown === undefined) return { ids, added: 0 }
  const message = `prompt: ${unknown} is no token of this model, whose vocabulary has ${model.config.vocab_size}`
  throw new ApiError(400, message, { param: 'prompt' })
}
