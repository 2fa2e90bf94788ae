/** @file `moe-serve --chat`: a conversation in the terminal. It is a client of the server's application, which needs no port for it. */
import { createInterface } from 'node:readline'
import type { Readable, Writable } from 'node:stream'
import { text as readAll } from 'node:stream/consumers'
import type { ApiError } from './errors.ts'

/** What a conversation needs of the application that `createServer` returns. */
export interface ChatServer {
  request(path: string, init: RequestInit): Response | Promise<Response>
}

type Terminal<Stream> = Stream & { readonly isTTY?: boolean }

export interface TerminalChatOptions {
  readonly app: ChatServer
  /** Name of the model. */
  readonly model: string
  /** Context length in tokens. */
  readonly context: number
  /** A terminal, whose lines are messages, or anything else, whose whole text is one message. */
  readonly input: Terminal<Readable>
  /** Receives the answers. */
  readonly output: Terminal<Writable>
  /** Receives everything else: reasoning, figures, errors. */
  readonly notes: Terminal<Writable>
  /** Emits SIGINT on Ctrl-C during an answer. */
  readonly signals: Pick<NodeJS.EventEmitter, 'on' | 'off'>
  /** Whether to write each answer as one line of JSON. */
  readonly json?: boolean | undefined
  /** Whether to write no reasoning and no figures. */
  readonly quiet?: boolean | undefined
  readonly color?: boolean | undefined
}

interface Message {
  readonly role: 'system' | 'user' | 'assistant'
  readonly content: string
  readonly reasoning_content?: string
}

interface Usage {
  readonly prompt_tokens: number
  readonly completion_tokens: number
}

interface Delta {
  readonly content?: string
  readonly reasoning_content?: string
}

/** What is used of a chunk of the stream. */
interface Chunk {
  readonly choices?: ReadonlyArray<{ readonly delta: Delta; readonly finish_reason: string | null }>
  readonly usage?: Usage | null
  readonly error?: ReturnType<ApiError['toJSON']>['error']
}

interface Answer {
  readonly message: Message
  /** Null if the answer was interrupted. */
  readonly finish: string | null
  readonly usage: Usage | undefined
  /** Seconds from the first part to the last. */
  readonly seconds: number
}

const HELP = `A line is a message. End it with \\ to continue it on the next line; pasted lines are one message.

  /clear            forget the conversation
  /system TEXT      set the system message; without TEXT, remove it
  /set NAME VALUE   set a parameter of the chat API, such as temperature, top_p, seed, max_tokens; without VALUE, remove it
  /help             print this help
  /exit             end (or Ctrl-D)

Ctrl-C stops an answer.
`

/** Fields of requests that the conversation sets. */
const ownFields = ['messages', 'model', 'stream', 'stream_options', 'n', 'tools', 'tool_choice']

/** The server's answer to a request that it rejects. */
export class RejectedError extends Error {}

/** The messages so far, and the settings of requests. */
class Conversation {
  readonly settings: Record<string, unknown> = {}
  system: string | undefined
  readonly #app: ChatServer
  readonly #model: string
  #messages: readonly Message[] = []

  constructor({ app, model }: Pick<TerminalChatOptions, 'app' | 'model'>) {
    this.#app = app
    this.#model = model
  }

  clear(): void {
    this.#messages = []
  }

  /**
   * Sends a message. It and its answer are remembered, also if the answer is interrupted after it has begun.
   * @throws RejectedError if the server rejects the request
   */
  async send(content: string, onDelta: (delta: Delta) => void, signal: AbortSignal): Promise<Answer> {
    const sent: readonly Message[] = [...this.#messages, { role: 'user', content }]
    const answer = await this.#answerTo(sent, onDelta, signal)
    const { message, finish } = answer
    if (finish !== null || message.content || message.reasoning_content) this.#messages = [...sent, message]
    return answer
  }

  async #answerTo(sent: readonly Message[], onDelta: (delta: Delta) => void, signal: AbortSignal): Promise<Answer> {
    const system: readonly Message[] = this.system === undefined ? [] : [{ role: 'system', content: this.system }]
    const body = {
      ...this.settings,
      model: this.#model,
      messages: [...system, ...sent],
      stream: true,
      stream_options: { include_usage: true },
    }
    const response = await this.#app.request('/v1/chat/completions', {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify(body),
      signal,
    })
    if (!response.ok && !signal.aborted) throw rejected(((await response.json()) as Required<Chunk>).error)
    let content = ''
    let reasoning = ''
    let finish: string | null = null
    let usage: Usage | undefined
    let first: number | undefined
    for await (const { choices = [], usage: counted, error } of chunks(response)) {
      if (signal.aborted) break
      if (error) throw rejected(error)
      usage = counted ?? usage
      for (const { delta, finish_reason } of choices) {
        finish = finish_reason ?? finish
        const { content: text = '', reasoning_content: thought = '' } = delta
        if (text === '' && thought === '') continue
        first ??= performance.now()
        content += text
        reasoning += thought
        onDelta(delta)
      }
    }
    const message: Message = { role: 'assistant', content, ...(reasoning && { reasoning_content: reasoning }) }
    return { message, finish, usage, seconds: (performance.now() - (first ?? performance.now())) / 1000 }
  }
}

function rejected({ message, code }: NonNullable<Chunk['error']>): RejectedError {
  const fix = code === 'context_length_exceeded' ? '; /clear starts a new conversation' : ''
  return new RejectedError(message + fix)
}

/** The events of a stream, up to `[DONE]`. */
async function* chunks(response: Response): AsyncGenerator<Chunk> {
  const decoder = new TextDecoder()
  let text = ''
  for await (const bytes of response.body as unknown as AsyncIterable<Uint8Array>) {
    text += decoder.decode(bytes, { stream: true })
    const events = text.split('\n\n')
    text = events.pop() as string
    for (const event of events) {
      const data = event.replace(/^data: /, '')
      if (data === '[DONE]') return
      yield JSON.parse(data)
    }
  }
}

/**
 * Chats until the input ends.
 * @returns false if the input is not a terminal, and the answer was interrupted
 * @throws Error if the input is not a terminal, and there is no message or it is rejected
 */
export async function chatInTerminal(options: TerminalChatOptions): Promise<boolean> {
  const { input, output, notes, color = false } = options
  const conversation = new Conversation(options)
  let isComplete = true
  if (input.isTTY) {
    notes.write('Type a message, or /help.\n')
    const history: string[] = []
    while (!input.readableEnded) {
      const line = await readMessage(options, history)
      if (line === undefined || line.trim() === '/exit') break
      try {
        if (line.startsWith('/')) notes.write(command(line, conversation))
        else if (line.trim() !== '') await answer(line, conversation, options)
      } catch (error) {
        if (!(error instanceof RejectedError)) throw error
        notes.write(`${color ? paint(31, error.message) : error.message}\n`)
      }
    }
  } else {
    const message = (await readAll(input)).trim()
    if (message === '') throw new RejectedError('standard input is empty, expected a message')
    isComplete = await answer(message, conversation, options)
  }
  await new Promise<void>(resolve => output.write('', () => resolve()))
  return isComplete
}

/** Executes a line that starts with a slash, and returns what to print. @throws RejectedError if it is not a command */
function command(line: string, conversation: Conversation): string {
  const [, name, rest] = /^(\S+)\s*(.*)$/s.exec(line.trim()) as RegExpExecArray
  if (name === '/help') return HELP
  if (name === '/clear') {
    conversation.clear()
    return ''
  }
  if (name === '/system') {
    conversation.system = rest || undefined
    return ''
  }
  if (name === '/set') return set(rest, conversation.settings)
  throw new RejectedError(`unknown command ${name}, see /help; a message that starts with / needs a space before it`)
}

/** Executes `/set`. Without arguments, it lists the settings. */
function set(text: string, settings: Record<string, unknown>): string {
  const [, name = '', value = ''] = /^(\S+)\s*(.*)$/s.exec(text) ?? []
  if (ownFields.includes(name)) throw new RejectedError(`${name} cannot be set in a conversation`)
  if (name === '')
    return Object.entries(settings)
      .map(([key, one]) => `${key} ${JSON.stringify(one)}\n`)
      .join('')
  if (value === '') delete settings[name]
  else settings[name] = jsonOrText(value)
  return ''
}

function jsonOrText(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    return text
  }
}

/** Sends a message and prints its answer. @returns whether it was complete @throws RejectedError */
async function answer(text: string, conversation: Conversation, options: TerminalChatOptions): Promise<boolean> {
  const { output, notes, signals, json, quiet, color, context } = options
  const dim = (note: string) => (color ? paint(2, note) : note)
  const control = new AbortController()
  const stop = () => control.abort()
  let printed: 'nothing' | 'reasoning' | 'content' = 'nothing'
  const print = ({ content = '', reasoning_content: reasoning = '' }: Delta) => {
    if (reasoning && !quiet) {
      notes.write(dim(printable(reasoning, notes)))
      printed = 'reasoning'
    }
    // The line feeds between reasoning and the answer belong to neither.
    const visible = printed === 'content' ? content : content.trimStart()
    if (visible === '') return
    if (printed === 'reasoning') notes.write('\n\n')
    printed = 'content'
    output.write(printable(visible, output))
  }
  signals.on('SIGINT', stop)
  try {
    const given = await conversation.send(text, json ? () => {} : print, control.signal)
    const { message, finish, usage, seconds } = given
    if (json) output.write(`${JSON.stringify({ ...message, finish_reason: finish, usage })}\n`)
    else output.write('\n')
    if (!quiet && !json) notes.write(`${dim(figures(finish, usage, seconds, context))}\n`)
    return finish !== null
  } finally {
    signals.off('SIGINT', stop)
  }
}

/** For example `34 tokens, 25 tokens/s, context 120 of 4096`. */
function figures(finish: string | null, usage: Usage | undefined, seconds: number, context: number): string {
  if (usage === undefined) return 'interrupted'
  const { prompt_tokens: before, completion_tokens: tokens } = usage
  const used = before + tokens
  const limit = used < context ? 'stopped at max_tokens' : 'the context is full: /clear starts a new conversation'
  return [
    `${tokens} tokens`,
    // The first one ends the processing of the prompt.
    ...(tokens > 1 && seconds > 0 ? [`${((tokens - 1) / seconds).toPrecision(3)} tokens/s`] : []),
    `context ${used} of ${context}`,
    ...(finish === 'length' ? [limit] : []),
  ].join(', ')
}

/** Time in milliseconds within which the lines of a pasted text arrive. */
const PASTE = 20

/**
 * Reads a message from a terminal. Returns undefined at the end of the input or on Ctrl-C, and an empty message if Ctrl-C discards what was typed.
 * @param history the lines so far, the last one first; updated
 */
function readMessage({ input, notes }: TerminalChatOptions, history: string[]): Promise<string | undefined> {
  return new Promise(resolve => {
    const lines: string[] = []
    let timer: NodeJS.Timeout | undefined
    let isOver = false
    // One reader per message, so that the terminal is in its usual mode during answers, and Ctrl-C is a signal.
    const reader = createInterface({ input, output: notes, terminal: true, history: [...history], prompt: '> ' })
    const finish = (message: string | undefined) => {
      if (isOver) return
      isOver = true
      clearTimeout(timer)
      reader.close()
      resolve(message)
    }
    const paused = () => {
      // The rest of a pasted text, which has no line feed yet.
      if (reader.line !== '') return
      const last = lines[lines.length - 1]
      if (!last.endsWith('\\')) return finish(lines.join('\n'))
      lines[lines.length - 1] = last.slice(0, -1)
      reader.setPrompt('… ')
      reader.prompt()
    }
    reader.on('line', line => {
      lines.push(line)
      clearTimeout(timer)
      timer = setTimeout(paused, PASTE)
    })
    reader.on('history', all => history.splice(0, history.length, ...all))
    reader.on('SIGINT', () => {
      notes.write('\n')
      finish(reader.line === '' && lines.length === 0 ? undefined : '')
    })
    reader.on('close', () => {
      if (isOver) return
      notes.write('\n')
      finish(lines.length === 0 ? undefined : lines.join('\n'))
    })
    reader.prompt()
  })
}

const paint = (code: number, text: string) => `\x1b[${code}m${text}\x1b[0m`

/** Removes control characters of a model's text, so that it cannot control a terminal. */
const printable = (text: string, { isTTY }: { readonly isTTY?: boolean }): string =>
  // biome-ignore lint/suspicious/noControlCharactersInRegex: these are the characters to remove
  isTTY ? text.replace(/[\x00-\x08\x0b-\x1f\x7f-\x9f]/g, '') : text
