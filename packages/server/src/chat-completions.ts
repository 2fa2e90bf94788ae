/** @file `POST /v1/chat/completions`: the next turn of a conversation, which a chat template writes. */
import { randomUUID } from 'node:crypto'
import type { ChatMessage } from '@moe/tokenizer-bpe/data'
import { z } from 'zod'
import type { Endpoint } from './endpoint.ts'
import { ApiError } from './errors.ts'
import { chatLogProbs } from './log-probs.ts'
import { parseFields, sharedFields } from './request-fields.ts'
import type { TemplateTools, ToolCall } from './tool-calls.ts'
import { formFields, wantedForm } from './wanted-form.ts'
import { type Served, wantedTexts } from './wanted-texts.ts'

const roles = ['system', 'developer', 'user', 'assistant', 'tool'] as const

const fields = z.object({
  ...sharedFields,
  max_completion_tokens: sharedFields.max_tokens,
  ...formFields,
  messages: z.array(z.looseObject({ role: z.enum(roles, { error: `expected one of ${roles.join(', ')}` }) })).min(1),
  logprobs: z.boolean().nullish(),
  top_logprobs: z.int().min(0).max(20).nullish(),
})

export const chatCompletions: Endpoint = {
  prefix: 'chatcmpl',
  object: 'chat.completion',
  chunkObject: 'chat.completion.chunk',
  async wanted(body, served, signal) {
    const parsed = parseFields(fields, body)
    const { tools, prefix, form, calls } = wantedForm(parsed, served.templateTools)
    const messages = parsed.messages.map((one, i) => message(one, i, served.templateTools))
    const ids = encode(messages, tools, prefix, served)
    const most = parsed.max_completion_tokens ?? parsed.max_tokens
    const { logprobs: isTold, top_logprobs: top } = parsed
    if (top && !isTold) throw new ApiError(400, 'top_logprobs goes with logprobs: true', { param: 'top_logprobs' })
    const texts = wantedTexts(served, { ...parsed, max_tokens: most }, [{ ids, added: 0 }], 'messages', null)
    return {
      ...texts,
      echo: false,
      logProbs: isTold ? (top ?? 0) : undefined,
      calls,
      constraints: form && (await served.grammars.constraints(form.form, texts.choices, form.param, signal)),
    }
  },
  choice: (index, text, finish, logProbs, calls) => ({
    index,
    message: {
      role: 'assistant',
      content: calls.length > 0 && text.trim() === '' ? null : text,
      refusal: null,
      ...(calls.length > 0 && { tool_calls: calls.map(toolCall) }),
    },
    logprobs: logProbs,
    finish_reason: finish,
  }),
  opening: index => ({ index, delta: { role: 'assistant', content: '' }, logprobs: null, finish_reason: null }),
  part: (index, text, logProbs, calls) => ({
    index,
    delta: calls ? { tool_calls: calls.map((call, i) => ({ index: i, ...toolCall(call) })) } : { content: text },
    logprobs: logProbs,
    finish_reason: null,
  }),
  end: (index, finish) => ({ index, delta: {}, logprobs: null, finish_reason: finish }),
  logProbs: chatLogProbs,
}

const toolCall = ({ name, arguments: json }: ToolCall) => ({
  id: `call_${randomUUID().replaceAll('-', '')}`,
  type: 'function',
  function: { name, arguments: json },
})

const textPart = z.object({ type: z.literal('text'), text: z.string() })

const madeCalls = z.array(
  z.looseObject({
    id: z.string().nullish(),
    type: z.literal('function').default('function'),
    function: z.looseObject({ name: z.string(), arguments: z.string() }),
  }),
)

/** Templates know messages without a text, beside calls. */
type TemplateMessage = Omit<ChatMessage, 'content'> & { readonly content: string | null }

/** A message as templates know them: its content is one text, and OpenAI's newer name of the system is the old one. */
function message(given: Readonly<Record<string, unknown>>, i: number, template: TemplateTools): TemplateMessage {
  const { role, content, tool_calls: calls, function_call: call } = given
  const param = `messages[${i}]`
  if (call != null)
    throw new ApiError(400, `${param}.function_call: use tool_calls`, { param: `${param}.function_call` })
  const hasCalls = role === 'assistant' && Array.isArray(calls) && calls.length > 0
  if ((hasCalls || role === 'tool') && !template.writesCalls) {
    const message = `${param}: this model's chat template does not write calls of tools: send texts`
    throw new ApiError(400, message, { param })
  }
  if (role === 'tool') {
    const { tool_call_id, name } = given
    return { role, content: textOf(content, `${param}.content`), tool_call_id, ...(name != null && { name }) }
  }
  const isEmpty = hasCalls && content == null
  const own = {
    role: role === 'developer' ? 'system' : String(role),
    content: isEmpty ? null : textOf(content, `${param}.content`),
  }
  return hasCalls ? { ...own, tool_calls: callsOf(calls, `${param}.tool_calls`, template) } : own
}

function callsOf(calls: unknown, param: string, { parsed }: TemplateTools) {
  const { data } = madeCalls.safeParse(calls)
  const problem = (what: string) => new ApiError(400, `${param}: ${what}`, { param })
  if (data === undefined) throw problem('expected a list of { id, type, function: { name, arguments } }')
  if (!parsed) return data
  return data.map(call => {
    try {
      return { ...call, function: { ...call.function, arguments: JSON.parse(call.function.arguments) } }
    } catch (cause) {
      throw problem(`the arguments of ${call.function.name.slice(0, 64)} are no JSON: ${(cause as Error).message}`)
    }
  })
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

function encode(
  messages: readonly TemplateMessage[],
  tools: readonly object[] | undefined,
  prefix: string,
  { chatTemplate, tokenizer, name }: Served,
): Uint32Array {
  if (chatTemplate === undefined) {
    const problem = `${JSON.stringify(name)} has no chat template, it goes on with texts`
    throw new ApiError(400, `${problem}: use /v1/completions, or start the server with a template`, {
      code: 'no_chat_template',
    })
  }
  let text: string
  try {
    text = chatTemplate.render(messages as readonly ChatMessage[], { variables: tools && { tools } }) + prefix
  } catch (cause) {
    if (!(cause instanceof Error && cause.name === 'TokenizerError')) throw cause
    throw new ApiError(400, `messages: ${cause.message}`, { param: 'messages', cause })
  }
  // The template has written the special tokens.
  return tokenizer.encode(text, { addSpecialTokens: false })
}
