/** @file Generates the texts of a request and sends them, complete or as a stream. */
import { randomUUID } from 'node:crypto'
import type { GenerationStats } from '@moe/deepseek'
import type { Context } from 'hono'
import { streamSSE } from 'hono/streaming'
import type { Endpoint, GeneratedPart, StreamEvent } from './endpoint.ts'
import { toApiError } from './errors.ts'
import type { GenerationRequest, ServedModel } from './generation-request.ts'
import { withReasoning } from './reasoning.ts'
import type { RequestRecord } from './request-record.ts'
import type { FinishReason, TextEngine } from './text-engine.ts'
import { type TextPart, textParts, visibleText } from './text-parts.ts'
import { withCalls } from './tool-calls.ts'

/** The Hono environment of the server: variables that its handlers set for each request. */
export interface ServerEnv {
  /** Variables of the context of a request. */
  Variables: {
    /** The record that is passed to `onRequest`. */
    record: RequestRecord
    /** Set for streamed responses; resolves at the end of the stream. */
    streamed?: Promise<void>
  }
}

interface Text {
  readonly index: number
  readonly parts: AsyncIterable<TextPart>
  readonly stats: GenerationStats
  /** Number of tokens when the last part with reasoning was read. */
  reasoningTokens: number
  /** Whether it contains tool calls. */
  hasCalls: boolean
}

export async function answer(
  c: Context<ServerEnv>,
  endpoint: Endpoint,
  request: GenerationRequest,
  served: ServedModel,
  engine: TextEngine,
): Promise<Response> {
  const { prompts, choices } = request
  const record = c.get('record')
  const stop = new AbortController()
  const disposeConstraints = () => {
    for (const constraint of request.constraints ?? []) constraint.dispose()
  }
  let texts: Text[]
  try {
    texts = begin(request, served, engine, stop.signal)
  } catch (error) {
    disposeConstraints()
    throw error
  }
  const usage = () => {
    const prompt = prompts.reduce((sum, { ids }) => sum + ids.length, 0)
    const generated = texts.reduce((sum, { stats }) => sum + stats.tokens, 0)
    const reasoning = texts.reduce((sum, { reasoningTokens }) => sum + reasoningTokens, 0)
    const cachedTokens = prompts.reduce((sum, _, i) => sum + texts[i * choices].stats.cachedTokens, 0)
    Object.assign(record, { promptTokens: prompt, generatedTokens: generated })
    return { prompt, cachedTokens, generated, reasoning }
  }
  const generatedPart = ({ text, reasoning = '', calls = [], tokens }: TextPart): GeneratedPart => {
    return { text, reasoning, calls, logProbs: tokens && endpoint.logProbs(tokens, served.tokenizer) }
  }
  const finished = ({ stats, hasCalls }: Text): FinishReason => {
    const ended = stats.finishReason ?? 'stop'
    const reason = hasCalls && ended === 'stop' ? 'tool_calls' : ended
    record.finishReasons = [...(record.finishReasons ?? []), reason]
    return reason
  }
  const abort = () => stop.abort()
  const { signal } = c.req.raw
  if (signal.aborted) abort()
  signal.addEventListener('abort', abort, { once: true })
  const head = { id: `${endpoint.prefix}${randomUUID()}`, created: Math.floor(Date.now() / 1000), model: served.name }

  if (!request.stream) {
    try {
      const parts = await allOrAbort(texts, stop, async text => {
        const all: TextPart[] = []
        for await (const part of partsOf(text)) all.push(part)
        return all
      })
      const all = texts.map((text, i) => {
        const whole = {
          text: parts[i].map(({ text }) => text).join(''),
          reasoning: parts[i].map(({ reasoning }) => reasoning).join(''),
          tokens: request.logProbs === undefined ? null : parts[i].flatMap(({ tokens }) => tokens ?? []),
          calls: parts[i].flatMap(({ calls }) => calls ?? []),
        }
        return { ...generatedPart(whole), finish: finished(text) }
      })
      return c.json(endpoint.body(head, all, usage(), request))
    } finally {
      disposeConstraints()
      usage()
      signal.removeEventListener('abort', abort)
    }
  }

  return streamSSE(c, stream => {
    stream.onAbort(abort)
    const events = endpoint.stream(head, request)
    const send = async (all: readonly StreamEvent[]) => {
      for (const one of all) await stream.writeSSE(one)
    }
    const streamed = async () => {
      try {
        await send(events.begin())
        await allOrAbort(texts, stop, async text => {
          await send(events.opening(text.index))
          for await (const part of partsOf(text)) await send(events.part(text.index, generatedPart(part)))
          await send(events.end(text.index, finished(text)))
        })
        await send(events.over(usage()))
      } catch (error) {
        // The status has already been sent, so the error becomes an event.
        const problem = toApiError(error)
        record.status = problem.status
        record.error = error
        await send(events.failed(problem))
      } finally {
        disposeConstraints()
        usage()
        signal.removeEventListener('abort', abort)
      }
      await send(events.last)
    }
    const over = streamed()
    c.set('streamed', over)
    return over
  })
}

/** Starts all texts of a request. Choice i of a prompt uses the seed plus i. @throws MoeError `E_ATTR` if the engine rejects an option */
function begin(
  request: GenerationRequest,
  { tokenizer }: ServedModel,
  engine: TextEngine,
  signal: AbortSignal,
): Text[] {
  const { prompts, choices, sampling, echo, logProbs, constraints, thinking, calls, visibleTokens } = request
  const decoder = visibleTokens ? visibleText(tokenizer, visibleTokens) : tokenizer
  const scored = logProbs !== undefined
  const texts: Text[] = []
  for (const prompt of prompts) {
    const maxTokens = request.maxTokens(prompt.ids.length)
    const shared = {
      ...sampling,
      maxTokens,
      tokenizer: decoder,
      signal,
      logProbs,
      promptLogProbs: echo ? logProbs : undefined,
    }
    for (let choice = 0; choice < choices; choice++) {
      const constraint = constraints?.[texts.length]
      const generation = engine.generate(prompt.ids, { ...shared, constraint, seed: sampling.seed + choice })
      const raw = textParts(prompt, generation, tokenizer, decoder, { echo, scored })
      const parts = thinking === 'none' ? raw : withReasoning(raw, thinking)
      texts.push({
        index: texts.length,
        parts: calls ? withCalls(parts, calls) : parts,
        stats: generation.stats,
        reasoningTokens: 0,
        hasCalls: false,
      })
    }
  }
  return texts
}

/** Reads the parts of a text, and records what they contain. */
async function* partsOf(text: Text): AsyncGenerator<TextPart> {
  for await (const part of text.parts) {
    if (part.reasoning) text.reasoningTokens = text.stats.tokens
    if (part.calls) text.hasCalls = true
    yield part
  }
}

/** Reads all texts to the end. If one fails, the others are aborted. @throws the first error */
async function allOrAbort<T>(
  texts: readonly Text[],
  stop: AbortController,
  read: (text: Text) => Promise<T>,
): Promise<T[]> {
  let first: { readonly error: unknown } | undefined
  const all = await Promise.all(
    texts.map(text =>
      read(text).catch(error => {
        first ??= { error }
        stop.abort()
        return undefined
      }),
    ),
  )
  if (first) throw first.error
  return all as T[]
}
