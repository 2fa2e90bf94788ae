/** @file Conversations to fine-tune on: the assistant's answers are learned, everything else is context. */
import { resolve } from 'node:path'
import { pathOf } from '@moe/checkpoint'
import { checkOptions, MoeError } from '@moe/core'
import type { TextTokenizer } from '../model.ts'
import { holdOut } from './corpus.ts'
import { utf8Bytes } from './documents.ts'
import { findFiles, readLines, withoutHeldOut } from './files.ts'
import { type Example, noTokenizer, TokenDataset, tokenNamed } from './token-dataset.ts'

/** A message. Members that only the template uses, such as `name` or `tool_calls`, are passed to it unchanged. */
export interface Message {
  /**
   * `system`, `user`, `assistant`, or another role that the template knows. Messages of the `assistant` are learned.
   */
  readonly role: string
  /** Text of the message. */
  readonly content: string
  /** 0 for an answer that is not learned, as in OpenAI's fine-tuning files. Default 1. */
  readonly weight?: 0 | 1
  readonly [name: string]: unknown
}

/** The messages of a conversation, oldest first. */
export type Conversation = readonly Message[]

/** Renders conversations in the model's prompt format. `ChatTemplate` of `@moe/tokenizer-bpe/data` implements it. */
export interface ConversationTemplate {
  /**
   * Returns the text of messages, including special tokens. With `addGenerationPrompt`, it ends where the answer
   * begins.
   */
  render(messages: Conversation, options: { addGenerationPrompt: boolean }): string
  /** Returns the content of `tokenizer_config.json`, which every checkpoint stores next to the model. */
  toJSON?(): unknown
}

/** Training and held-out conversations, with their chat template. */
export interface Conversations {
  /** Conversations to train on. */
  readonly training: readonly Conversation[]
  /** Held-out conversations; may be empty. */
  readonly validation: readonly Conversation[]
  /** The chat template for training and inference. */
  readonly template: ConversationTemplate
}

/** Options of `conversations`. */
export interface ConversationOptions {
  /** The chat template for training and inference. */
  readonly template: ConversationTemplate
  /** Held-out conversations: a fraction in [0, 1), drawn by `seed`, or the conversations themselves. Default 0. */
  readonly validation?: number | Iterable<Conversation> | undefined
  /** Seed of the draw of held-out conversations. Default 0. */
  readonly seed?: number | undefined
}

/** Options of `conversationFiles`. */
export interface ConversationFilesOptions {
  /** The chat template for training and inference. */
  readonly template: ConversationTemplate
  /** As in `ConversationOptions`, or glob patterns of the files to hold out. */
  readonly validation?: number | { readonly files: string | readonly string[] } | undefined
  /** As in `ConversationOptions`. */
  readonly seed?: number | undefined
  /** Folder that patterns and paths are relative to. Default: the current one. */
  readonly cwd?: string | URL | undefined
}

const refused = (op: string, problem: string, fix: string, details?: Record<string, unknown>) =>
  new MoeError({ code: 'E_DATA', op, problem, fix, ...(details && { details }) })

/**
 * Returns conversations from memory, as `data` for `train`.
 *
 * @throws MoeError E_DATA for an invalid conversation, or one without an answer to learn
 */
export function conversations(all: Iterable<Conversation>, options: ConversationOptions): Conversations {
  checkOptions('conversations', options, { template: true, validation: true, seed: true })
  const { template, validation = 0, seed = 0 } = options
  checkTemplate('conversations', template)
  const op = 'conversations'
  const checked = (given: Iterable<Conversation>, what: string) =>
    Array.from(given, (conversation, i) => checkConversation(op, conversation, `${what} ${i}`))
  const training = checked(all, 'conversation')
  if (typeof validation === 'number') return { ...split(op, training, validation, seed), template }
  return { training, validation: checked(validation, 'held-out conversation'), template }
}

/**
 * Reads conversations from JSON Lines files, as `data` for `train`. Each line is `{"messages": [{"role": "user",
 * "content": "…"}, …]}` or only the list, as in OpenAI's and Hugging Face's files. Lines with `tools` are refused.
 *
 * @throws MoeError E_DATA, with file and line, for an invalid conversation, or one without an answer to learn
 */
export function conversationFiles(
  patterns: string | readonly string[],
  options: ConversationFilesOptions,
): Conversations {
  const op = 'conversationFiles'
  checkOptions(op, options, { template: true, validation: true, seed: true, cwd: true })
  const { template, validation = 0, seed = 0, cwd: relativeTo = '.' } = options
  checkTemplate(op, template)
  const cwd = resolve(pathOf(op, relativeTo))
  const read = (paths: readonly string[]) => paths.flatMap(path => readConversations(op, path))
  const paths = findFiles(op, patterns, cwd)
  if (typeof validation === 'number') return { ...split(op, read(paths), validation, seed), template }
  const heldOut = findFiles(op, validation?.files, cwd)
  return { training: read(withoutHeldOut(paths, heldOut)), validation: read(heldOut), template }
}

function split(op: string, all: Conversation[], fraction: number, seed: number) {
  if (all.length === 1 && fraction > 0) {
    throw refused(op, 'there is only one conversation, so none can be held out', 'add more, or pass validation: 0')
  }
  return holdOut(op, all, fraction, seed)
}

/**
 * Tokenizes conversations, one example each. For every answer, the learned tokens are what the template adds after the
 * generation prompt, including the end token. Prompts and answers are tokenized separately, as in generation. If a
 * template changes how it renders earlier messages once there are later ones (for example, by dropping reasoning), the
 * conversation becomes several examples, so that each answer follows the context in which it is generated.
 *
 * @throws MoeError E_DATA if the template does not render an answer directly after its generation prompt
 */
export function tokenizeConversations(
  all: Iterable<Conversation>,
  tokenizer: TextTokenizer,
  template: ConversationTemplate,
): TokenDataset {
  if (typeof tokenizer?.encode !== 'function') throw noTokenizer(tokenizer)
  const examples: Example[] = []
  let textBytes = 0
  let number = 0
  for (const conversation of all) {
    for (const parts of renderedParts(conversation, template, number++)) examples.push(tokenized(parts, tokenizer))
    for (const message of conversation) if (isLearned(message)) textBytes += utf8Bytes(message.content)
  }
  const { vocabSize } = tokenizer
  return TokenDataset.fromExamples(examples, { vocabSize, textBytes, padding: tokenNamed(tokenizer, 'end') ?? 0 })
}

interface Part {
  readonly text: string
  readonly learned: boolean
}

/**
 * Renders a conversation in parts that are learned or not. Returns several lists if later messages change how earlier
 * ones are rendered.
 */
function renderedParts(conversation: Conversation, template: ConversationTemplate, number: number): Part[][] {
  const examples: Part[][] = []
  let written = ''
  conversation.forEach((message, i) => {
    if (!isLearned(message)) return
    const prompt = template.render(conversation.slice(0, i), { addGenerationPrompt: true })
    const answered = template.render(conversation.slice(0, i + 1), { addGenerationPrompt: false })
    if (!answered.startsWith(prompt) || answered.length === prompt.length) {
      throw refused(
        'conversations',
        `the template does not render message ${i} of conversation ${number} directly after its generation prompt: the messages end with ${JSON.stringify(answered.slice(-60))}, the prompt with ${JSON.stringify(prompt.slice(-60))}`,
        'use a template whose add_generation_prompt writes exactly what its answers begin with',
        { conversation: number, message: i },
      )
    }
    if (examples.length === 0 || !prompt.startsWith(written)) {
      examples.push([])
      written = ''
    }
    const parts = examples[examples.length - 1]
    parts.push(
      { text: prompt.slice(written.length), learned: false },
      { text: answered.slice(prompt.length), learned: true },
    )
    written = answered
  })
  return examples
}

function tokenized(parts: readonly Part[], tokenizer: TextTokenizer): Example {
  const encoded = parts.map(({ text }) => tokenizer.encode(text, { addSpecialTokens: false, parseSpecialTokens: true }))
  return {
    tokens: encoded.flatMap(ids => Array.from(ids)),
    lossMask: parts.flatMap(({ learned }, i) => Array.from(encoded[i], () => learned)),
  }
}

const isLearned = ({ role, weight }: Message) => role === 'assistant' && weight !== 0

export function checkTemplate(op: string, template: ConversationTemplate): void {
  if (typeof template?.render === 'function') return
  const given = (template as unknown) instanceof Promise ? 'a promise' : `${template}`
  throw new MoeError({
    code: 'E_CONFIG',
    op,
    problem: `template is ${given}, expected an object with a method render`,
    fix: 'pass await ChatTemplate.from({ chat_template, bos_token, eos_token }) of @moe/tokenizer-bpe/data',
  })
}

/** @param what its name in error messages */
function checkConversation(op: string, given: unknown, what: string): Conversation {
  const listed = Array.isArray(given) ? given : (given as { messages?: unknown } | null)?.messages
  if (!Array.isArray(listed)) {
    throw refused(op, `${what} is not a list of messages`, 'pass [{ role, content }, …] or { messages: […] }')
  }
  const { tools = [] } = given as { readonly tools?: readonly unknown[] | null }
  if ((tools?.length ?? 0) > 0) {
    const fix = 'describe them in a system message, as the model will see them, and remove tools'
    throw refused(op, `${what} has tools, which are not passed to the template`, fix)
  }
  listed.forEach((message: Message | null, i) => {
    const wrong = (['role', 'content'] as const).find(name => typeof message?.[name] !== 'string')
    if (wrong !== undefined) {
      throw refused(op, `${wrong} of message ${i} of ${what} is not a string`, 'pass { role: "user", content: "…" }')
    }
    const { weight } = message as { weight?: unknown }
    if (weight !== undefined && weight !== 0 && weight !== 1) {
      throw refused(op, `message ${i} of ${what} has weight ${JSON.stringify(weight)}`, 'pass 0 or 1')
    }
  })
  if (!listed.some(isLearned)) {
    const fix = 'include a message with the role assistant and without weight 0, or leave out the conversation'
    throw refused(op, `${what} has no answer to learn`, fix)
  }
  return listed
}

function readConversations(op: string, path: string): Conversation[] {
  return readLines(op, path).flatMap((line, i) => {
    if (line.trim() === '') return []
    const what = `${path}:${i + 1}`
    let given: unknown
    try {
      given = JSON.parse(line)
    } catch (cause) {
      const fix = 'write one conversation as JSON on each line (.jsonl), not a JSON array over several lines'
      throw refused(op, `${what} is not JSON: ${(cause as Error).message}`, fix, { path, line: i + 1 })
    }
    return [checkConversation(op, given, what)]
  })
}
