/**
 * @file Renders chat templates of Hugging Face (`tokenizer_config.json`) with @huggingface/jinja, an optional peer
 * dependency.
 */

import { TokenizerError } from '../errors.ts'
import { describe } from '../json/check.ts'
import { type CallRules, validateCall } from '../validate-call.ts'
import { boundedRender, type Jinja, TooManySteps } from './bounded-render.ts'

/** A message of a conversation. Templates may use further fields. */
export interface ChatMessage {
  /** `system`, `user`, `assistant` or `tool`, or any other role that the template supports. */
  readonly role: string
  /** Text of the message. */
  readonly content: string
  readonly [key: string]: unknown
}

/** Options of `ChatTemplate.render`. */
export interface ChatOptions {
  /** Whether the text ends with the start of an assistant message. Default true. */
  readonly addGenerationPrompt?: boolean | undefined
  /** Additional variables for the template, for example `tools`. */
  readonly variables?: Readonly<Record<string, unknown>> | undefined
}

const rules: CallRules<ChatOptions> = { options: { addGenerationPrompt: true, variables: true } }

/** The fields of tokenizer_config.json that a template needs. */
export interface ChatConfig {
  /** Text of the template, or several named templates. */
  readonly chat_template?: string | readonly { readonly name: string; readonly template: string }[] | undefined
  readonly [key: string]: unknown
}

/**
 * A template for models without role tokens, in the format of DeepSeek-V2: `User: …`, an empty line, `Assistant: …` and
 * the end token. Requires `eos_token`; starts with `bos_token` if given. Tools (`variables: { tools }`, in OpenAI's
 * format) are listed at the start, one per line. Tool calls are formatted as in Hermes, results as `Tool: …`.
 */
export const plainChatTemplate = [
  '{% if bos_token %}{{ bos_token }}{% endif %}',
  '{% if tools %}{{ \'To call a tool, write <tool_call>, {"name": its name, "arguments": its arguments} and </tool_call>. Tools:\n\' }}',
  "{% for tool in tools %}{{ (tool['function'] | tojson) + '\n' }}{% endfor %}{{ '\n' }}{% endif %}",
  "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}",
  "{% elif message['role'] == 'assistant' and message['tool_calls'] %}",
  "{{ 'Assistant:' }}{% if message['content'] %}{{ ' ' + message['content'] + '\n' }}{% endif %}",
  "{% for call in message['tool_calls'] %}{% set given = call['function']['arguments'] %}",
  "{{ '<tool_call>\n{\"name\": \"' + call['function']['name'] + '\", \"arguments\": ' }}",
  "{% if given is string %}{{ given }}{% else %}{{ given | tojson }}{% endif %}{{ '}\n</tool_call>' }}{% endfor %}{{ eos_token }}",
  "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}",
  "{% elif message['role'] == 'tool' %}{{ 'Tool: ' + message['content'] + '\n\n' }}",
  "{% else %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}",
  "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
].join('')

/** Renders conversations as text with special tokens. Encode the text with `addSpecialTokens: false`. */
export class ChatTemplate {
  readonly #render: (variables: Record<string, unknown>) => string
  readonly #tokens: Record<string, string>
  readonly #source: string | undefined

  /**
   * Use `ChatTemplate.from`.
   * @param source text of the template that `render` renders, for `toJSON`
   * @throws TokenizerError E_CONFIG if `render` is not a function
   */
  constructor(render: (variables: Record<string, unknown>) => string, tokens: Record<string, string>, source?: string) {
    if (typeof render !== 'function') {
      const problem = `expected a render function, got ${describe(render)}`
      const fix = 'use await ChatTemplate.from({ chat_template: text }) to parse a template'
      throw new TokenizerError({ code: 'E_CONFIG', op: 'ChatTemplate', problem, fix })
    }
    this.#render = render
    this.#tokens = tokens
    this.#source = source
  }

  /**
   * Parses the template of a tokenizer_config.json.
   * @param name name of the template, if there are several
   * @throws TokenizerError E_FORMAT for a missing or invalid template, E_UNSUPPORTED if @huggingface/jinja is not
   * installed
   */
  static async from(config: ChatConfig, name = 'default'): Promise<ChatTemplate> {
    const found = config?.chat_template
    const several = Array.isArray(found) ? (found as ReadonlyArray<{ name: string; template: string }>) : undefined
    const source = several ? several.find(item => item.name === name)?.template : found
    if (typeof source !== 'string') {
      throw new TokenizerError({
        code: 'E_FORMAT',
        op: 'ChatTemplate.from',
        problem: `tokenizer_config.json has no chat_template${several ? ` named ${name}` : ''}`,
        fix: several
          ? `it has ${several.map(item => item.name).join(', ')}: pass the name of one`
          : 'pass the parsed config of a chat model (newer ones have the template in chat_template.jinja: { ...config, chat_template: text })',
      })
    }
    let jinja: Jinja
    try {
      jinja = (await import('@huggingface/jinja')) as unknown as Jinja
    } catch (cause) {
      throw new TokenizerError({
        code: 'E_UNSUPPORTED',
        op: 'ChatTemplate.from',
        problem: '@huggingface/jinja is not installed',
        fix: 'npm i @huggingface/jinja',
        cause,
      })
    }
    let render: (variables: Record<string, unknown>) => string
    try {
      render = boundedRender(jinja, source)
    } catch (cause) {
      const problem = `invalid chat_template: ${(cause as Error).message}`
      throw new TokenizerError({ code: 'E_FORMAT', op: 'ChatTemplate.from', problem, cause })
    }
    const tokens: Record<string, string> = {}
    for (const key of ['bos_token', 'eos_token', 'pad_token', 'unk_token']) {
      const token = config[key]
      if (typeof token === 'string') tokens[key] = token
      else if (typeof token === 'object' && token !== null && 'content' in token) tokens[key] = String(token.content)
    }
    return new ChatTemplate(render, tokens, source)
  }

  /**
   * Renders a conversation.
   * @throws TokenizerError E_DATA with the template's message if it rejects the conversation, or if it takes far more
   * steps than a template needs, for example in an endless loop
   */
  render(messages: readonly ChatMessage[], options: ChatOptions = {}): string {
    validateCall('ChatTemplate.render', rules, options)
    if (!Array.isArray(messages)) {
      throw new TokenizerError({
        code: 'E_DATA',
        op: 'ChatTemplate.render',
        problem: `expected a list of messages, got ${describe(messages)}`,
        fix: "pass for example [{ role: 'user', content: 'Hi' }]",
      })
    }
    try {
      return this.#render({
        ...this.#tokens,
        messages,
        add_generation_prompt: options.addGenerationPrompt ?? true,
        ...options.variables,
      })
    } catch (cause) {
      const endless = cause instanceof TooManySteps
      throw new TokenizerError({
        code: 'E_DATA',
        op: 'ChatTemplate.render',
        problem: endless
          ? 'the template takes far more steps than a conversation of this length needs'
          : (cause as Error).message,
        ...(endless ? { fix: 'the template may be malicious; do not use it' } : {}),
        cause,
      })
    }
  }

  /**
   * Returns the content of a tokenizer_config.json that `from` and transformers can read; undefined for a template
   * created from a function.
   */
  toJSON(): ChatConfig | undefined {
    if (this.#source === undefined) return undefined
    return { tokenizer_class: 'PreTrainedTokenizerFast', ...this.#tokens, chat_template: this.#source }
  }
}
