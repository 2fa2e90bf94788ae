/** @file `POST /v1/chat/completions`: the next turn of a conversation, which a chat template writes. */
import type { ChatMessage } from '@moe/tokenizer-bpe/data'
import { z } from 'zod'
import type { Endpoint } from './endpoint.ts'
import { ApiError } from './errors.ts'
import { chatLogProbs } from './log-probs.ts'
import { parseFields, sharedFields } from './request-fields.ts'
import { type Served, wantedTexts } from './wanted-texts.ts'

const fields = z.object({
  ...sharedFields,
  max_completion_tokens: sharedFields.max_tokens,
  messages: z
    .array(z.looseObject({ role: z.enum(['system', 'developer', 'user', 'assistant'], { error: wrongRole }) }))
    .min(1),
  logprobs: z.boolean().nullish(),
  top_logprobs: z.int().min(0).max(20).nullish(),
})

function wrongRole({ input }: { input?: unknown }): string {
  const tools = input === 'tool' || input === 'function' ? ' (there are no tools)' : ''
  return `expected system, developer, user or assistant${tools}`
}

export const chatCompletions: Endpoint = {
  prefix: 'chatcmpl',
  object: 'chat.completion',
  chunkObject: 'chat.completion.chunk',
  wanted(body, served) {
    const parsed = parseFields(fields, body)
    const ids = encode(parsed.messages.map(message), served)
    const most = parsed.max_completion_tokens ?? parsed.max_tokens
    const { logprobs: isTold, top_logprobs: top } = parsed
    if (top && !isTold) throw new ApiError(400, 'top_logprobs goes with logprobs: true', { param: 'top_logprobs' })
    return {
      ...wantedTexts(served, { ...parsed, max_tokens: most }, [{ ids, added: 0 }], 'messages', null),
      echo: false,
      logProbs: isTold ? (top ?? 0) : undefined,
    }
  },
  choice: (index, text, finish, logProbs) => ({
    index,
    message: { role: 'assistant', content: text, refusal: null },
    logprobs: logProbs,
    finish_reason: finish,
  }),
  opening: index => ({ index, delta: { role: 'assistant', content: '' }, logprobs: null, finish_reason: null }),
  part: (index, text, logProbs) => ({ index, delta: { content: text }, logprobs: logProbs, finish_reason: null }),
  end: (index, finish) => ({ index, delta: {}, logprobs: null, finish_reason: finish }),
  logProbs: chatLogProbs,
}

const textPart = z.object({ type: z.literal('text'), text: z.string() })

/** A message as templates know them: its content is one text, and OpenAI's newer name of the system is the old one. */
function message({ role, ...given }: Readonly<Record<string, unknown>>, i: number): ChatMessage {
  const { content, tool_calls: calls, function_call: call } = given
  const param = `messages[${i}]`
  for (const [name, value] of [
    ['tool_calls', calls],
    ['function_call', call],
  ] as const) {
    if (value == null || (Array.isArray(value) && value.length === 0)) continue
    throw new ApiError(400, `${param}.${name}: there are no tools; send texts`, { param: `${param}.${name}` })
  }
  return { role: role === 'developer' ? 'system' : String(role), content: textOf(content, `${param}.content`) }
}

function textOf(content: unknown, param: string): string {
  if (typeof content === 'string') return content
  if (!Array.isArray(content)) {
    throw new ApiError(400, `${param}: expected a text, or a list of parts of type text`, { param })
  }
  return content
    .map((part, i) => {
      const { data } = textPart.safeParse(part)
      if (data) return data.text
      const type = (part as { type?: unknown } | null)?.type
      const kind =
        typeof type === 'string' && type !== 'text' ? `parts of type ${type.slice(0, 40)} are not supported; ` : ''
      throw new ApiError(400, `${param}[${i}]: ${kind}expected { type: 'text', text }`, { param: `${param}[${i}]` })
    })
    .join('')
}

function encode(messages: readonly ChatMessage[], { chatTemplate, tokenizer, name }: Served): Uint32Array {
  if (chatTemplate === undefined) {
    const problem = `${JSON.stringify(name)} has no chat template, it goes on with texts`
    throw new ApiError(400, `${problem}: use /v1/completions, or start the server with a template`, {
      code: 'no_chat_template',
    })
  }
  let text: string
  try {
    text = chatTemplate.render(messages)
  } catch (cause) {
    if (!(cause instanceof Error && cause.name === 'TokenizerError')) throw cause
    throw new ApiError(400, `messages: ${cause.message}`, { param: 'messages', cause })
  }
  // The template has written the special tokens.
  return tokenizer.encode(text, { addSpecialTokens: false })
}
