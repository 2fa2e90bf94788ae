/** @file Options of a server, and which requests need its key. */
import { isMoeError } from '@moe/core'
import { expect, test } from 'vitest'
import { scriptedServer } from './test-server.ts'

const serverWith = (options: object) => scriptedServer(async function* () {}, options)

test.each([
  ['model is missing', { model: undefined }],
  ['tokenizer is missing', { tokenizer: undefined }],
  ['engine is missing', { engine: undefined }],
  ['name is missing', { name: '' }],
  ['apiKey is empty', { apiKey: '' }],
  ['expected a positive bodyLimit, got 0', { bodyLimit: 0 }],
  ['expected a positive bodyLimit, got NaN', { bodyLimit: Number.NaN }],
  ['did you mean apiKey?', { apikey: 'a' }],
])('invalid options are an error: %s', (message, options) => {
  expect(() => serverWith(options)).toThrow(message)
  expect(() => serverWith(options)).toThrow(expect.toSatisfy((error: unknown) => isMoeError(error, 'E_CONFIG')))
})

test('requests need the key, if there is one, except for /health', async () => {
  const { app } = serverWith({ apiKey: 'secret' })
  const ask = async (path: string, authorization?: string) => {
    const { status } = await app.request(path, { headers: authorization === undefined ? {} : { authorization } })
    return status
  }
  expect(await ask('/health')).toBe(200)
  for (const path of ['/v1/models', '/v1/models/tiny', '/metrics']) {
    for (const wrong of [
      undefined,
      '',
      'Bearer',
      'Bearer ',
      'Bearer secre',
      'Bearer secrets',
      'Basic secret',
      'secret',
    ])
      expect(await ask(path, wrong), `${path} ${wrong}`).toBe(401)
    for (const right of ['Bearer secret', 'bearer  secret']) expect(await ask(path, right)).toBe(200)
  }
  const { app: open } = serverWith({ bodyLimit: 1 })
  expect((await open.request('/metrics')).status).toBe(200)
})
