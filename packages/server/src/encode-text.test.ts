/** @file Long prompts, which are encoded on a worker thread, equal those that are encoded directly. */
import { expect, onTestFinished, test, vi } from 'vitest'
import { post, scriptedServer, tokenizer } from './test-server.ts'

const long = 'the better angels of our nature 🙂 '.repeat(6000)

function server() {
  const encode = vi.spyOn(tokenizer, 'encode')
  onTestFinished(() => encode.mockRestore())
  const script = async function* () {
    yield 'so'
  }
  return { encode, ...scriptedServer(script, {}, 1e6) }
}

test('prompts of completions', async () => {
  const { app, engine, encode } = server()
  const response = await app.request('/v1/completions', post({ prompt: [long, 'the'] }))
  expect(response.status).toBe(200)
  expect(encode.mock.calls.filter(([text]) => text.length > 0)).toEqual([['the', {}]])
  encode.mockRestore()
  expect(engine.calls.map(({ ids }) => ids)).toEqual([long, 'the'].map(text => [...tokenizer.encode(text)]))
})

test('chats, whose template contains the special tokens', async () => {
  const { app, engine, encode } = server()
  const batch = vi.spyOn(tokenizer, 'encodeBatch')
  onTestFinished(() => batch.mockRestore())
  const response = await app.request('/v1/chat/completions', post({ messages: [{ role: 'user', content: long }] }))
  expect(response.status).toBe(200)
  expect(encode).not.toHaveBeenCalled()
  const text = `<|begin|><|user|>user: ${long}<|assistant|>`
  expect(batch).toHaveBeenCalledWith([text], expect.objectContaining({ addSpecialTokens: false }))
  expect(engine.calls[0].ids).toEqual([...tokenizer.encode(text, { addSpecialTokens: false })])
})
