/** @file `POST /v1/chat/completions`: the next turn of a conversation, which a chat template writes. */
import { randomUUID } from 'node:crypto'
import type { ChatMessage } from '@moe/tokenizer-bpe/data'
import { z } from 'zod'
import { choicesEndpoint } from './choices.ts'
import { ApiError } from './errors.ts'
import { chatLogProbs } from './log-probs.ts'
import { thinkingBehind } from './reasoning.ts'
import { parseFields, sharedFields } from './request-fields.ts'
import type { TemplateTraits } from './template-traits.ts'
import type { ToolCall } from './tool-calls.ts'
import { formFields, wantedForm, wantedTools } from './wanted-form.ts'
import { type Opened, wantedTexts } from './wanted-texts.ts'

const roles = ['system', 'developer', 'user', 'assistant', 'tool'] as const

/** What templates are given of the rest of the request, or know themselves. */
const ownVariables = ['messages', 'tools', 'add_generation_prompt', 'bos_token', 'eos_token']

const fields = z.object({
  ...sharedFields,
  max_completion_tokens: sharedFields.max_tokens,
  ...formFields,
  messages: z.array(z.looseObject({ role: z.enum(roles, { error: `expected one of ${roles.join(', ')}` }) })).min(1),
  chat_template_kwargs: z
    .record(z.string(), z.unknown())
    .refine(given => !ownVariables.some(name => name in given), `${ownVariables.join(', ')} are not to be given`)
    .nullish(),
  logprobs: z.boolean().nullish(),
  top_logprobs: z.int().min(0).max(20).nullish(),
})

export const chatCompletions = choicesEndpoint({
  prefix: 'chatcmpl-',
  object: 'chat.completion',
  chunkObject: 'chat.completion.chunk',
  async wanted(body, served, signal) {
    const parsed = parseFields(fields, body)
    const { traits } = served
    const tools = wantedTools(parsed, traits)
    const messages = parsed.messages.map((one, i) => message(one, i, traits))
    const text = render(messages, tools, parsed.chat_template_kwargs ?? {}, served)
    const thinking = thinkingBehind(text, traits.thinks)
    const made = messages.reduce((sum, { tool_calls: calls }) => sum + (Array.isArray(calls) ? calls.length : 0), 0)
    const { prefix, form, calls } = wantedForm(parsed, traits, tools, thinking, made)
    // The template has written the special tokens.
    const ids = served.tokenizer.encode(text + prefix, { addSpecialTokens: false })
    const most = parsed.max_completion_tokens ?? parsed.max_tokens
    const { logprobs: isTold, top_logprobs: top } = parsed
    if (top && !isTold) throw new ApiError(400, 'top_logprobs goes with logprobs: true', { param: 'top_logprobs' })
    const texts = wantedTexts(served, { ...parsed, max_tokens: most }, [{ ids, added: 0 }], 'messages', null)
    return {
      ...texts,
      echo: false,
      logProbs: isTold ? (top ?? 0) : undefined,
      thinking,
      calls,
      constraints: form && (await served.grammars.constraints(form.form, texts.choices, form.param, signal)),
    }
  },
  choice: (index, { text, reasoning, calls, logProbs }, finish) => ({
    index,
    message: {
      role: 'assistant',
      content: calls.length > 0 && text.trim() === '' ? null : text,
      ...(reasoning && { reasoning_content: reasoning }),
      refusal: null,
      ...(calls.length > 0 && { tool_calls: calls.map(toolCall) }),
    },
    logprobs: logProbs,
    finish_reason: finish,
  }),
  opening: index => ({ index, delta: { role: 'assistant', content: '' }, logprobs: null, finish_reason: null }),
  part: (index, { text, reasoning, calls, logProbs }) => ({
    index,
    delta: {
      ...(reasoning && { reasoning_content: reasoning }),
      ...((text || (!reasoning && calls.length === 0)) && { content: text }),
      ...(calls.length > 0 && { tool_calls: calls.map((call, i) => ({ index: i, ...toolCall(call) })) }),
    },
    logprobs: logProbs,
    finish_reason: null,
  }),
  end: (index, finish) => ({ index, delta: {}, logprobs: null, finish_reason: finish }),
  logProbs: chatLogProbs,
})

const toolCall = ({ id = `call_${randomUUID().replaceAll('-', '')}`, name, arguments: json }: ToolCall) => ({
  id,
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
function message(given: Readonly<Record<string, unknown>>, i: number, template: TemplateTraits): TemplateMessage {
  const { role, content, reasoning_content: reasoning, tool_calls: calls, function_call: call } = given
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
    ...(role === 'assistant' && typeof reasoning === 'string' && { reasoning_content: reasoning }),
  }
  return hasCalls ? { ...own, tool_calls: callsOf(calls, `${param}.tool_calls`, template) } : own
}

function callsOf(calls: unknown, param: string, { parsed }: TemplateTraits) {
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

/** The prompt, in which a template that tells of no tools has them told of behind what the system says. */
function render(
  messages: readonly TemplateMessage[],
  tools: readonly object[],
  variables: Readonly<Record<string, unknown>>,
  { chatTemplate, name, traits: { format, isTold } }: Opened,
): string {
  if (chatTemplate === undefined) {
    const problem = `${JSON.stringify(name)} has no chat template, it goes on with texts`
    throw new ApiError(400, `${problem}: use /v1/completions, or start the server with a template`, {
      code: 'no_chat_template',
    })
  }
  const isTelling = tools.length > 0 && !isTold && format.tell
  const all = isTelling ? withSystem(messages, isTelling(tools)) : messages
  try {
    return chatTemplate.render(all as readonly ChatMessage[], {
      variables: { ...variables, ...(tools.length > 0 && { tools }) },
    })
  } catch (cause) {
    if (!(cause instanceof Error && cause.name === 'TokenizerError')) throw cause
    throw new ApiError(400, `messages: ${cause.message}`, { param: 'messages', cause })
  }
}

function withSystem(messages: readonly TemplateMessage[], text: string): readonly TemplateMessage[] {
  const last = messages.findLastIndex(({ role }) => role === 'system')
  if (last < 0) return [{ role: 'system', content: text }, ...messages]
  return messages.map((one, i) => (i === last ? { ...one, content: `${one.content}\n\n${text}` } : one))
}
