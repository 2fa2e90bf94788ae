/**
 * @file `POST /v1/responses`: OpenAI's newer API for conversations, implemented on top of chat completions. The server stores nothing, so requests contain the whole
 * conversation.
 */
import { randomUUID } from 'node:crypto'
import { z } from 'zod'
import { chatCompletions } from './chat-completions.ts'
import type { Endpoint, GeneratedPart, Head, Stream, StreamEvent, Usage } from './endpoint.ts'
import { ApiError } from './errors.ts'
import type { GenerationRequest } from './generation-request.ts'
import { list, MAX_MESSAGES, MAX_TOOLS, parseFields, sharedFields, storeField } from './request-fields.ts'
import type { FinishReason } from './text-engine.ts'
import { newCallId } from './tool-format.ts'

const { n: _, max_tokens: count, ...shared } = sharedFields

const unsupported = (problem: string) => z.null(problem).optional()
const notStored = unsupported('this server stores nothing: send the whole conversation as input')

const item = z.looseObject({ type: z.string().nullish() })

const LOG_PROBS = 'message.output_text.logprobs'

/** What else OpenAI's API can include: it is in every response, or belongs to tools that this server does not run. */
const included = [
  'reasoning.encrypted_content',
  'message.input_image.image_url',
  'file_search_call.results',
  'web_search_call.results',
  'web_search_call.action.sources',
  'computer_call_output.output.image_url',
  'code_interpreter_call.outputs',
] as const

const summary = z.enum(['auto', 'concise', 'detailed']).nullish()

const fields = z.object({
  ...shared,
  input: z.union([z.string(), list(item, MAX_MESSAGES, 1)], {
    error: `expected a string or a list of items, at most ${MAX_MESSAGES}`,
  }),
  instructions: z.string().nullish(),
  max_output_tokens: count,
  text: z
    .strictObject({
      format: z.looseObject({ type: z.string() }).nullish(),
      verbosity: z.literal('medium', 'is not supported: ask for a short or long answer in the instructions').nullish(),
    })
    .nullish(),
  // Reasoning is always returned in full, so it needs no summary.
  reasoning: z.strictObject({ effort: z.string().nullish(), summary, generate_summary: summary }).nullish(),
  tools: list(z.looseObject({ type: z.string() }), MAX_TOOLS).nullish(),
  tool_choice: z.union([z.string(), z.looseObject({ type: z.string() })]).nullish(),
  parallel_tool_calls: z.boolean().nullish(),
  include: list(z.enum([LOG_PROBS, ...included]), 20).nullish(),
  top_logprobs: z.int().min(0).max(20).nullish(),
  chat_template_kwargs: z.unknown().optional(),
  metadata: z.record(z.string(), z.unknown()).nullish(),
  store: storeField,
  previous_response_id: notStored,
  conversation: notStored,
  prompt: unsupported('stored prompts are not supported: send input'),
  background: z.literal(false, 'is not supported: omit it').nullish(),
  truncation: z.literal('disabled', 'is not supported: shorten the conversation in the client').nullish(),
})

/** What fields of the other endpoints are called here. */
const renamed = {
  max_tokens: 'max_output_tokens',
  max_completion_tokens: 'max_output_tokens',
  messages: 'input',
  response_format: 'text.format',
  reasoning_effort: 'reasoning.effort',
  verbosity: 'text.verbosity',
  logprobs: `include: ["${LOG_PROBS}"]`,
}

type Fields = z.output<typeof fields>

/** A chat message, and the part of the request that it was created from. */
interface Message {
  readonly from: string
  readonly message: Record<string, unknown>
}

export const responses: Endpoint = {
  prefix: 'resp_',
  async parse(body, served, signal) {
    const parsed = parseFields(fields, body, renamed)
    const messages = messagesOf(parsed)
    const { text, tools, tool_choice: choice, include, top_logprobs: top } = parsed
    const hasLogProbs = include?.includes(LOG_PROBS)
    if (top && !hasLogProbs)
      throw new ApiError(400, `top_logprobs requires include: ["${LOG_PROBS}"]`, { param: 'top_logprobs' })
    const chat = {
      ...Object.fromEntries(Object.keys(shared).map(name => [name, parsed[name as keyof typeof shared]])),
      messages: messages.map(({ message }) => message),
      max_completion_tokens: parsed.max_output_tokens,
      logprobs: hasLogProbs,
      top_logprobs: hasLogProbs ? top : undefined,
      response_format: formatOf(text?.format),
      tools: tools?.map(({ type, ...own }) => (type === 'function' ? { type, function: own } : { type })),
      tool_choice: choiceOf(choice),
      parallel_tool_calls: parsed.parallel_tool_calls,
      reasoning_effort: parsed.reasoning?.effort,
      chat_template_kwargs: parsed.chat_template_kwargs,
    }
    try {
      return { ...(await chatCompletions.parse(chat, served, signal)), echoedFields: echoedFieldsOf(parsed) }
    } catch (cause) {
      throw cause instanceof ApiError ? withOwnFieldNames(cause, messages) : cause
    }
  },
  body(head, [{ finish, ...part }], usage, request) {
    const stream = new ResponseStream(head, request)
    stream.part(0, part)
    stream.end(0, finish)
    return stream.response(usage)
  },
  stream: (head, request) => new ResponseStream(head, request),
  logProbs: (tokens, tokenizer) =>
    chatCompletions.logProbs(
      tokens.filter(token => token.of === undefined),
      tokenizer,
    ),
}

/** Converts a choice of tools to that of chats, which nests what is flat here. */
function choiceOf(choice: Fields['tool_choice']) {
  if (typeof choice !== 'object' || choice === null) return choice
  const { type, name, mode, tools } = choice
  if (type !== 'allowed_tools') return { type, function: { name } }
  const nested = Array.isArray(tools)
    ? tools.map(tool => ({ type: tool?.type, function: { name: tool?.name } }))
    : tools
  return { type, allowed_tools: { mode, tools: nested } }
}

function formatOf(format: { readonly type: string; readonly [key: string]: unknown } | null | undefined) {
  if (format?.type !== 'json_schema') return format
  const { type, ...own } = format
  return { type, json_schema: own }
}

/** Converts text parts to those of chats. Other parts are left as they are, and rejected later. */
const contentOf = (content: unknown): unknown =>
  Array.isArray(content)
    ? content.map(part =>
        ['input_text', 'output_text', 'reasoning_text'].includes(part?.type) ? { type: 'text', text: part.text } : part,
      )
    : content

/** Converts input items to chat messages. @throws ApiError 400 if an item is unsupported */
function messagesOf({ input, instructions }: Fields): Message[] {
  const all: Message[] = []
  if (instructions != null) all.push({ from: 'instructions', message: { role: 'system', content: instructions } })
  if (typeof input === 'string') return [...all, { from: 'input', message: { role: 'user', content: input } }]
  /** The reasoning before the next item. */
  let reasoning: { reasoning_content?: string } = {}
  /** The assistant message that the next function call belongs to. */
  let caller: Message | undefined
  for (const [i, { type, ...own }] of input.entries()) {
    const from = `input[${i}]`
    if (type == null || type === 'message') {
      const message = { role: own.role, content: contentOf(own.content), ...(own.role === 'assistant' && reasoning) }
      all.push({ from, message })
      caller = own.role === 'assistant' ? all[all.length - 1] : undefined
    } else if (type === 'function_call') {
      if (caller === undefined) {
        caller = { from, message: { role: 'assistant', content: null, ...reasoning } }
        all.push(caller)
      }
      const call = { id: own.call_id, type: 'function', function: { name: own.name, arguments: own.arguments } }
      caller.message.tool_calls = [...((caller.message.tool_calls as object[] | undefined) ?? []), call]
    } else if (type === 'function_call_output') {
      all.push({ from, message: { role: 'tool', tool_call_id: own.call_id, content: contentOf(own.output) } })
      caller = undefined
    } else if (type === 'reasoning') {
      const parts = (own.content ?? []) as ReadonlyArray<{ readonly text?: unknown } | null>
      const text = Array.isArray(parts) ? parts.map(part => part?.text ?? '').join('') : ''
      reasoning = text === '' ? {} : { reasoning_content: text }
      caller = undefined
      continue
    } else {
      const known = 'message, function_call, function_call_output, reasoning'
      const problem =
        type === 'item_reference'
          ? 'this server stores nothing: send the item itself'
          : `unsupported type, expected one of ${known}`
      throw new ApiError(400, `${from}: ${problem}`, { param: from, code: 'unsupported_parameter' })
    }
    reasoning = {}
  }
  return all
}

/** Replaces the field names of chat completions in an error with those of this endpoint. */
function withOwnFieldNames(cause: ApiError, messages: readonly Message[]): ApiError {
  const own = (text: string) =>
    text
      .replaceAll(/\bmessages\[(\d+)\]/g, (_, i) => messages[i]?.from ?? 'input')
      .replaceAll(/\bmessages\b/g, 'input')
      .replaceAll('response_format.json_schema', 'text.format')
      .replaceAll('response_format', 'text.format')
      .replaceAll(/\b(tools\[\d+\])\.function/g, '$1')
      .replaceAll('tool_choice.function', 'tool_choice')
      .replaceAll('tool_choice.allowed_tools', 'tool_choice')
      .replaceAll(', allowed_tools: { mode, tools }', ', mode, tools')
      .replaceAll(', function: { name }', ', name')
      .replaceAll('reasoning_effort', 'reasoning.effort')
  const { status, message, param, code } = cause
  return new ApiError(status, own(message), {
    param: param === null ? undefined : own(param),
    code: code ?? undefined,
    cause,
  })
}

/** The request fields that the response repeats. */
const echoedFieldsOf = (given: Fields) => ({
  instructions: given.instructions ?? null,
  max_output_tokens: given.max_output_tokens ?? null,
  metadata: given.metadata ?? {},
  parallel_tool_calls: given.parallel_tool_calls ?? true,
  previous_response_id: null,
  reasoning: { effort: given.reasoning?.effort ?? null, summary: null },
  store: false,
  temperature: given.temperature ?? 1,
  text: given.text ?? { format: { type: 'text' } },
  tool_choice: given.tool_choice ?? 'auto',
  tools: given.tools ?? [],
  top_p: given.top_p ?? 1,
  truncation: 'disabled',
})

/** An output item: reasoning, a message or a function call. */
type Item = Record<string, unknown> & { readonly id: string }

interface OpenItem {
  readonly kind: 'message' | 'reasoning'
  readonly id: string
  text: string
  readonly logProbs: object[]
}

const part = {
  message: (text: string, logprobs: readonly object[]) => ({ type: 'output_text', text, annotations: [], logprobs }),
  reasoning: (text: string) => ({ type: 'reasoning_text', text }),
}
const names = { message: 'response.output_text', reasoning: 'response.reasoning_text' } as const

/** Builds one response, as stream events and as a complete object. */
class ResponseStream implements Stream {
  readonly last = []
  readonly #head: Head
  readonly #echoedFields: object
  readonly #items: Item[] = []
  /** The current unfinished item. */
  #open: OpenItem | undefined
  #finish: FinishReason | undefined
  #events = 0

  constructor(head: Head, { echoedFields = {} }: GenerationRequest) {
    this.#head = head
    this.#echoedFields = echoedFields
  }

  begin(): StreamEvent[] {
    const response = this.response()
    return [this.#event('response.created', { response }), this.#event('response.in_progress', { response })]
  }

  opening(): StreamEvent[] {
    return []
  }

  part(_: number, { reasoning, text, calls, logProbs }: GeneratedPart): StreamEvent[] {
    const { content = [] } = (logProbs ?? {}) as { content?: object[] }
    return [
      ...(reasoning === '' ? [] : this.#delta('reasoning', reasoning, [])),
      ...(text === '' && content.length === 0 ? [] : this.#delta('message', text, content)),
      ...calls.flatMap(({ id = newCallId(), name, arguments: json }) => {
        const own = { id: `fc_${randomUUID()}`, type: 'function_call', call_id: id, name }
        const at = { item_id: own.id, output_index: this.#items.length + (this.#open ? 1 : 0) }
        return [
          ...this.#close('completed'),
          this.#added({ ...own, arguments: '', status: 'in_progress' }),
          this.#event('response.function_call_arguments.delta', { ...at, delta: json }),
          this.#event('response.function_call_arguments.done', { ...at, name, arguments: json }),
          this.#done({ ...own, arguments: json, status: 'completed' }),
        ]
      }),
    ]
  }

  end(_: number, finish: FinishReason): StreamEvent[] {
    this.#finish = finish
    // A response without any text contains an empty message.
    const empty = this.#open === undefined && this.#items.length === 0 ? this.#begin('message') : []
    return [...empty, ...this.#close(finish === 'length' ? 'incomplete' : 'completed')]
  }

  over(usage: Usage): StreamEvent[] {
    const name = this.#finish === 'length' ? 'response.incomplete' : 'response.completed'
    return [this.#event(name, { response: this.response(usage) })]
  }

  failed({ code, message, param }: ApiError): StreamEvent[] {
    return [this.#event('error', { code, message, param })]
  }

  /** The response object with all items finished so far. */
  response(usage?: Usage): object {
    const isCut = this.#finish === 'length'
    return {
      id: this.#head.id,
      object: 'response',
      created_at: this.#head.created,
      status: this.#finish === undefined ? 'in_progress' : isCut ? 'incomplete' : 'completed',
      error: null,
      incomplete_details: isCut ? { reason: 'max_output_tokens' } : null,
      model: this.#head.model,
      output: [...this.#items],
      ...this.#echoedFields,
      usage: usage
        ? {
            input_tokens: usage.prompt,
            // Required by OpenAI's clients. The cache is written automatically, which is not counted.
            input_tokens_details: { cached_tokens: usage.cachedTokens, cache_write_tokens: 0 },
            output_tokens: usage.generated,
            output_tokens_details: { reasoning_tokens: usage.reasoning },
            total_tokens: usage.prompt + usage.generated,
          }
        : null,
    }
  }

  #event(type: string, more: object): StreamEvent {
    return { event: type, data: JSON.stringify({ type, sequence_number: this.#events++, ...more }) }
  }

  #added(item: Item): StreamEvent {
    return this.#event('response.output_item.added', { output_index: this.#items.length, item })
  }

  #done(item: Item): StreamEvent {
    this.#items.push(item)
    return this.#event('response.output_item.done', { output_index: this.#items.length - 1, item })
  }

  #delta(kind: 'message' | 'reasoning', text: string, logProbs: readonly object[]): StreamEvent[] {
    const before = this.#open?.kind === kind ? [] : [...this.#close('completed'), ...this.#begin(kind)]
    const open = this.#open as OpenItem
    open.text += text
    open.logProbs.push(...logProbs)
    const more = kind === 'message' ? { logprobs: logProbs } : {}
    return [...before, this.#event(`${names[kind]}.delta`, { ...this.#location(open.id), delta: text, ...more })]
  }

  #begin(kind: 'message' | 'reasoning'): StreamEvent[] {
    const id = `${kind === 'message' ? 'msg' : 'rs'}_${randomUUID()}`
    this.#open = { kind, id, text: '', logProbs: [] }
    return [
      this.#added(outputItem(kind, id, [], 'in_progress')),
      this.#event('response.content_part.added', { ...this.#location(id), part: part[kind]('', []) }),
    ]
  }

  #close(status: 'completed' | 'incomplete'): StreamEvent[] {
    if (this.#open === undefined) return []
    const { kind, id, text, logProbs } = this.#open
    this.#open = undefined
    const whole = part[kind](text, logProbs)
    const more = kind === 'message' ? { logprobs: logProbs } : {}
    return [
      this.#event(`${names[kind]}.done`, { ...this.#location(id), text, ...more }),
      this.#event('response.content_part.done', { ...this.#location(id), part: whole }),
      this.#done(outputItem(kind, id, [whole], status)),
    ]
  }

  #location(id: string) {
    return { item_id: id, output_index: this.#items.length, content_index: 0 }
  }
}

const outputItem = (kind: 'message' | 'reasoning', id: string, content: readonly object[], status: string): Item =>
  kind === 'message'
    ? { id, type: 'message', status, role: 'assistant', content }
    : { id, type: 'reasoning', summary: [], content, status }
