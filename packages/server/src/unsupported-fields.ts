/** @file Request fields of OpenAI's API and of other servers that are rejected with a reason, since ignoring them would change the answer. */

export interface UnsupportedField {
  /** Whether a value of a request asks for nothing, and is therefore accepted. */
  readonly isNoop: (value: unknown, body: object) => boolean
  /** What is wrong, and what to do instead; follows the name of the field. */
  readonly problem: string
}

const is =
  (...values: unknown[]) =>
  (value: unknown) =>
    values.includes(value)
const never = () => false
const isEmpty = (value: unknown) => typeof value === 'object' && Object.keys(value as object).length === 0
const isTextOnly = (value: unknown) => Array.isArray(value) && value.every(item => item === 'text')
const isPlainText = (value: unknown) =>
  typeof value === 'object' && (value as { type?: unknown } | null)?.type === 'text'

const noTools: UnsupportedField = {
  isNoop: isEmpty,
  problem: 'is not supported here: use tools of /v1/chat/completions',
}
const noFunctions: UnsupportedField = { isNoop: isEmpty, problem: 'is not supported: use tools and tool_choice' }
const noFormat: UnsupportedField = {
  isNoop: isPlainText,
  problem: 'is not supported here: use response_format of /v1/chat/completions',
}
const notSupported: UnsupportedField = { isNoop: never, problem: 'is not supported: omit it' }
const onlyText: UnsupportedField = { isNoop: never, problem: 'is not supported: this server generates only text' }
const onlyChats: UnsupportedField = { isNoop: never, problem: 'is not supported here: use /v1/chat/completions' }
const noContinuation: UnsupportedField = { isNoop: is(false), problem: 'is not supported: use /v1/completions' }

/** By name. Endpoints support some of them. */
export const unsupportedFields: Readonly<Record<string, UnsupportedField>> = {
  n: { isNoop: is(1), problem: 'is not supported here: send several requests' },
  best_of: {
    // With as many candidates as choices, there is nothing to select.
    isNoop: (value, body) => value === ((body as { n?: unknown }).n ?? 1),
    problem: 'is not supported: use n, and select the best choice in the client',
  },
  suffix: { isNoop: is(''), problem: 'is not supported here: use /v1/completions' },
  echo: { isNoop: is(false), problem: 'is not supported here: use /v1/completions' },
  top_logprobs: { isNoop: is(0), problem: 'is not supported here: set logprobs to a number' },
  prompt_logprobs: { isNoop: is(false), problem: 'is not supported: use echo and logprobs of /v1/completions' },
  repeat_penalty: { isNoop: is(1), problem: 'is called repetition_penalty here' },
  messages: onlyChats,
  chat_template: { isNoop: never, problem: 'is not supported: it is set when the server starts' },
  chat_template_kwargs: { ...onlyChats, isNoop: isEmpty },
  continue_final_message: noContinuation,
  add_generation_prompt: { ...noContinuation, isNoop: is(true) },
  thinking: { isNoop: never, problem: "is not supported: use chat_template_kwargs with the template's variable" },
  reasoning_effort: onlyChats,
  verbosity: { isNoop: is('medium'), problem: 'is not supported: ask for a short or long answer in a message' },
  instructions: { isNoop: is(''), problem: 'is not supported here: send a message with the role system' },
  tools: noTools,
  tool_choice: { ...noTools, isNoop: is('none', 'auto') },
  parallel_tool_calls: { ...noTools, isNoop: is(true, false) },
  functions: noFunctions,
  function_call: { ...noFunctions, isNoop: is('none', 'auto') },
  web_search_options: { isNoop: never, problem: 'is not supported: this server runs no tools' },
  response_format: noFormat,
  grammar: { ...noFormat, isNoop: is('') },
  json_schema: noFormat,
  guided_json: noFormat,
  guided_regex: noFormat,
  guided_choice: noFormat,
  guided_grammar: noFormat,
  structured_outputs: noFormat,
  modalities: { isNoop: isTextOnly, problem: onlyText.problem },
  audio: onlyText,
  image: onlyText,
  moderation: notSupported,
  access_programs: notSupported,
  context_management: { isNoop: isEmpty, problem: 'is not supported: shorten the conversation in the client' },
  store: { isNoop: is(false), problem: 'is not supported: this server stores nothing' },
  min_tokens: { ...notSupported, isNoop: is(0) },
  ignore_eos: { ...notSupported, isNoop: is(false) },
  stop_token_ids: { isNoop: isEmpty, problem: 'is not supported: use stop, which takes strings' },
  include_stop_str_in_output: { ...notSupported, isNoop: is(false) },
  skip_special_tokens: { ...notSupported, isNoop: is(true) },
  bad_words: { isNoop: isEmpty, problem: 'is not supported: use logit_bias' },
  use_beam_search: { ...notSupported, isNoop: is(false) },
}
