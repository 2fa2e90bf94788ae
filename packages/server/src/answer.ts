/** @file Makes the texts of a request and sends them, whole or as they come. */
import { randomUUID } from 'node:crypto'
import type { Generation } from '@moe/deepseek'
import type { Context } from 'hono'
import { streamSSE } from 'hono/streaming'
import type { Endpoint } from './endpoint.ts'
import { toApiError } from './errors.ts'
import type { RequestRecord } from './request-record.ts'
import type { FinishReason, TextEngine } from './text-engine.ts'
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
  readonly parts: Generation<string>
  readonly finish: () => FinishReason
}

export async function answer(
  c: Context<ServerEnv>,
  endpoint: Endpoint,
  wanted: WantedTexts,
  served: Served,
  engine: TextEngine,
): Promise<Response> {
  const { prompts, choices, includeUsage } = wanted
  const record = c.get('record')
  const stop = new AbortController()
  const texts = begin(wanted, served, engine, stop.signal)
  const usage = () => {
    const promptTokens = prompts.reduce((sum, { length }) => sum + length, 0)
    const generatedTokens = texts.reduce((sum, { parts }) => sum + parts.stats.tokens, 0)
    const reused = prompts.reduce((sum, _, i) => sum + texts[i * choices].parts.stats.reused, 0)
    Object.assign(record, { promptTokens, generatedTokens })
    return {
      prompt_tokens: promptTokens,
      completion_tokens: generatedTokens,
      total_tokens: promptTokens + generatedTokens,
      prompt_tokens_details: { cached_tokens: reused },
    }
  }
  const finished = ({ finish }: Text) => {
    const reason = finish()
    record.finishReasons = [...(record.finishReasons ?? []), reason]
    return reason
  }
  const leave = () => stop.abort()
  const { signal } = c.req.raw
  if (signal.aborted) leave()
  signal.addEventListener('abort', leave, { once: true })
  const head = { id: `${endpoint.prefix}-${randomUUID()}`, created: Math.floor(Date.now() / 1000), model: served.name }

  if (!wanted.stream) {
    try {
      const made = await allOrStop(texts, stop, async ({ parts }) => {
        let whole = ''
        for await (const part of parts) whole += part
        return whole
      })
      const all = texts.map((text, i) => endpoint.choice(i, made[i], finished(text)))
      return c.json({ ...head, object: endpoint.object, choices: all, usage: usage() })
    } finally {
      usage()
      signal.removeEventListener('abort', leave)
    }
  }

  return streamSSE(c, stream => {
    stream.onAbort(leave)
    const send = async (all: object[], tokens: object | null = null) => {
      const chunk = { ...head, object: endpoint.chunkObject, choices: all, ...(includeUsage ? { usage: tokens } : {}) }
      await stream.writeSSE({ data: JSON.stringify(chunk) })
    }
    const streamed = async () => {
      try {
        await allOrStop(texts, stop, async text => {
          const opening = endpoint.opening(text.index)
          if (opening) await send([opening])
          for await (const part of text.parts) await send([endpoint.part(text.index, part)])
          await send([endpoint.end(text.index, finished(text))])
        })
        if (includeUsage) await send([], usage())
      } catch (error) {
        // The response has begun: its status stays, and the error is an event.
        const told = toApiError(error)
        record.status = told.status
        record.error = error
        await stream.writeSSE({ data: JSON.stringify(told) })
      } finally {
        usage()
        signal.removeEventListener('abort', leave)
      }
      await stream.writeSSE({ data: '[DONE]' })
    }
    const over = streamed()
    c.set('streamed', over)
    return over
  })
}

/** All texts of a request; the seeds of choices follow each other. @throws MoeError E_ATTR for what the engine refuses */
function begin(wanted: WantedTexts, { tokenizer }: Served, engine: TextEngine, signal: AbortSignal): Text[] {
  const { prompts, choices, sampling } = wanted
  const texts: Text[] = []
  for (const ids of prompts) {
    const maxTokens = wanted.maxTokens(ids.length)
    for (let choice = 0; choice < choices; choice++) {
      const options = { ...sampling, seed: sampling.seed + choice, maxTokens, tokenizer, signal }
      const parts = engine.generate(ids, options)
      texts.push({ index: texts.length, parts, finish: () => parts.stats.finishReason ?? 'stop' })
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
