/** @file Conversations to fine-tune on: what the assistant says is learned, all else is what it answers to. */
import { resolve } from 'node:path'
import { pathOf } from '@moe/checkpoint'
import { checkOptions, MoeError } from '@moe/core'
import type { TextTokenizer } from '../model.ts'
import { holdOut } from './corpus.ts'
import { utf8Bytes } from './documents.ts'
import { findFiles, readLines, withoutHeldOut } from './files.ts'
import { type Example, noTokenizer, TokenDataset, tokenNamed } from './token-dataset.ts'

/** A turn. Members that only the template knows (`name`, `tool_calls`) go to it as they are. */
export interface Message {
  /** `system`, `user`, `assistant`, or another that the template knows. What an `assistant` says is learned. */
  readonly role: string
  /** What is said. */
  readonly content: string
  /** 0 for an answer that is not to be learned, as in OpenAI's fine-tuning files. Default 1. */
  readonly weight?: 0 | 1
  readonly [name: string]: unknown
}

/** Turns, oldest first. */
export type Conversation = readonly Message[]

/** Writes conversations as the model is to read them; `ChatTemplate` of `@moe/tokenizer-bpe/data` is one. */
export interface ConversationTemplate {
  /** Text with special tokens written out. With `addGenerationPrompt` it ends where an answer begins. */
  render(messages: Conversation, options: { addGenerationPrompt: boolean }): string
  /** Content of `tokenizer_config.json`, stored beside the model in every checkpoint. */
  toJSON?(): unknown
}

/** Conversations to learn, and conversations that are only measured on. */
export interface Conversations {
  /** Conversations to learn. */
  readonly training: readonly Conversation[]
  /** Conversations that are measured on; may be empty. */
  readonly validation: readonly Conversation[]
  /** Writes them, in training as in use. */
  readonly template: ConversationTemplate
}

/** How conversations are written, and which are held out. */
export interface ConversationOptions {
  /** Writes the conversations, in training as in use. */
  readonly template: ConversationTemplate
  /** Held-out conversations: a fraction in [0, 1), drawn by `seed`, or the conversations themselves. Default 0. */
  readonly validation?: number | Iterable<Conversation>
  /** Names the draw of held-out conversations. Default 0. */
  readonly seed?: number
}

/** How conversations of files are written, and which are held out. */
export interface ConversationFilesOptions {
  /** Writes the conversations, in training as in use. */
  readonly template: ConversationTemplate
  /** As in `ConversationOptions`, or glob patterns of the files to hold out. */
  readonly validation?: number | { readonly files: string | readonly string[] }
  /** As in `ConversationOptions`. */
  readonly seed?: number
  /** Folder that patterns and paths are relative to. Default: the current one. */
  readonly cwd?: string | URL
}

const refused = (op: string, problem: string, fix: string, details?: Record<string, unknown>) =>
  new MoeError({ code: 'E_DATA', op, problem, fix, ...(details && { details }) })

/**
 * Conversations in memory, for the `data` of `train`.
 * @throws MoeError E_DATA for what is no conversation, and for one without an answer to learn
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
 * Conversations from JSON Lines files: `{"messages": [{"role": "user", "content": "…"}, …]}` or the list alone on each line, as OpenAI and Hugging Face have them.
 * @throws MoeError E_DATA, with file and line, for a line that is none, and for a conversation without an answer to learn
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
    throw refused(op, 'there is one conversation, so that none can be held out', 'give more, or validation: 0')
  }
  return holdOut(op, all, fraction, seed)
}

/**
 * The tokens of conversations, an example each: what the template writes between the end of a prompt (where `generate` would go on) and the end of the answer is
 * learned, its end token included. Prompts and answers are tokenized apart, as they are when the model answers. Where a template writes earlier turns in
 * another way once there are later ones (leaves out what was thought), a conversation is several examples, each with one answer that is read as it was given.
 * @throws MoeError E_DATA where the template's answers do not begin with what it ends a prompt with
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

/** What the template makes of a conversation, in parts that are learned or not; several lists where later turns change what stands before. */
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
        `the template writes message ${i} of conversation ${number} otherwise than behind the prompt that it makes of the messages before: ${JSON.stringify(answered.slice(-60))} against ${JSON.stringify(prompt.slice(-60))}`,
        'take a template whose add_generation_prompt writes just what its answers begin with',
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
    learned: parts.flatMap(({ learned }, i) => Array.from(encoded[i], () => learned)),
  }
}

const isLearned = ({ role, weight }: Message) => role === 'assistant' && weight !== 0

export function checkTemplate(op: string, template: ConversationTemplate): void {
  if (typeof template?.render === 'function') return
  const given = (template as unknown) instanceof Promise ? 'a promise' : `${template}`
  throw new MoeError({
    code: 'E_CONFIG',
    op,
    problem: `template is ${given}, which does not render`,
    fix: 'pass await ChatTemplate.from({ chat_template, bos_token, eos_token }) of @moe/tokenizer-bpe/data',
  })
}

/** @param what names it in errors */
function checkConversation(op: string, given: unknown, what: string): Conversation {
  const listed = Array.isArray(given) ? given : (given as { messages?: unknown } | null)?.messages
  if (!Array.isArray(listed)) {
    throw refused(op, `${what} is no list of messages`, 'it is [{ role, content }, …], or { messages: […] }')
  }
  listed.forEach((message: Message | null, i) => {
    const wrong = (['role', 'content'] as const).find(name => typeof message?.[name] !== 'string')
    if (wrong !== undefined) {
      throw refused(op, `message ${i} of ${what} has no ${wrong} that is text`, 'it is { role: "user", content: "…" }')
    }
    const { weight } = message as { weight?: unknown }
    if (weight !== undefined && weight !== 0 && weight !== 1) {
      throw refused(op, `message ${i} of ${what} has weight ${JSON.stringify(weight)}`, 'it is 0 or 1')
    }
  })
  if (!listed.some(isLearned)) {
    const fix = 'one with the role assistant, and no weight of 0, is what is learned; leave out conversations without'
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
      const fix = 'each line is a conversation in JSON (.jsonl); a list of them over several lines is not'
      throw refused(op, `${what} is no JSON: ${(cause as Error).message}`, fix, { path, line: i + 1 })
    }
    return [checkConversation(op, given, what)]
  })
}
