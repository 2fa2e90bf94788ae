/** @file Requests that are rejected before their fields are read: by length, type, key, method, path, origin, or invalid HTTP. */
import { connect } from 'node:net'
import { MoeError } from '@moe/core'
import type { Completion } from 'openai/resources'
import { describe, expect, test } from 'vitest'
import { serve } from './index.ts'
import { type App, errorOf, paths, stillServes, validBodies } from './test-rejections.ts'
import { modelServer, post, scriptedServer } from './test-server.ts'

describe.each(paths)('%s rejects', path => {
  test('bodies that are too long or not declared as JSON, and requests without a key', async () => {
    const bodyLimit = 300
    const { app, dispose } = modelServer({ bodyLimit, apiKey: 'open sesame', cors: ['https://moe.example'] })
    const headers = { authorization: 'Bearer open sesame', origin: 'https://moe.example' }
    const padded = (bytes: number) => {
      const body = JSON.stringify(validBodies[path])
      return body + ' '.repeat(bytes - body.length)
    }
    const ask = (body: string, more: Record<string, string> = {}) =>
      app.request(path, post(body, { headers: { ...headers, ...more }, duplex: 'half' } as RequestInit))
    expect((await ask(padded(bodyLimit))).status).toBe(200)
    const streamed = (text: string) => new Blob([text]).stream()
    const inParts = new Request(`http://localhost${path}`, {
      method: 'POST',
      headers: { ...headers, 'content-type': 'application/json' },
      body: streamed(padded(bodyLimit + 1)),
      duplex: 'half',
    } as RequestInit)
    const tooLong = [
      await ask(padded(bodyLimit + 1)),
      await ask(padded(bodyLimit + 1), { 'content-length': `${bodyLimit + 1}` }),
      await app.request(inParts),
    ]
    for (const response of tooLong) {
      expect(response.status).toBe(413)
      expect(response.headers.get('access-control-allow-origin')).toBe('https://moe.example')
      expect((await errorOf(response, 'too long')).message).toContain(`${bodyLimit} bytes`)
    }
    for (const type of [
      'text/plain',
      'application/x-www-form-urlencoded',
      'multipart/form-data; boundary=a',
      'text/json',
      'application/jsonp',
      '',
      'application/json+text',
    ]) {
      const response = await ask(padded(200), { 'content-type': type })
      expect(response.status, type).toBe(415)
      expect(response.headers.get('access-control-allow-origin')).toBe('https://moe.example')
      await errorOf(response, type)
    }
    for (const type of ['application/json; charset=utf-8', 'APPLICATION/JSON', 'application/vnd.api+json'])
      expect((await ask(padded(200), { 'content-type': type })).status, type).toBe(200)
    for (const authorization of [
      '',
      'open sesame',
      'Bearer',
      'Bearer ',
      'Bearer open',
      'Bearer open sesame!',
      'Basic open sesame',
      'Bearer OPEN SESAME',
    ]) {
      const response = await ask(padded(200), { authorization })
      expect(response.status, authorization).toBe(401)
      expect((await errorOf(response, authorization)).code).toBe('invalid_api_key')
    }
    expect(dispose()).toBe(0)
  })

  test.each([{}, { 'content-length': '50' }])('an incomplete body, with headers %j', async headers => {
    const { app, records, dispose } = modelServer()
    const body = new ReadableStream({
      start: stream => stream.enqueue(new TextEncoder().encode('{"prompt":')),
      pull: stream => stream.error(new Error('aborted')),
    })
    const init = { headers: { 'content-type': 'application/json', ...headers }, duplex: 'half' }
    const response = await app.request(path, { method: 'POST', body, ...init } as RequestInit)
    expect(response.status).toBe(400)
    expect((await errorOf(response, 'cut off')).message).toBe('the request body is incomplete')
    expect(records).toMatchObject([{ status: 400 }])
    await stillServes(app)
    expect(dispose()).toBe(0)
  })

  test.each(['GET', 'PUT', 'DELETE', 'PATCH'])('the method %s', async method => {
    const { app, dispose } = modelServer()
    const response = await app.request(path, { method })
    expect([response.status, response.headers.get('allow')]).toEqual([405, 'POST'])
    await errorOf(response, method)
    expect(dispose()).toBe(0)
  })

  test('requests from web pages of other origins', async () => {
    const preflight = (app: App, origin: string) =>
      app.request(path, {
        method: 'OPTIONS',
        headers: {
          origin,
          'access-control-request-method': 'POST',
          'access-control-request-headers': 'authorization,content-type',
        },
      })
    const none = modelServer()
    const closed = await preflight(none.app, 'https://moe.example')
    expect(closed.ok).toBe(false)
    expect(closed.headers.get('access-control-allow-origin')).toBeNull()
    none.dispose()
    // Browsers send preflight requests without a key.
    const one = modelServer({ cors: 'https://moe.example', apiKey: 'open sesame' })
    const open = await preflight(one.app, 'https://moe.example')
    expect(open.status).toBe(204)
    expect(open.headers.get('access-control-allow-origin')).toBe('https://moe.example')
    expect(open.headers.get('access-control-allow-methods')).toContain('POST')
    expect(open.headers.get('access-control-allow-headers')?.toLowerCase()).toBe('authorization,content-type')
    const other = await preflight(one.app, 'https://evil.example')
    expect(other.headers.get('access-control-allow-origin')).not.toBe('https://evil.example')
    expect(other.headers.get('access-control-allow-origin')).not.toBe('*')
    one.dispose()
    // The command passes a list.
    for (const cors of ['*', ['*']]) {
      const any = modelServer({ cors })
      const response = await preflight(any.app, 'https://evil.example')
      expect(response.headers.get('access-control-allow-origin')).toBe('*')
      any.dispose()
    }
  })
})

test.each([
  '/',
  '/v1',
  '/v1/',
  '/v1/embeddings',
  '/v1/completions/',
  '/v2/completions',
  '/..%2f..%2fetc/passwd',
  '/%ff',
  `/${'x'.repeat(5000)}`,
])('the path %s is not found', async path => {
  const { app } = scriptedServer(async function* () {})
  for (const method of ['GET', 'POST']) {
    const response = await app.request(path, { method })
    expect(response.status).toBe(404)
    expect((await errorOf(response, path)).message.length).toBeLessThan(300)
  }
})

test.each(['other', '%ff', '%E0%A4', 'tiny%2f', '__proto__', 'x'.repeat(5000)])(
  'the model %s is not found',
  async id => {
    const { app } = scriptedServer(async function* () {})
    const response = await app.request(`/v1/models/${id}`)
    expect(response.status).toBe(404)
    const { message, code } = await errorOf(response, id)
    expect(code).toBe('model_not_found')
    expect(message.length).toBeLessThan(300)
  },
)

describe.each([true, false])('over a port, with Content-Length: %s,', declared => {
  const fetchFrom = (url: string, body: unknown, signal?: AbortSignal) => {
    const text = JSON.stringify(body)
    const sent = declared ? text : new Blob([text]).stream()
    return fetch(url + paths[0], post(body, { body: sent, duplex: 'half', signal } as RequestInit))
  }

  test('serve rejects anything that is not an application', async () => {
    const expected = {
      code: 'E_ATTR',
      message: expect.stringMatching(/expected an application with a fetch method, got .*; pass createServer\(\{/),
    }
    for (const app of [undefined, {}, 'app'])
      await expect(serve(app as never, { port: 0 })).rejects.toMatchObject(expected)
  })

  test('a body is accepted up to the limit', async () => {
    const { app, dispose } = modelServer({ bodyLimit: 2 ** 20 })
    const server = await serve(app, { port: 0 })
    const ask = validBodies[paths[0]]
    for (const padding of [0, 2 ** 19, 2 ** 20, 2 ** 24, 0]) {
      const response = await fetchFrom(server.url, { ...ask, user: 'x'.repeat(padding) })
      expect(response.status, `${padding}`).toBe(padding < 2 ** 20 ? 200 : 413)
      if (response.status === 200) expect(((await response.json()) as Completion).choices).toHaveLength(1)
      else expect((await errorOf(response, `${padding}`)).code).toBe('request_too_large')
    }
    await server.close({ timeout: 0 })
    expect(dispose()).toBe(0)
  })

  test.each([true, false])('disconnecting stops generation, streamed: %s', async stream => {
    const abort = new AbortController()
    let end = () => {}
    const ended = new Promise<void>(resolve => {
      end = resolve
    })
    const { app, records } = scriptedServer(async function* ({ options }) {
      try {
        while (!options.signal?.aborted) {
          await new Promise(setImmediate)
          yield 'on and '
          setTimeout(() => abort.abort(), 20)
        }
        throw new MoeError({ code: 'E_ABORTED', op: 'generate', problem: 'was aborted' })
      } finally {
        end()
      }
    })
    const server = await serve(app, { port: 0 })
    const response = fetchFrom(server.url, { prompt: 'the', stream }, abort.signal)
    await response.then(({ text }) => text()).catch(() => {})
    await ended
    await server.close({ timeout: 0 })
    expect(records).toMatchObject([{ status: 499 }])
  })
})

test.each([
  'GET /v1/models HTTP/1.1\r\nHost: [\r\nConnection: close\r\n\r\n',
  'GET /v1/models HTTP/1.1\r\nHost: a b\r\nConnection: close\r\n\r\n',
  'GET //[ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n',
  'GET http://[/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n',
  'GET /v1/models HTTP/1.1\r\nConnection: close\r\n\r\n',
  'POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n{}',
  'POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}',
  'POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n',
  `GET /${'x'.repeat(20_000)} HTTP/1.1\r\nHost: a\r\n\r\n`,
  '\x16\x03\x01\x02\x00\x01\x00\r\n\r\n',
])('an invalid HTTP request is rejected, and the server continues: %j', async sent => {
  const { app, records, dispose } = modelServer()
  const server = await serve(app, { port: 0 })
  const received = await new Promise<string>(resolve => {
    let text = ''
    const socket = connect(server.port, '127.0.0.1', () => socket.write(sent))
    socket.on('data', data => {
      text += data
    })
    // The server does not read the rest of a request that is too long, so that sending may fail.
    socket.on('error', () => {})
    socket.on('close', () => resolve(text))
  })
  expect(received).toMatch(/^HTTP\/1\.1 4\d\d /)
  const response = await fetch(`${server.url}/v1/completions`, post(validBodies['/v1/completions']))
  expect(response.status).toBe(200)
  await response.text()
  await server.close({ timeout: 0 })
  expect(records.every(({ status }) => status < 500)).toBe(true)
  expect(dispose()).toBe(0)
})
