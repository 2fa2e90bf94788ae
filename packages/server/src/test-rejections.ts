/** @file For tests of requests that a server must reject. */
import type { Completion } from 'openai/resources'
import { expect } from 'vitest'
import { type modelServer, post } from './test-server.ts'

export type App = Pick<ReturnType<typeof modelServer>['app'], 'request'>

export const paths = ['/v1/completions', '/v1/chat/completions'] as const
export type Path = (typeof paths)[number]

export const validBodies = {
  '/v1/completions': { model: 'tiny', prompt: 'the people', max_tokens: 2, seed: 1 },
  '/v1/chat/completions': { model: 'tiny', messages: [{ role: 'user', content: 'the' }], max_tokens: 2, seed: 1 },
}

export const shown = (body: unknown) => (typeof body === 'string' ? body : String(JSON.stringify(body))).slice(0, 200)

interface ReceivedError {
  readonly message: string
  readonly type: string
  readonly param: string | null
  readonly code: string | null
}

/** Returns the error of a response, after checking its format. */
export async function errorOf(response: Response, about: string): Promise<ReceivedError> {
  const text = await response.text()
  expect(response.headers.get('content-type'), about).toMatch(/^application\/json/)
  const { error, ...more } = JSON.parse(text)
  expect(more, about).toEqual({})
  expect(Object.keys(error).sort(), about).toEqual(['code', 'message', 'param', 'type'])
  expect(error.message, about).toMatch(/\S/)
  expect(error.type, about).toBe('invalid_request_error')
  for (const value of [error.param, error.code]) if (value !== null) expect(value, about).toMatch(/\S/)
  return error
}

/** Posts an invalid request and returns its error. The response must be a 4xx with a short message. */
export async function rejection(
  app: App,
  path: Path,
  body: unknown,
  init?: RequestInit,
): Promise<ReceivedError & { status: number }> {
  const about = `${path} ${shown(body)}`
  const response = await app.request(path, post(body, init))
  expect(`${response.status}`, about).toMatch(/^4\d\d$/)
  const error = await errorOf(response, about)
  expect(error.message.length, about).toBeLessThan(1000)
  return { status: response.status, ...error }
}

export async function stillServes(app: App) {
  for (const path of paths) {
    const response = await app.request(path, post(validBodies[path]))
    expect(response.status).toBe(200)
    const { choices, usage } = (await response.json()) as Completion
    expect(choices).toHaveLength(1)
    expect(usage?.completion_tokens).toBeGreaterThan(0)
  }
}
