/** @file `POST /v1/completions`: goes on with a text. */
import { z } from 'zod'
import type { Endpoint } from './endpoint.ts'
import { ApiError } from './errors.ts'
import { MOST_TEXTS, parseFields, sharedFields } from './request-fields.ts'
import type { FinishReason } from './text-engine.ts'
import { type Served, wantedTexts } from './wanted-texts.ts'

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
})

const choice = (index: number, text: string, finish: FinishReason | null) => ({
  index,
  text,
  logprobs: null,
  finish_reason: finish,
})

export const completions: Endpoint = {
  prefix: 'cmpl',
  object: 'text_completion',
  chunkObject: 'text_completion',
  wanted(body, served) {
    const parsed = parseFields(fields, body)
    const prompt = parsed.prompt ?? ''
    const many: ReadonlyArray<string | number[]> =
      typeof prompt === 'string' ? [prompt] : isIds(prompt) ? [prompt] : prompt
    if (many.length > MOST_TEXTS) {
      const message = `prompt: ${many.length} prompts are more than ${MOST_TEXTS}: send several requests`
      throw new ApiError(400, message, { param: 'prompt' })
    }
    const prompts = many.map(one => (typeof one === 'string' ? encode(one, served) : known(one, served)))
    return wantedTexts(served, parsed, prompts, 'prompt', MOST_TOKENS)
  },
  choice,
  opening: () => undefined,
  part: (index, text) => choice(index, text, null),
  end: (index, finish) => choice(index, '', finish),
}

const isIds = (prompt: string[] | number[] | number[][]): prompt is number[] => typeof prompt[0] === 'number'

/** Without a text a document begins: with its begin token, or behind the end of another. */
function encode(text: string, { model, tokenizer }: Served): ArrayLike<number> {
  const ids = tokenizer.encode(text)
  const { bos_token_id: begin, eos_token_id: end } = model.config
  const first = begin ?? (Array.isArray(end) ? end[0] : end)
  return ids.length > 0 || first == null ? ids : [first]
}

function known(ids: number[], { model }: Served): number[] {
  const unknown = ids.find(id => id >= model.config.vocab_size)
  if (unknown === undefined) return ids
  const message = `prompt: ${unknown} is no token of this model, whose vocabulary has ${model.config.vocab_size}`
  throw new ApiError(400, message, { param: 'prompt' })
}
