/** @file `moe-serve --chat`: a conversation in the terminal. No port is needed for it. */
import { createInterface } from 'node:readline'
import type { Readable, Writable } from 'node:stream'
import { text as readAll } from 'node:stream/consumers'
import { UsageError } from './arguments.ts'
import { type ChatServer, Conversation, type Delta, ownFields, RejectedError, type Usage } from './conversation.ts'

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

const HELP = `A line is a message. End it with \\ to continue it on the next line; pasted lines are one message.

  /clear            forget the conversation
  /system TEXT      set the system message; without TEXT, remove it
  /set NAME VALUE   set a parameter of the chat API, such as temperature, top_p, seed, max_tokens; without VALUE, remove it
  /help             print this help
  /exit             end (or Ctrl-D)

Ctrl-C stops an answer.
`

/**
 * Chats until the input ends.
 * @returns false if the input is not a terminal, and the answer was interrupted
 * @throws UsageError if the input is not a terminal and empty
 * @throws RejectedError if the input is not a terminal, and its message is rejected
 */
export async function chatInTerminal(options: TerminalChatOptions): Promise<boolean> {
  const { app, model, input, output, notes, color = false } = options
  const conversation = new Conversation(app, model)
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
        if (!(error instanceof RejectedError || error instanceof UsageError)) throw error
        const fix =
          'code' in error && error.code === 'context_length_exceeded' ? '; /clear starts a new conversation' : ''
        const problem = error.message + fix
        notes.write(`${color ? paint(31, problem) : problem}\n`)
      }
    }
  } else {
    const message = (await readAll(input)).trim()
    if (message === '') throw new UsageError('--chat: standard input is empty, expected a message')
    isComplete = await answer(message, conversation, options)
  }
  await new Promise<void>(resolve => output.write('', () => resolve()))
  return isComplete
}

/** Executes a line that starts with a slash, and returns what to print. @throws UsageError if it is not a command */
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
  throw new UsageError(`unknown command ${name}, see /help; a message that starts with / needs a space before it`)
}

/** Executes `/set`. Without arguments, it lists the settings. */
function set(text: string, settings: Record<string, unknown>): string {
  const [, name = '', value = ''] = /^(\S+)\s*(.*)$/s.exec(text) ?? []
  if (ownFields.includes(name)) throw new UsageError(`${name} cannot be set in a conversation`)
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
  const limit = used < context ? 'stopped at max_tokens' : 'the context is full'
  const rate = (tokens - 1) / seconds
  return [
    `${tokens} tokens`,
    // The first one ends the processing of the prompt.
    ...(tokens > 1 && seconds > 0 ? [`${rate < 100 ? rate.toPrecision(3) : rate.toFixed(0)} tokens/s`] : []),
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
