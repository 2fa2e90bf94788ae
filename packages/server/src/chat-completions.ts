/** @file `POST /v1/chat/completions`: the next message of a conversation that a chat template formats. */
import type { ChatMessage } from '@moe/tokenizer-bpe/data'
import { z } from 'zod'
import { answerForm, formFields, promptedTools } from './answer-form.ts'
import { choicesEndpoint } from './choices.ts'
import { encodeText } from './encode-text.ts'
import { ApiError } from './errors.ts'
import { generationRequest, type PreparedModel } from './generation-request.ts'
import { chatLogProbs } from './log-probs.ts'
import { THINK_END, THINK_START, thinkingAfter } from './reasoning.ts'
import { list, MAX_MESSAGES, parseFields, sharedFields, storeField } from './request-fields.ts'
import type { TemplateTraits } from './template-traits.ts'
import { newCallId, type ToolCall } from './tool-format.ts'

const roles = ['system', 'developer', 'user', 'assistant', 'tool'] as const

/** Variables that the server or the template sets. */
const reservedVariables = ['messages', 'tools', 'add_generation_prompt', 'bos_token', 'eos_token']

const message = z.looseObject({ role: z.enum(roles, { error: `expected one of ${roles.join(', ')}` }) })

const fields = z.object({
  ...sharedFields,
  max_completion_tokens: sharedFields.max_tokens,
  ...formFields,
  messages: list(message, MAX_MESSAGES, 1),
  chat_template_kwargs: z
    .record(z.string(), z.unknown())
    .refine(given => !reservedVariables.some(name => name in given), `${reservedVariables.join(', ')} cannot be set`)
    .nullish(),
  reasoning_effort: z.string().nullish(),
  logprobs: z.boolean().nullish(),
  top_logprobs: z.int().min(0).max(20).nullish(),
  store: storeField,
})

/** What fields of the other endpoints are called here. */
const renamed = {
  max_output_tokens: 'max_completion_tokens',
  prompt: 'messages',
  input: 'messages',
  reasoning: 'reasoning_effort',
}

export const chatCompletions = choicesEndpoint({
  prefix: 'chatcmpl-',
  object: 'chat.completion',
  chunkObject: 'chat.completion.chunk',
  async parse(body, served, signal) {
    const parsed = parseFields(fields, body, renamed)
    const { traits } = served
    const variables = templateVariables(parsed, traits)
    const maxTokens = maxTokensOf(parsed)
    const tools = promptedTools(parsed, traits)
    const messages = parsed.messages.map((one, i) => templateMessage(one, i, traits))
    const previousCalls = messages.reduce(
      (sum, { tool_calls: calls }) => sum + (Array.isArray(calls) ? calls.length : 0),
      0,
    )
    if (previousCalls > MAX_MESSAGES) {
      const message = `messages: there are ${previousCalls} tool calls, but the limit is ${MAX_MESSAGES}`
      throw new ApiError(400, message, { param: 'messages' })
    }
    const text = render(messages, tools, variables, served)
    const thinking = thinkingAfter(text, traits.hasReasoning)
    const { prefix, form, calls } = answerForm(parsed, traits, tools, thinking, previousCalls)
    // The template already contains the special tokens.
    const ids = await encodeText(served.tokenizer, text + prefix, { addSpecialTokens: false })
    const { logprobs: hasLogProbs, top_logprobs: top } = parsed
    if (top && !hasLogProbs) throw new ApiError(400, 'top_logprobs requires logprobs: true', { param: 'top_logprobs' })
    const texts = generationRequest(served, { ...parsed, max_tokens: maxTokens }, [{ ids, added: 0 }], 'messages', null)
    return {
      ...texts,
      echo: false,
      logProbs: hasLogProbs ? (top ?? 0) : undefined,
      thinking,
      calls,
      visibleTokens: (calls ? traits.format.controlTokens : '') + (thinking === 'none' ? '' : THINK_START + THINK_END),
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
  parts(index, { text, reasoning, calls, logProbs }) {
    const delta = {
      ...(reasoning && { reasoning_content: reasoning }),
      ...((text || (!reasoning && calls.length === 0)) && { content: text }),
    }
    // As in OpenAI's API, a chunk contains at most one call.
    const perCall = calls.map((call, i) => ({ tool_calls: [{ index: i, ...toolCall(call) }] }))
    const deltas = Object.keys(delta).length > 0 ? [delta, ...perCall] : perCall
    return deltas.map((delta, i) => ({ index, delta, logprobs: i === 0 ? logProbs : null, finish_reason: null }))
  },
  end: (index, finish) => ({ index, delta: {}, logprobs: null, finish_reason: finish }),
  logProbs: chatLogProbs,
})

type Fields = z.output<typeof fields>

/** @throws ApiError 400 if both fields are set to different numbers */
function maxTokensOf({ max_completion_tokens: own, max_tokens: older }: Fields): number | null | undefined {
  if (own == null || older == null || own === older) return own ?? older
  const problem = `max_tokens is ${older}, but max_completion_tokens, its newer name, is ${own}: send one of them`
  throw new ApiError(400, problem, { param: 'max_tokens' })
}

/** @throws ApiError 400 if `reasoning_effort` is set and the template does not read it */
function templateVariables(given: Fields, { readsEffort }: TemplateTraits): Readonly<Record<string, unknown>> {
  const { reasoning_effort: effort, chat_template_kwargs: variables } = given
  if (effort == null) return variables ?? {}
  if (readsEffort) return { reasoning_effort: effort, ...variables }
  const message = "reasoning_effort: this model's chat template does not read it: omit it, or use chat_template_kwargs"
  throw new ApiError(400, message, { param: 'reasoning_effort', code: 'unsupported_parameter' })
}

const toolCall = ({ id = newCallId(), name, arguments: json }: ToolCall) => ({
  id,
  type: 'function',
  function: { name, arguments: json },
})

const textPart = z.object({ type: z.literal('text'), text: z.string() })

const toolCalls = list(
  z.looseObject({
    id: z.string().nullish(),
    type: z.literal('function').default('function'),
    function: z.looseObject({ name: z.string(), arguments: z.string() }),
  }),
  MAX_MESSAGES,
)

/** In templates, a message with tool calls may have no content. */
type TemplateMessage = Omit<ChatMessage, 'content'> & { readonly content: string | null }

/** Converts a message for the template: content becomes one string, and the role `developer` becomes `system`. */
function templateMessage(
  given: Readonly<Record<string, unknown>>,
  i: number,
  template: TemplateTraits,
): TemplateMessage {
  const { role, name, content, reasoning_content: reasoning, tool_calls: calls, function_call: call, prefix } = given
  const param = `messages[${i}]`
  if (prefix === true) {
    const message = `${param}.prefix is not supported: use /v1/completions`
    throw new ApiError(400, message, { param: `${param}.prefix`, code: 'unsupported_parameter' })
  }
  if (call != null)
    throw new ApiError(400, `${param}.function_call: use tool_calls`, { param: `${param}.function_call` })
  const hasCalls = role === 'assistant' && Array.isArray(calls) && calls.length > 0
  if ((hasCalls || role === 'tool') && !template.supportsCalls) {
    const message = `${param}: this model's chat template does not support tool calls: send only text messages`
    throw new ApiError(400, message, { param })
  }
  if (role === 'tool') {
    const { tool_call_id } = given
    return { role, content: textOf(content, `${param}.content`), tool_call_id, ...(name != null && { name }) }
  }
  const isEmpty = hasCalls && content == null
  const own = {
    role: role === 'developer' ? 'system' : String(role),
    content: isEmpty ? null : textOf(content, `${param}.content`),
    ...(typeof name === 'string' && { name }),
    ...(role === 'assistant' && typeof reasoning === 'string' && { reasoning_content: reasoning }),
  }
  return hasCalls ? { ...own, tool_calls: callsOf(calls, `${param}.tool_calls`, template) } : own
}

function callsOf(calls: unknown, param: string, { parsesArguments }: TemplateTraits) {
  const { data } = toolCalls.safeParse(calls)
  const problem = (what: string) => new ApiError(400, `${param}: ${what}`, { param })
  if (data === undefined)
    throw problem(`expected a list of up to ${MAX_MESSAGES} { id, type, function: { name, arguments } }`)
  if (!parsesArguments) return data
  return data.map(call => {
    try {
      // Models may write nothing for a tool without parameters.
      return { ...call, function: { ...call.function, arguments: JSON.parse(call.function.arguments.trim() || '{}') } }
    } catch (cause) {
      throw problem(
        `the arguments of ${call.function.name.slice(0, 64)} are not valid JSON: ${(cause as Error).message}`,
      )
    }
  })
}

function textOf(content: unknown, param: string): string {
  if (typeof content === 'string') return content
  if (!Array.isArray(content)) {
    throw new ApiError(400, `${param}: expected a string or a list of text parts`, { param })
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

/** Renders the prompt. If the template does not describe tools, their description is appended to the system message. */
function render(
  messages: readonly TemplateMessage[],
  tools: readonly object[],
  variables: Readonly<Record<string, unknown>>,
  { chatTemplate, name, traits: { format, describesTools } }: PreparedModel,
): string {
  if (chatTemplate === undefined) {
    const problem = `${JSON.stringify(name)} has no chat template`
    throw new ApiError(400, `${problem}: use /v1/completions, or start the server with a template`, {
      code: 'no_chat_template',
    })
  }
  const describe = tools.length > 0 && !describesTools ? format.describeTools : undefined
  const all = describe ? withSystem(messages, describe(tools)) : messages
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
