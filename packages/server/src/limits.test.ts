/** @file Limits on the size of requests. */
import { ChatTemplate, plainChatTemplate } from '@moe/tokenizer-bpe/data'
import { expect, test } from 'vitest'
import { post, scriptedServer } from './test-server.ts'

const chatTemplate = await ChatTemplate.from({ chat_template: plainChatTemplate, eos_token: '<|end|>' })

async function send(path: string, body: unknown) {
  const script = async function* () {
    yield 'so'
  }
  const { app } = scriptedServer(script, { chatTemplate }, 1e6)
  const response = await app.request(path, post(body))
  const { error } = (await response.json()) as { error?: { message: string; param: string } }
  return { status: response.status, error }
}

const user = { role: 'user', content: 'the people' }
const call = { id: 'a', type: 'function', function: { name: 'f', arguments: '{}' } }
const calls = (count: number) => ({ role: 'assistant', content: null, tool_calls: Array(count).fill(call) })

test('bodies are nested up to 500 levels', async () => {
  const nested = (depth: number) => `${'[{"a":'.repeat(depth / 2)}1${'}]'.repeat(depth / 2)}`
  const body = (depth: number, text = '') => `{"prompt":${JSON.stringify(text)},"metadata":${nested(depth)}}`
  expect((await send('/v1/completions', body(498))).status).toBe(200)
  expect(await send('/v1/completions', body(500))).toMatchObject({
    status: 400,
    error: { message: expect.stringContaining('deeper than 500') },
  })
  expect((await send('/v1/completions', body(498, `"\\${'[{'.repeat(600)}\\\\"`))).status).toBe(200)
  expect((await send('/v1/completions', body(500, `"${'}]'.repeat(600)}`))).status).toBe(400)
})

test.each([
  ['/v1/chat/completions', 'messages', (count: number) => ({ messages: Array(count).fill(user) })],
  ['/v1/responses', 'input', (count: number) => ({ input: Array(count).fill(user) })],
  ['/v1/chat/completions', 'messages', (count: number) => ({ messages: [user, calls(count - 1), calls(1)] })],
] as const)('%s accepts up to 4096 messages and calls: %s', async (path, param, body) => {
  expect((await send(path, body(4096))).status).toBe(200)
  const { status, error } = await send(path, body(4097))
  expect([status, error?.param]).toEqual([400, param])
})
