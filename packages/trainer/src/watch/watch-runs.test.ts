import { spawn } from 'node:child_process'
import { appendFile, mkdir, rm, symlink, writeFile } from 'node:fs/promises'
import { createServer, request as httpRequest } from 'node:http'
import { type AddressInfo, connect } from 'node:net'
import { networkInterfaces } from 'node:os'
import { join } from 'node:path'
import { afterEach, describe, expect, test } from 'vitest'
import { removeTemporaryFolders, temporaryFolder } from '../test-model.ts'
import { findRuns } from './find-runs.ts'
import { type Watcher, type WatchOptions, watchRuns } from './watch-runs.ts'

const watchers: Watcher[] = []
afterEach(async () => {
  for (const watcher of watchers.splice(0)) await watcher.close()
  await removeTemporaryFolders()
})

async function watch(folder: string, options: WatchOptions = {}) {
  const watcher = await watchRuns(folder, { port: 0, ...options })
  watchers.push(watcher)
  return watcher.url
}

async function makeRun(folder: string, name: string, steps = 1) {
  await mkdir(join(folder, name), { recursive: true })
  const lines = Array.from({ length: steps }, (_, i) => `{"step":${i + 1},"nll":${i}}\n`)
  await appendFile(join(folder, name, 'metrics.jsonl'), lines.join(''))
}

/** Sends a request with the path unchanged, which `fetch` would normalize. */
function send(url: string, path: string, { method = 'GET', headers = {} } = {}) {
  const { hostname, port } = new URL(url)
  return new Promise<{ status: number; text: string; headers: Record<string, unknown> }>((done, failed) => {
    const request = httpRequest({ hostname, port, path, method, headers }, response => {
      let text = ''
      response.setEncoding('utf8').on('data', part => {
        text += part
      })
      response.on('end', () => done({ status: response.statusCode ?? 0, text, headers: response.headers }))
    })
    request.on('error', failed).end()
  })
}

interface Message {
  folder: string
  now: number
  gone: string[]
  runs: Array<{ state: { name: string; step: number }; series: { from: number; steps: number[] } }>
}

/** The messages of the server-sent events. */
async function* messages(url: string, signal?: AbortSignal): AsyncGenerator<Message> {
  const { body, headers } = await fetch(`${url}live`, { signal })
  expect(headers.get('content-type')).toBe('text/event-stream')
  let text = ''
  for await (const part of body!.pipeThrough(new TextDecoderStream())) {
    text += part
    for (let end = text.indexOf('\n\n'); end >= 0; end = text.indexOf('\n\n')) {
      yield JSON.parse(text.slice('data: '.length, end))
      text = text.slice(end + 2)
    }
  }
}

describe('the page', () => {
  test('serves everything that it references, and nothing external', async () => {
    const url = await watch(await temporaryFolder())
    const page = await send(url, '/')
    expect(page).toMatchObject({ status: 200, headers: { 'content-type': 'text/html; charset=utf-8' } })
    expect(page.headers['content-security-policy']).toMatch(/default-src 'none'/)
    const pending = [...page.text.matchAll(/(?:href|src)="(?!data:)([^"]+)"/g)].map(([, path]) => path)
    const seen = new Set<string>()
    for (let path = pending.pop(); path !== undefined; path = pending.pop()) {
      if (seen.has(path)) continue
      seen.add(path)
      const { status, text, headers } = await send(url, `/${path}`)
      expect([path, status]).toEqual([path, 200])
      expect(headers['content-type']).toMatch(path.endsWith('.css') ? 'text/css' : 'text/javascript')
      pending.push(...[...text.matchAll(/^import .* from '\.\/([^']+)'/gm)].map(([, imported]) => imported))
    }
    const own = ['charts', 'experts', 'heat-map', 'loads', 'numbers', 'page', 'uplot', 'zoom'].map(name => `${name}.js`)
    expect([...seen].sort()).toEqual([...own, 'page.css', 'uplot.css'].sort())
  })

  test('answers HEAD, and rejects other methods', async () => {
    const url = await watch(await temporaryFolder())
    expect(await send(url, '/page.js', { method: 'HEAD' })).toMatchObject({ status: 200, text: '' })
    for (const method of ['POST', 'PUT', 'DELETE']) expect((await send(url, '/', { method })).status).toBe(405)
  })

  test('does not serve any other file', async () => {
    const folder = await temporaryFolder()
    await makeRun(folder, 'a')
    await writeFile(join(folder, 'secret.txt'), 'secret')
    const url = await watch(folder)
    const paths = [
      ...['/secret.txt', '/a/metrics.jsonl', '/../package.json', '/page/../../package.json', '/..%2fpackage.json'],
      ...[
        '/%2e%2e/package.json',
        '/..\\package.json',
        '//etc/passwd',
        '/%2fetc%2fpasswd',
        '/page.js/../../package.json',
      ],
      ...['/./page.js', '/page.js/', '/package.json', '/page.js%00', '/runs.json/..', '/toString', '/__proto__'],
      `${folder}/secret.txt`,
    ]
    for (const path of paths) {
      expect([path, await send(url, path)]).toMatchObject([path, { status: 404, text: 'not found\n' }])
    }
    expect((await send(url, '/page.js?../../package.json')).status).toBe(200)
  })
})

describe('the server', () => {
  test('listens only on the loopback interface by default', async () => {
    const url = await watch(await temporaryFolder())
    expect(url).toMatch(/^http:\/\/127\.0\.0\.1:\d+\/$/)
    const own = Object.values(networkInterfaces())
      .flat()
      .find(one => one?.family === 'IPv4' && !one.internal)
    if (own === undefined) return
    await expect(
      new Promise((done, failed) => {
        connect(Number(new URL(url).port), own.address)
          .once('connect', done)
          .once('error', failed)
      }),
    ).rejects.toThrow(/ECONNREFUSED/)
  })

  test('rejects requests with a foreign host name, unless it listens on all interfaces', async () => {
    const folder = await temporaryFolder()
    const url = await watch(folder)
    const { host, port } = new URL(url)
    for (const name of ['evil.example', `evil.example:${port}`, 'localhost.evil.example', '127.0.0.1.evil.example'])
      for (const path of ['/', '/runs.json', '/live'])
        expect((await send(url, path, { headers: { host: name } })).status).toBe(403)
    for (const name of [host, 'localhost', `localhost:${port}`, `[::1]:${port}`])
      expect((await send(url, '/runs.json', { headers: { host: name } })).status).toBe(200)
    const open = await watch(folder, { host: '0.0.0.0' })
    expect((await send(open, '/runs.json', { headers: { host: 'lab.example' } })).status).toBe(200)
  })

  test('rejects a port in use', async () => {
    const other = createServer().listen(0, '127.0.0.1')
    await new Promise(done => other.once('listening', done))
    const { port } = other.address() as AddressInfo
    await expect(watchRuns('runs', { port })).rejects.toMatchObject({ code: 'E_CONFIG' })
    await new Promise(done => other.close(done))
  })

  test.each([
    [{ port: -1 }],
    [{ port: 1.5 }],
    [{ port: 65536 }],
    [{ prot: 1 } as WatchOptions],
    [{ port: 0, host: '192.0.2.1' }],
  ])('rejects the options %j', async options => {
    await expect(watchRuns('runs', options)).rejects.toMatchObject({ code: expect.stringMatching(/^E_/) })
  })
})

test('runs.json has the state of each run', async () => {
  const folder = await temporaryFolder()
  const url = await watch(join(folder, 'later'))
  expect(JSON.parse((await send(url, '/runs.json')).text)).toEqual({ folder: join(folder, 'later'), runs: [] })
  await makeRun(folder, 'later/a', 3)
  await makeRun(folder, 'later/deep/b', 2)
  const { runs } = JSON.parse((await send(url, '/runs.json')).text)
  expect(runs.map(({ name, step }: { name: string; step: number }) => [name, step])).toEqual([
    ['a', 3],
    ['deep/b', 2],
  ])
})

describe('details of a run', () => {
  const get = async (url: string, path: string, query: Record<string, string | number>) => {
    const { status, text } = await send(url, `/${path}?${new URLSearchParams(query as Record<string, string>)}`)
    return status === 200 ? JSON.parse(text) : status
  }

  test('series.json returns a range of steps with the requested number of points', async () => {
    const folder = await temporaryFolder()
    await makeRun(folder, 'deep/a b&c', 5000)
    const url = await watch(folder)
    const series = (query: object) => get(url, 'series.json', { run: 'deep/a b&c', ...query })
    const nll = ({ columns }: { columns: Array<{ name: string; mean: number[] }> }) =>
      columns.find(({ name }) => name === 'nll')?.mean
    const part = await series({ from: 2001, to: 2010, most: 500 })
    expect(part.steps).toEqual(Array.from({ length: 10 }, (_, i) => 2001 + i))
    expect(nll(part)).toEqual(Array.from({ length: 10 }, (_, i) => 2000 + i))
    expect(part.linesPerPoint).toBe(1)
    const coarse = await series({ from: 1001, to: 2000, most: 100 })
    expect(coarse).toMatchObject({ from: 0, linesPerPoint: 16 })
    expect(nll(coarse)?.[0]).toBe((1000 + 1015) / 2)
    expect((await series({})).steps.length).toBeLessThanOrEqual(2000)
    expect((await series({ from: 9000 })).steps).toEqual([])
    expect((await series({ from: 'x', to: '', most: 'many' })).steps.length).toBeGreaterThan(0)
    expect((await series({ most: -3 })).steps.length).toBeGreaterThan(0)
    expect((await series({ most: 1e9 })).steps).toHaveLength(5000)
  })

  const line = (step: number, loads: number[][], steps = 10) =>
    `${JSON.stringify({ step, steps, layers: loads.map((load, i) => ({ name: `layers.${i + 1}`, load, bias: load })) })}\n`

  test('loads.json returns the loads of experts, at a step and over time', async () => {
    const folder = await temporaryFolder()
    await makeRun(folder, 'a', 40)
    await makeRun(folder, 'dense', 4)
    const path = join(folder, 'a', 'loads.jsonl')
    const lines = [10, 20, 30].map(step =>
      line(step, [
        [step, 0],
        [1, 2],
      ]),
    )
    await writeFile(path, lines.join(''))
    const url = await watch(folder)
    const loads = (query: object) => get(url, 'loads.json', { run: 'a', ...query })
    const { runs } = JSON.parse((await send(url, '/runs.json')).text)
    expect(runs.map(({ loads }: { loads: unknown }) => loads)).toEqual([
      { first: 10, last: 30, layers: ['layers.1', 'layers.2'] },
      null,
    ])
    const steps = [0, 10, 11, 20, 30, 31, 1e9].map(async step => (await loads({ step })).step)
    expect(await Promise.all(steps)).toEqual([10, 10, 20, 20, 30, 30, 30])
    expect(await loads({ step: 'x' })).toEqual(await loads({}))
    expect(await loads({ step: 12 })).toEqual({
      step: 20,
      steps: 10,
      layers: [
        { name: 'layers.1', groups: 1, load: [20, 0], bias: [20, 0] },
        { name: 'layers.2', groups: 1, load: [1, 2], bias: [1, 2] },
      ],
    })
    const over = async (query: object) =>
      (await loads({ layer: 'layers.1', ...query })).map(({ step, load }: { step: number; load: number[] }) => [
        step,
        load,
      ])
    expect(await over({})).toEqual([10, 20, 30].map(step => [step, [step, 0]]))
    expect(await over({ from: 15, to: 25 })).toEqual([[20, [20, 0]]])
    expect((await over({ most: 2 })).map(([step]: [number]) => step)).toEqual([10, 30])
    expect(await over({ layer: 'layers.9' })).toEqual([])
    await appendFile(path, line(40, [[4, 4]]))
    await send(url, '/runs.json')
    expect((await loads({})).layers).toHaveLength(1)
    expect(await get(url, 'loads.json', { run: 'dense' })).toBe(404)
    expect(await get(url, 'loads.json', { run: 'dense', layer: 'layers.1' })).toEqual([])
    for (const run of ['', '..', 'b', '__proto__', '../a', join(folder, 'a')])
      for (const path of ['series.json', 'loads.json']) expect(await get(url, path, { run })).toBe(404)
  })

  test('loads.json leaves out invalid lines and fields', async () => {
    const folder = await temporaryFolder()
    await makeRun(folder, 'a')
    const layers = [
      { name: 'good', load: [1, 2], groups: 3, bias: [1], dropped: 'x', stepMaxVio: null, other: 1 },
      ...[{ load: [1] }, { name: 'a' }, { name: 'a', load: [] }, { name: 'a', load: ['1'] }, null, [1]],
    ]
    await writeFile(
      join(folder, 'a', 'loads.jsonl'),
      `{"step":1}\n{"step":2,"layers":{}}\nnull\n${JSON.stringify({ step: 3, steps: 'x', layers })}\n`,
    )
    const url = await watch(folder)
    const at = (step: number) => get(url, 'loads.json', { run: 'a', step })
    expect(await at(1)).toEqual({ step: 1, steps: 1, layers: [] })
    expect(await at(2)).toEqual({ step: 2, steps: 1, layers: [] })
    expect(await at(3)).toEqual({ step: 3, steps: 1, layers: [{ name: 'good', groups: 1, load: [1, 2] }] })
  })
})

describe('the live stream', () => {
  /** The next message in which a run has a step. Messages before it may have the run without any step yet. */
  async function until(stream: AsyncGenerator<Message>, name: string, step: number) {
    for (;;) {
      const { runs, gone } = (await stream.next()).value as Message
      const run = runs.find(({ state }) => state.name === name && state.step === step)
      if (run !== undefined) return { ...run.series, others: runs.length - 1, gone }
    }
  }

  test('sends all runs first, then what is added and removed', async () => {
    const folder = await temporaryFolder()
    await makeRun(folder, 'a', 3)
    const url = await watch(folder)
    const stream = messages(url)
    const first = (await stream.next()).value as Message
    expect(first).toMatchObject({ folder, gone: [], runs: [{ state: { name: 'a', step: 3 } }] })
    expect(first.runs[0].series).toMatchObject({ from: 0, steps: [1, 2, 3] })
    await appendFile(join(folder, 'a', 'metrics.jsonl'), '{"step":4,"nll":9}\n{"step":5,')
    expect(await until(stream, 'a', 4)).toMatchObject({ from: 2, steps: [3, 4], others: 0 })
    await appendFile(join(folder, 'a', 'metrics.jsonl'), '"nll":8}\n')
    expect(await until(stream, 'a', 5)).toMatchObject({ from: 3, steps: [4, 5], others: 0 })
    await makeRun(folder, 'b', 2)
    expect(await until(stream, 'b', 2)).toMatchObject({ from: 0, steps: [1, 2], others: 0 })
    await rm(join(folder, 'a'), { recursive: true })
    let gone: readonly string[] = []
    while (gone.length === 0) gone = ((await stream.next()).value as Message).gone
    expect(gone).toEqual(['a'])
    await makeRun(folder, 'a', 2)
    expect(await until(stream, 'a', 2)).toMatchObject({ from: 0, steps: [1, 2], others: 0, gone: [] })
    // A second client gets everything, although the first already has it.
    const second = messages(url)
    expect(await until(second, 'a', 2)).toMatchObject({ from: 0, steps: [1, 2], others: 1 })
    await stream.return(undefined)
    await second.return(undefined)
  })

  test('sends a restarted run again from its first step, even if it is longer', async () => {
    const folder = await temporaryFolder()
    await makeRun(folder, 'a', 2)
    const stream = messages(await watch(folder))
    await stream.next()
    await rm(join(folder, 'a', 'metrics.jsonl'))
    await makeRun(folder, 'a', 4)
    expect(await until(stream, 'a', 4)).toMatchObject({ from: 0, steps: [1, 2, 3, 4] })
    await stream.return(undefined)
  })

  test('ends when the server is closed', async () => {
    const watcher = await watchRuns(await temporaryFolder(), { port: 0 })
    const stream = messages(watcher.url)
    expect(((await stream.next()).value as Message).runs).toEqual([])
    const rest = stream.next()
    await watcher.close()
    await rest.then(
      ({ done }) => expect(done).toBe(true),
      error => expect(String(error)).toMatch(/terminated/),
    )
    await expect(fetch(watcher.url)).rejects.toThrow()
  })
})

test('runs are found below a folder, but not below runs, checkpoints, hidden folders and links', async () => {
  const folder = await temporaryFolder()
  for (const name of ['a', 'b/c', 'a/within', '.hidden/d', 'b/checkpoints/e', 'node_modules/f', '1/2/3/4/5/6/deep'])
    await makeRun(folder, name)
  const other = await temporaryFolder()
  await makeRun(other, 'linked')
  await symlink(other, join(folder, 'link'), 'junction')
  await mkdir(join(folder, 'g', 'metrics.jsonl'), { recursive: true })
  await mkdir(join(folder, 'h'))
  await writeFile(join(folder, 'h', 'events.jsonl'), '')
  expect([...(await findRuns(folder)).keys()].sort()).toEqual(['a', 'b/c', 'h'])
  expect([...(await findRuns(join(folder, 'a'))).keys()]).toEqual(['a'])
  expect((await findRuns(join(folder, 'nowhere'))).size).toBe(0)
})

describe('moe-trainer', () => {
  const command = join(import.meta.dirname, '..', 'cli.ts')

  function start(...args: string[]) {
    const program = spawn(process.execPath, [command, ...args])
    const output = { out: '', error: '' }
    program.stdout.on('data', part => {
      output.out += part
    })
    program.stderr.on('data', part => {
      output.error += part
    })
    const code = new Promise<number | null>(done => program.once('close', done))
    return { program, output, code }
  }

  test('watch prints the URL of the page, and a signal stops it', async () => {
    const folder = await temporaryFolder()
    await makeRun(folder, 'a')
    const { program, output, code } = start('watch', folder, '--port', '0', '--json')
    await new Promise(done => program.stdout.once('data', done))
    const { url } = JSON.parse(output.out)
    const { runs } = JSON.parse((await send(url, '/runs.json')).text)
    expect(runs).toMatchObject([{ name: 'a' }])
    program.kill('SIGTERM')
    if (process.platform !== 'win32') expect(await code).toBe(0)
  })

  test.each([
    [[], 2, /missing COMMAND\nSee moe-trainer --help/],
    [['--help'], 0, /moe-trainer COMMAND/],
    [['train'], 2, /unknown command train, expected one of watch, tokenize/],
    [['watch', 'a', 'b'], 2, /expected one FOLDER, got 2/],
    [['watch', '--port', 'x'], 2, /--port is "x", expected an integer/],
    [['watch', '--seed', '1'], 2, /unknown option --seed for watch\n/],
    [['watch', '--prot', '1'], 2, /unknown option --prot\n/],
    [['watch', '--prot', '1', '--json'], 2, /^\{"error":\{"code":"E_USAGE","message":"unknown option --prot"\}\}\n$/],
    [['watch', command], 2, /is not a folder/],
    [['watch', '--port', '70000'], 1, /port is 70000/],
  ])('called with %j, it exits with %i and prints %s', async (args, expectedCode, text) => {
    const { output, code } = start(...args)
    expect(await code).toBe(expectedCode)
    expect(output.out + output.error).toMatch(text)
  })
})
