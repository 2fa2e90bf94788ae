/** @file Makes the texts of a request and sends them, whole or as they come. */
import { randomUUID } from 'node:crypto'
import type { GenerationStats } from '@moe/deepseek'
import type { Context } from 'hono'
import { streamSSE } from 'hono/streaming'
import type { Endpoint, Made, StreamEvent } from './endpoint.ts'
import { toApiError } from './errors.ts'
import { withReasoning } from './reasoning.ts'
import type { RequestRecord } from './request-record.ts'
import type { FinishReason, TextEngine } from './text-engine.ts'
import { type TextPart, textParts } from './text-parts.ts'
import { withCalls } from './tool-calls.ts'
import type { Served, WantedTexts } from './wanted-texts.ts'

/** What the handling of a request knows, as Hono's handlers have it. */
export interface ServerEnv {
  /** Of one request. */
  Variables: {
    record: RequestRecord
    /** Of a response that is a stream: resolves when it has ended. */
    streamed?: Promise<void>
  }
}

interface Text {
  readonly index: number
  readonly parts: AsyncIterable<TextPart>
  readonly stats: GenerationStats
  /** Whether it calls tools. */
  calls: boolean
}

export async function answer(
  c: Context<ServerEnv>,
  endpoint: Endpoint,
  wanted: WantedTexts,
  served: Served,
  engine: TextEngine,
): Promise<Response> {
  const { prompts, choices } = wanted
  const record = c.get('record')
  const stop = new AbortController()
  const end = () => {
    for (const constraint of wanted.constraints ?? []) constraint.dispose()
  }
  let texts: Text[]
  try {
    texts = begin(wanted, served, engine, stop.signal)
  } catch (error) {
    end()
    throw error
  }
  const usage = () => {
    const prompt = prompts.reduce((sum, { ids }) => sum + ids.length, 0)
    const made = texts.reduce((sum, { stats }) => sum + stats.tokens, 0)
    const reused = prompts.reduce((sum, _, i) => sum + texts[i * choices].stats.reused, 0)
    Object.assign(record, { promptTokens: prompt, generatedTokens: made })
    return { prompt, reused, made }
  }
  const told = ({ text, reasoning = '', calls = [], tokens }: TextPart): Made => {
    return { text, reasoning, calls, logProbs: tokens && endpoint.logProbs(tokens, served.tokenizer) }
  }
  const finished = ({ stats, calls }: Text): FinishReason => {
    const ended = stats.finishReason ?? 'stop'
    const reason = calls && ended === 'stop' ? 'tool_calls' : ended
    record.finishReasons = [...(record.finishReasons ?? []), reason]
    return reason
  }
  const leave = () => stop.abort()
  const { signal } = c.req.raw
  if (signal.aborted) leave()
  signal.addEventListener('abort', leave, { once: true })
  const head = { id: `${endpoint.prefix}${randomUUID()}`, created: Math.floor(Date.now() / 1000), model: served.name }

  if (!wanted.stream) {
    try {
      const made = await allOrStop(texts, stop, async ({ parts }) => {
        const all: TextPart[] = []
        for await (const part of parts) all.push(part)
        return all
      })
      const all = texts.map((text, i) => {
        const whole = {
          text: made[i].map(({ text }) => text).join(''),
          reasoning: made[i].map(({ reasoning }) => reasoning).join(''),
          tokens: wanted.logProbs === undefined ? null : made[i].flatMap(({ tokens }) => tokens ?? []),
          calls: made[i].flatMap(({ calls }) => calls ?? []),
        }
        text.calls = whole.calls.length > 0
        return { ...told(whole), finish: finished(text) }
      })
      return c.json(endpoint.body(head, all, usage(), wanted))
    } finally {
      end()
      usage()
      signal.removeEventListener('abort', leave)
    }
  }

  return streamSSE(c, stream => {
    stream.onAbort(leave)
    const events = endpoint.stream(head, wanted)
    const send = async (all: readonly StreamEvent[]) => {
      for (const one of all) await stream.writeSSE(one)
    }
    const streamed = async () => {
      try {
        await send(events.begin())
        await allOrStop(texts, stop, async text => {
          await send(events.opening(text.index))
          for await (const part of text.parts) {
            if (part.calls) text.calls = true
            await send(events.part(text.index, told(part)))
          }
          await send(events.end(text.index, finished(text)))
        })
        await send(events.over(usage()))
      } catch (error) {
        // The response has begun: its status stays, and the error is an event.
        const problem = toApiError(error)
        record.status = problem.status
        record.error = error
        await send(events.failed(problem))
      } finally {
        end()
        usage()
        signal.removeEventListener('abort', leave)
      }
      await send(events.last)
    }
    const over = streamed()
    c.set('streamed', over)
    return over
  })
}

/** All texts of a request; the seeds of choices follow each other. @throws MoeError E_ATTR for what the engine refuses */
function begin(wanted: WantedTexts, { tokenizer }: Served, engine: TextEngine, signal: AbortSignal): Text[] {
  const { prompts, choices, sampling, echo, logProbs, constraints, thinking, calls } = wanted
  const isTold = logProbs !== undefined
  const texts: Text[] = []
  for (const prompt of prompts) {
    const maxTokens = wanted.maxTokens(prompt.ids.length)
    const shared = { ...sampling, maxTokens, tokenizer, signal, logProbs, promptLogProbs: echo ? logProbs : undefined }
    for (let choice = 0; choice < choices; choice++) {
      const constraint = constraints?.[texts.length]
      const made = engine.generate(prompt.ids, { ...shared, constraint, seed: sampling.seed + choice })
      const written = textParts(prompt, made, tokenizer, { echo, isTold })
      const parts = thinking === 'over' ? written : withReasoning(written, thinking)
      texts.push({
        index: texts.length,
        parts: calls ? withCalls(parts, calls) : parts,
        stats: made.stats,
        calls: false,
      })
    }
  }
  return texts
}

/** Where one text fails, the others end, too, and none is left unread. @throws the first error */
async function allOrStop<T>(
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
