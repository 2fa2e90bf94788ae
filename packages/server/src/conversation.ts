/** @file A conversation with a model, as a client of the server's application. */
import type { ApiError } from './errors.ts'

/** What a conversation needs of the application that `createServer` returns. */
export interface ChatServer {
  request(path: string, init: RequestInit): Response | Promise<Response>
}

interface Message {
  readonly role: 'system' | 'user' | 'assistant'
  readonly content: string
  readonly reasoning_content?: string
}

export interface Usage {
  readonly prompt_tokens: number
  readonly completion_tokens: number
}

/** A part of an answer. */
export interface Delta {
  readonly content?: string
  readonly reasoning_content?: string
}

/** What is used of a chunk of the stream. */
interface Chunk {
  readonly choices?: ReadonlyArray<{ readonly delta: Delta; readonly finish_reason: string | null }>
  readonly usage?: Usage | null
  readonly error?: ReturnType<ApiError['toJSON']>['error']
}

export interface Answer {
  readonly message: Message
  /** Null if the answer was interrupted. */
  readonly finish: string | null
  readonly usage: Usage | undefined
  /** Seconds from the first part to the last. */
  readonly seconds: number
}

/** Fields of requests that a conversation sets. */
export const ownFields = ['messages', 'model', 'stream', 'stream_options', 'n', 'tools', 'tool_choice']

/** The server has rejected a request. */
export class RejectedError extends Error {
  /** OpenAI's code, for example `context_length_exceeded`. */
  readonly code: string | undefined

  constructor({ message, code }: NonNullable<Chunk['error']>) {
    super(message)
    this.code = code ?? undefined
  }
}

/** The messages so far, and the settings of requests. */
export class Conversation {
  readonly settings: Record<string, unknown> = {}
  system: string | undefined
  readonly #app: ChatServer
  readonly #model: string
  #messages: readonly Message[] = []

  /** @param model name of the model */
  constructor(app: ChatServer, model: string) {
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
    if (!response.ok && !signal.aborted) throw new RejectedError(((await response.json()) as Required<Chunk>).error)
    let content = ''
    let reasoning = ''
    let finish: string | null = null
    let usage: Usage | undefined
    let first: number | undefined
    for await (const { choices = [], usage: counted, error } of chunks(response)) {
      if (signal.aborted) break
      if (error) throw new RejectedError(error)
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
