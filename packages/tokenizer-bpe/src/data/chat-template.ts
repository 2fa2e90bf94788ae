/** @file Chat templates of Hugging Face (`tokenizer_config.json`), rendered by @huggingface/jinja, an optional peer. */
import { checkCall } from '../check-call.ts'
import { TokenizerError } from '../errors.ts'
import { describe } from '../json/check.ts'
import { boundedRender, type Jinja, TooManySteps } from './bounded-render.ts'

/** One message of a conversation; what else a template reads of it may stand beside. */
export interface ChatMessage {
  /** `system`, `user`, `assistant`, `tool`: what the template knows. */
  readonly role: string
  /** Its text. */
  readonly content: string
  readonly [key: string]: unknown
}

/** What a template is given besides the messages. */
export interface ChatOptions {
  /** Ends the text where the assistant's answer starts. Default true. */
  readonly addGenerationPrompt?: boolean
  /** More variables for the template, e.g. `tools`. */
  readonly variables?: Readonly<Record<string, unknown>>
}

/** The parts of tokenizer_config.json that a template needs. */
export interface ChatConfig {
  /** The template's text, or several by name. */
  readonly chat_template?: string | readonly { readonly name: string; readonly template: string }[]
  readonly [key: string]: unknown
}

/**
 * A template for models without tokens for roles, in the way of DeepSeek-V2: `User: …`, an empty line, `Assistant: …` and the end token. It needs `eos_token`; a
 * `bos_token` comes first where it is given. Tools (`variables: { tools }`, as OpenAI describes them) are told of in front, a line each; calls of them are written as
 * Hermes does, results as `Tool: …`.
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

/** Renders conversations into text with special tokens written out; encode it with `addSpecialTokens: false`. */
export class ChatTemplate {
  readonly #render: (variables: Record<string, unknown>) => string
  readonly #tokens: Record<string, string>
  readonly #source: string | undefined

  /**
   * Use `ChatTemplate.from`.
   * @param source of the template that `render` renders, for `toJSON`
   * @throws TokenizerError E_CONFIG when `render` is no function
   */
  constructor(render: (variables: Record<string, unknown>) => string, tokens: Record<string, string>, source?: string) {
    if (typeof render !== 'function') {
      const problem = `${describe(render)} is no function that renders`
      const fix = 'await ChatTemplate.from({ chat_template: text }) reads a template'
      throw new TokenizerError({ code: 'E_CONFIG', op: 'ChatTemplate', problem, fix })
    }
    this.#render = render
    this.#tokens = tokens
    this.#source = source
  }

  /**
   * Reads the template of a parsed tokenizer_config.json.
   * @param name which one, where there are several
   * @throws TokenizerError E_FORMAT without a template that can be read, E_UNSUPPORTED when @huggingface/jinja is not installed
   */
  static async from(config: ChatConfig, name = 'default'): Promise<ChatTemplate> {
    const found = config?.chat_template
    const several = Array.isArray(found) ? (found as ReadonlyArray<{ name: string; template: string }>) : undefined
    const source = several ? several.find(item => item.name === name)?.template : found
    if (typeof source !== 'string') {
      throw new TokenizerError({
        code: 'E_FORMAT',
        op: 'ChatTemplate.from',
        problem: `tokenizer_config.json has no chat_template${several ? ` called ${name}` : ''}`,
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
      const problem = `chat_template cannot be read: ${(cause as Error).message}`
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
   * @throws TokenizerError E_DATA with the template's own words when it refuses the conversation; when it takes far more steps than a template does,
   *   as one may that was made to loop for ever
   */
  render(messages: readonly ChatMessage[], options: ChatOptions = {}): string {
    checkCall('ChatTemplate.render', options)
    if (!Array.isArray(messages)) {
      throw new TokenizerError({
        code: 'E_DATA',
        op: 'ChatTemplate.render',
        problem: `the messages are ${describe(messages)}`,
        fix: "pass a list of them: [{ role: 'user', content: 'Hi' }]",
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
        ...(endless ? { fix: 'do not trust it, or the files that it came with' } : {}),
        cause,
      })
    }
  }

  /** Content of a tokenizer_config.json from which `from` and transformers make it again; undefined for a template made of a function. */
  toJSON(): ChatConfig | undefined {
    if (this.#source === undefined) return undefined
    return { tokenizer_class: 'PreTrainedTokenizerFast', ...this.#tokens, chat_template: this.#source }
  }
}
