import { EventEmitter, once } from 'node:events'
import { PassThrough } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import { ChatTemplate } from '@moe/tokenizer-bpe/data'
import { expect, test } from 'vitest'
import type { ServerOptions } from './index.ts'
import { chatInTerminal } from './terminal-chat.ts'
import { type EngineCall, scriptedServer, tokenizer } from './test-server.ts'

type Script = Parameters<typeof scriptedServer>[0]

type Settings = Partial<ServerOptions> & { isTTY?: boolean; context?: number; json?: boolean; color?: boolean }

/** A conversation with scripted answers. */
function chat(script: Script, { isTTY = true, context = 500, json, color, ...server }: Settings = {}) {
  const { app, engine } = scriptedServer(script, server, context)
  const written = { output: '', notes: '' }
  const stream = () => Object.assign(new PassThrough({ encoding: 'utf8' }), { isTTY })
  const [input, output, notes] = [stream(), stream(), stream()]
  output.on('data', text => (written.output += text))
  notes.on('data', text => (written.notes += text))
  const signals = new EventEmitter()
  const over = chatInTerminal({ app, model: 'tiny', context, input, output, notes, signals, json, color })
  /** Types lines and waits until the next one can be typed. */
  const type = async (...lines: string[]) => {
    const before = written.notes.length
    input.write(lines.map(line => `${line}\n`).join(''))
    await expect.poll(() => written.notes.slice(before).endsWith('> \x1b[3G'), { interval: 2 }).toBe(true)
    return written.notes.slice(before)
  }
  return { over, input, signals, calls: engine.calls, written, type }
}

const promptOf = ({ ids }: EngineCall) => tokenizer.decode(ids)

/** Answers with the number of the call. */
function counting(): Script {
  let calls = 0
  return async function* (_, stats) {
    stats.tokens = 2
    stats.finishReason = 'stop'
    yield 'answer '
    yield `${++calls}`
  }
}

test('text that is not from a terminal is one message', async () => {
  const { over, input, calls, written } = chat(counting(), { isTTY: false })
  input.end('the people\n\nof our nature\n')
  expect(await over).toBe(true)
  expect(calls.map(promptOf)).toEqual(['<|begin|><|user|>user: the people\n\nof our nature<|assistant|>'])
  expect(written.output).toBe('answer 1\n')
  expect(written.notes).toMatch(/^2 tokens, .+ tokens\/s, context \d+ of 500\n$/)
})

test('with json, an answer is one line of JSON', async () => {
  const { over, input, written } = chat(counting(), { isTTY: false, json: true })
  input.end('the')
  await over
  expect(JSON.parse(written.output)).toEqual({
    role: 'assistant',
    content: 'answer 1',
    finish_reason: 'stop',
    usage: expect.objectContaining({ completion_tokens: 2 }),
  })
  expect(written.notes).toBe('')
})

test('without a terminal, a missing message and a rejected one are errors', async () => {
  const empty = chat(counting(), { isTTY: false })
  empty.input.end(' \n')
  await expect(empty.over).rejects.toThrow('standard input is empty, expected a message')
  const long = chat(counting(), { isTTY: false, context: 20 })
  long.input.end('the people '.repeat(50))
  await expect(long.over).rejects.toThrow(/the context length of this model is 20/)
})

test('in a terminal, lines are messages of one conversation, with a system message and settings', async () => {
  const { over, input, calls, written, type } = chat(counting())
  await type('the people')
  await type('/system be nature')
  await type('/set temperature 0.5')
  await type('/set stop "x"')
  expect(await type('/set')).toContain('temperature 0.5\nstop "x"\n')
  await type('for all')
  await type('/clear')
  await type('/system')
  await type('/set temperature')
  await type(' /angels')
  input.write('/exit\n')
  expect(await over).toBe(true)
  expect(calls.map(promptOf)).toEqual([
    '<|begin|><|user|>user: the people<|assistant|>',
    '<|begin|><|user|>system: be nature<|user|>user: the people<|user|>assistant: answer 1<|user|>user: for all<|assistant|>',
    '<|begin|><|user|>user:  /angels<|assistant|>',
  ])
  expect(calls.map(({ options }) => [options.temperature, options.stop])).toEqual([
    [1, []],
    [0.5, ['x']],
    [1, ['x']],
  ])
  expect(written.output).toBe('answer 1\nanswer 2\nanswer 3\n')
})

test('a message may have several lines, typed or pasted', async () => {
  const { over, input, calls, type } = chat(counting())
  const promised = type('the \\')
  await sleep(60)
  input.write('people\n')
  await promised
  await type('our', 'better', 'angels \\ ')
  input.write('of our\nnat') // a pasted text need not end with a line feed
  await sleep(60)
  expect(calls).toHaveLength(2)
  await type('ure')
  input.end()
  await over
  const messages = calls.map(call => promptOf(call).replace(/^.*user: (.*?)<\|assistant\|>$/s, '$1'))
  expect(messages).toEqual(['the \npeople', 'our\nbetter\nangels \\ ', 'of our\nnature'])
})

test('errors leave the conversation as it was', async () => {
  const { over, input, calls, type } = chat(counting())
  expect(await type('/cleer')).toContain('unknown command /cleer')
  expect(await type('/set messages []')).toContain('messages cannot be set in a conversation')
  expect(await type('forbidden')).toContain('no such words')
  await type('/set temperatur 1')
  expect(await type('the')).toContain('did you mean temperature?')
  await type('/set temperatur')
  await type('people')
  input.end()
  await over
  expect(calls.map(promptOf)).toEqual(['<|begin|><|user|>user: people<|assistant|>'])
})

test('a full context is explained', async () => {
  const script: Script = async function* (_, stats) {
    Object.assign(stats, { tokens: 11, finishReason: 'length' })
    yield 'the people'
  }
  const { over, input, type } = chat(script, { context: 20 })
  expect(await type('our')).toContain('tokens/s, context 20 of 20, the context is full\n')
  expect(await type('better angels')).toContain('; /clear starts a new conversation\n')
  input.end()
  await over
})

test('an error during an answer ends it, and the message is not remembered', async () => {
  let calls = 0
  const script: Script = async function* (_, stats) {
    stats.finishReason = 'stop'
    yield 'the '
    if (calls++ === 0) throw new Error('defect')
  }
  const { over, input, calls: made, type } = chat(script)
  expect(await type('our')).toContain('internal server error')
  await type('nature')
  input.end()
  await over
  expect(promptOf(made[1])).toBe('<|begin|><|user|>user: nature<|assistant|>')
})

test('Ctrl-C stops an answer, of which the conversation keeps what was generated', async () => {
  const begun = new EventEmitter()
  const script: Script = async function* ({ options }, stats) {
    stats.finishReason = null
    const aborted = once(options.signal as AbortSignal, 'abort')
    if (calls.length !== 2) yield 'the better '
    begun.emit('begun')
    if (calls.length < 3) {
      await aborted
      throw new DOMException('aborted', 'AbortError')
    }
    stats.finishReason = 'stop'
  }
  const { over, input, signals, calls, written, type } = chat(script)
  for (const message of ['our', 'nature']) {
    const stopped = once(begun, 'begun').then(() => sleep(10).then(() => signals.emit('SIGINT')))
    expect(await type(message)).toContain('interrupted\n')
    await stopped
  }
  await type('people')
  expect(signals.listenerCount('SIGINT')).toBe(0)
  input.end()
  expect(await over).toBe(true)
  expect(promptOf(calls[2])).toBe(
    '<|begin|><|user|>user: our<|user|>assistant: the better <|user|>user: people<|assistant|>',
  )
  expect(written.output).toBe('the better \n\nthe better \n')
})

test('an interrupted answer to text from a pipe is incomplete', async () => {
  const script: Script = async function* ({ options }) {
    yield 'the'
    signals.emit('SIGINT')
    if (!options.signal?.aborted) await once(options.signal as AbortSignal, 'abort')
    throw new DOMException('aborted', 'AbortError')
  }
  const { over, input, signals, written } = chat(script, { isTTY: false })
  input.end('our')
  expect(await over).toBe(false)
  expect(written.output).toBe('the\n')
})

test('Ctrl-C discards what was typed, and ends the conversation if that is nothing', async () => {
  const { over, input, calls, type } = chat(counting())
  input.write('the people')
  await sleep(10)
  await type('\x03/set')
  input.write('\x03')
  expect(await over).toBe(true)
  expect(calls).toEqual([])
})

test('reasoning is printed beside the answer, and control characters are removed', async () => {
  const chatTemplate = await ChatTemplate.from({
    chat_template: "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}<think>",
  })
  const script: Script = async function* (_, stats) {
    stats.tokens = 4
    stats.finishReason = 'length'
    yield 'we the\x1b[2J people</think>\n\nan'
    yield 'gels\x9b of\tour\nnature'
  }
  const { over, input, written } = chat(script, { chatTemplate, color: true })
  input.end('nature\n')
  await over
  expect(written.output).toBe('angels of\tour\nnature\n')
  expect(written.notes).toContain('\x1b[2mwe the[2J people\x1b[0m\n\n')
  expect(written.notes).toContain('stopped at max_tokens')
})
