/** @file Compilation of grammars on threads: the event loop is not blocked, and aborted requests cancel compilations that no other request needs. */
import { Random } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { type Form, LocalGrammars, type Vocabulary } from './grammar-host.ts'
import { openGrammars } from './grammar-thread.ts'
import { Grammars } from './grammars.ts'
import { supportedSchema } from './json-schema.ts'
import { post, scriptedServer, tokenizer } from './test-server.ts'
import { findXGrammar } from './xgrammar.ts'

const end = tokenizer.tokenToId('<|end|>') as number
const form = (schema: object): Form => [[supportedSchema(schema, 'schema')]]
/** A grammar that takes a second to compile with 20 lengths, and more than a minute with 200. */
const slow = (lengths: number) =>
  form({ anyOf: Array.from({ length: lengths }, (_, i) => ({ type: 'string', minLength: i, maxLength: 200 + i })) })

function vocabulary(): Vocabulary {
  const tokens = Array.from({ length: tokenizer.vocabSize }, (_, id) =>
    id === end ? new Uint8Array(0) : tokenizer.tokenBytes(id),
  )
  let size = 0
  const ends = Uint32Array.from(tokens, ({ length }) => (size += length))
  return { library: findXGrammar(), bytes: Buffer.concat(tokens), ends, stops: [end] }
}

test('a host on a thread returns the same masks as a local one', async () => {
  const hosts = [await openGrammars(vocabulary()), await LocalGrammars.open(vocabulary())]
  expect(hosts[0]).not.toBeInstanceOf(LocalGrammars)
  const random = new Random(3)
  for (const schema of [{ type: 'object' }, { enum: ['the', 'theft', 4] }, { type: 'number' }]) {
    const texts = await Promise.all(hosts.map(async host => host.begin(await host.compile(form(schema)))))
    let token: number | null = null
    for (let i = 0; i < 60; i++) {
      const [onThread, locally] = await Promise.all(hosts.map((host, h) => host.next(texts[h], token)))
      expect(onThread).toEqual(locally)
      if (token === end) expect(locally).toHaveLength(0)
      const allowed = Array.from({ length: 32 * locally.length }, (_, id) => id).filter(
        id => (locally[id >> 5] >>> (id & 31)) & 1,
      )
      if (allowed.length === 0) break
      token = allowed[random.integer(allowed.length)]
    }
    for (const [h, host] of hosts.entries()) {
      const other = await host.begin(await host.compile(form(schema)))
      await expect(host.next(other, end)).rejects.toThrow(`the grammar does not allow token ${end}`)
      host.end(texts[h])
      expect(await host.next(texts[h], null)).toHaveLength(0)
    }
  }
  for (const host of hosts) host.close()
  await expect(hosts[0].compile(form({}))).rejects.toThrow('has exited')
})

test('without threads, grammars are compiled on the calling thread', async () => {
  const broken = { ...vocabulary(), library: 'no such file' }
  await expect(openGrammars(broken)).rejects.toThrow('ENOENT')
  const unsent = { ...vocabulary(), stops: Object.assign([end], { cannot: () => 'be sent' }) }
  const host = await openGrammars(unsent)
  expect(host).toBeInstanceOf(LocalGrammars)
  expect((await host.next(await host.begin(await host.compile(form({ type: 'null' }))), null)).some(Boolean)).toBe(true)
})

describe('while a grammar is compiled', () => {
  test.each([1, 3])('the event loop runs, and %d other texts continue', async count => {
    const grammars = new Grammars(tokenizer, [end])
    const cheap = [{ type: 'array' }, { type: 'null' }, { type: 'boolean' }].slice(0, count)
    const others = await Promise.all(cheap.map(schema => grammars.constraints(form(schema), 1, 'schema')))
    const [text, ...idle] = others.flat()
    let compiled = false
    const compiling = grammars.constraints(slow(20), 1, 'schema').then(all => {
      compiled = true
      return all
    })
    let turns = 0
    let masks = 0
    while (!compiled) {
      await new Promise(setImmediate)
      turns++
      if (turns % 50 !== 0 || masks > 20) continue
      const words = await text.allowed()
      const open = [...'[ '].map(character => tokenizer.encode(character)[0])
      const next = open.find(id => (words[id >> 5] >>> (id & 31)) & 1)
      if (next !== undefined) text.accept(next)
      if (!compiled) masks++
    }
    expect(turns).toBeGreaterThan(200)
    expect(masks).toBeGreaterThan(3)
    for (const one of [text, ...idle, ...(await compiling)]) one.dispose()
  })

  test('further large grammars wait if too many threads have texts', async () => {
    const grammars = new Grammars(tokenizer, [end])
    const cheap = [{ type: 'array' }, { type: 'null' }, { type: 'boolean' }]
    const texts = await Promise.all(cheap.map(schema => grammars.constraints(form(schema), 1, 'schema')))
    const large = (more: number): Form => [['x'.repeat(2 ** 13 + more)]]
    const expensive = [1, 2, 3].map(more => grammars.constraints(large(more), 1, 'schema'))
    texts.push(...(await Promise.all(expensive)))
    const leave = new AbortController()
    const left = grammars.constraints(large(4), 1, 'schema', leave.signal)
    let isDone = false
    const waits = grammars.constraints(large(5), 1, 'schema').finally(() => {
      isDone = true
    })
    leave.abort()
    await expect(left).rejects.toMatchObject({ status: 499 })
    // A grammar that is compiled meanwhile would be behind the large one.
    const [quick] = await grammars.constraints(form({ type: 'integer' }), 1, 'schema')
    expect((await quick.allowed()).some(Boolean)).toBe(true)
    expect(isDone).toBe(false)
    texts[0][0].dispose()
    for (const one of [quick, ...texts.slice(1).flat(), ...(await waits)]) one.dispose()
  })

  test('an aborted request is rejected at once, and others receive the grammar', async () => {
    const grammars = new Grammars(tokenizer, [end])
    const [leaves, stays] = [new AbortController(), new AbortController()]
    const gone = { status: 499 }
    const left = grammars.constraints(slow(10), 1, 'schema', leaves.signal)
    const got = grammars.constraints(slow(10), 2, 'schema', stays.signal)
    leaves.abort()
    await expect(left).rejects.toMatchObject(gone)
    for (const constraint of await got) {
      expect((await constraint.allowed()).some(Boolean)).toBe(true)
      constraint.dispose()
    }
    await expect(grammars.constraints(slow(10), 1, 'schema', AbortSignal.abort())).rejects.toMatchObject(gone)
  })

  test('a client that disconnects gets status 499, and nothing is generated', async () => {
    const { app, engine, records } = scriptedServer(async function* () {})
    const leave = new AbortController()
    const [{ schema }] = slow(60)[0] as unknown as [{ schema: object }]
    const format = { type: 'json_schema', json_schema: { name: 'a', schema } }
    const body = { messages: [{ role: 'user', content: 'the' }], response_format: format }
    const asked = app.request('/v1/chat/completions', post(body, { signal: leave.signal }))
    setTimeout(() => leave.abort(), 50)
    expect((await asked).status).toBe(499)
    expect([records[0].status, engine.calls.length]).toEqual([499, 0])
  })

  test('a compilation that no request waits for is cancelled', async () => {
    const grammars = new Grammars(tokenizer, [end])
    const [first] = await grammars.constraints(form({ type: 'boolean' }), 1, 'schema')
    first.dispose()
    // More compilations than threads.
    for (let i = 0; i < 6; i++) {
      const leave = new AbortController()
      const asked = grammars.constraints(slow(200 - i), 1, 'schema', leave.signal)
      await new Promise(setImmediate)
      leave.abort()
      await expect(asked).rejects.toMatchObject({ status: 499 })
    }
    const all = [{ type: 'boolean' }, { type: 'null' }, { type: 'integer' }, { enum: ['a'] }]
    for (const schema of all) {
      const [constraint] = await grammars.constraints(form(schema), 1, 'schema')
      expect((await constraint.allowed()).some(Boolean)).toBe(true)
      constraint.dispose()
    }
  })
})
