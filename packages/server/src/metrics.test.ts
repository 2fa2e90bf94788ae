import type { Completion } from 'openai/resources'
import { expect, test } from 'vitest'
import { paths, rejection, validBodies } from './test-rejections.ts'
import { events, modelServer, post } from './test-server.ts'

test('metrics count requests by path and status, and tokens', async () => {
  const { app, records, dispose } = modelServer()
  const [completions, chat] = paths
  type Usage = NonNullable<Completion['usage']>
  const usages: Usage[] = []
  for (const body of [validBodies[completions], { ...validBodies[completions], n: 2 }])
    usages.push(((await (await app.request(completions, post(body))).json()) as Completion).usage as Usage)
  const streamed = { ...validBodies[chat], stream: true, stream_options: { include_usage: true } }
  const all = (await events(await app.request(chat, post(streamed)))) as Completion[]
  usages.push(all[all.length - 2].usage as Usage)
  await rejection(app, completions, '{')
  await rejection(app, completions, { prompt: [], n: 1 })
  await rejection(app, chat, { ...validBodies[chat], model: 'other' })
  for (const path of ['/a', '/b{x="y"}', '/c%0Ad']) await app.request(path)
  await app.request('/health')
  const response = await app.request('/metrics')
  expect(response.headers.get('content-type')).toBe('text/plain; version=0.0.4; charset=utf-8')
  const text = await response.text()
  const samples = new Map(
    text
      .split('\n')
      .filter(line => line !== '' && !line.startsWith('#'))
      .map(line => {
        const [, name, value] = /^([a-z_]+(?:\{path="[\w/]+",status="\d+"\})?) ([\d.e+-]+)$/.exec(line) ?? []
        expect(name, line).toBeDefined()
        return [name, Number(value)]
      }),
  )
  const seconds = samples.get('moe_request_seconds_sum')
  samples.delete('moe_request_seconds_sum')
  const sum = (of: 'prompt_tokens' | 'completion_tokens') => usages.reduce((all, usage) => all + usage[of], 0)
  expect(Object.fromEntries(samples)).toEqual({
    'moe_requests_total{path="/v1/completions",status="200"}': 2,
    'moe_requests_total{path="/v1/completions",status="400"}': 2,
    'moe_requests_total{path="/v1/chat/completions",status="200"}': 1,
    'moe_requests_total{path="/v1/chat/completions",status="404"}': 1,
    'moe_requests_total{path="other",status="404"}': 3,
    'moe_requests_total{path="/health",status="200"}': 1,
    moe_texts_running: 0,
    moe_texts_waiting: 0,
    moe_prompt_tokens_total: sum('prompt_tokens'),
    moe_generated_tokens_total: sum('completion_tokens'),
    moe_request_seconds_count: 3,
  })
  const served = records.filter(({ status }) => status === 200).filter(({ promptTokens }) => promptTokens !== undefined)
  expect(seconds).toBeCloseTo(
    served.reduce((all, record) => all + record.seconds, 0),
    9,
  )
  expect(dispose()).toBe(0)
})

test('an onRequest that throws affects no request, streamed or not', async () => {
  const warnings: string[] = []
  const warned = ({ message }: Error) => warnings.push(message)
  process.on('warning', warned)
  const onRequest = () => {
    throw new Error('no space left on the disk of the log')
  }
  const { app, dispose } = modelServer({ onRequest })
  const [completions] = paths
  try {
    for (const stream of [false, true]) {
      const response = await app.request(completions, post({ ...validBodies[completions], stream }))
      expect(response.status).toBe(200)
      expect(await response.text()).toContain('finish_reason')
    }
    await new Promise(setImmediate)
    expect(warnings).toHaveLength(2)
    for (const warning of warnings) expect(warning).toMatch(/^onRequest failed: Error: no space left on the disk/)
  } finally {
    process.off('warning', warned)
    dispose()
  }
})
