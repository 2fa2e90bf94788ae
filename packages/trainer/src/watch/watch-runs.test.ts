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

/** A request as it is written, of which `fetch` would tidy the path. */
function ask(url: string, path: string, { method = 'GET', headers = {} } = {}) {
  const { hostname, port } = new URL(url)
  return new Promise<{ status: number; text: string; headers: Record<string, unknown> }>((done, failed) => {
    const asked = httpRequest({ hostname, port, path, method, headers }, response => {
      let text = ''
      response.setEncoding('utf8').on('data', part => {
        text += part
      })
      response.on('end', () => done({ status: response.statusCode ?? 0, text, headers: response.headers }))
    })
    asked.on('error', failed).end()
  })
}

interface Message {
  folder: string
  now: number
  gone: string[]
  runs: Array<{ state: { name: string; step: number }; series: { from: number; steps: number[] } }>
}

/** Server-sent events, one after the other. */
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
  test('comes with all that it names, and nothing from elsewhere', async () => {
    const url = await watch(await temporaryFolder())
    const page = await ask(url, '/')
    expect(page).toMatchObject({ status: 200, headers: { 'content-type': 'text/html; charset=utf-8' } })
    expect(page.headers['content-security-policy']).toMatch(/default-src 'none'/)
    const pending = [...page.text.matchAll(/(?:href|src)="(?!data:)([^"]+)"/g)].map(([, path]) => path)
    const seen = new Set<string>()
    for (let path = pending.pop(); path !== undefined; path = pending.pop()) {
      if (seen.has(path)) continue
      seen.add(path)
      const { status, text, headers } = await ask(url, `/${path}`)
      expect([path, status]).toEqual([path, 200])
      expect(headers['content-type']).toMatch(path.endsWith('.css') ? 'text/css' : 'text/javascript')
      pending.push(...[...text.matchAll(/^import .* from '\.\/([^']+)'/gm)].map(([, imported]) => imported))
    }
    expect([...seen].sort()).toEqual(['charts.js', 'numbers.js', 'page.css', 'page.js', 'uplot.css', 'uplot.js'])
  })

  test('has a head alone, and takes nothing', async () => {
    const url = await watch(await temporaryFolder())
    expect(await ask(url, '/page.js', { method: 'HEAD' })).toMatchObject({ status: 200, text: '' })
    for (const method of ['POST', 'PUT', 'DELETE']) expect((await ask(url, '/', { method })).status).toBe(405)
  })

  test('leads to no other file', async () => {
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
      expect([path, await ask(url, path)]).toMatchObject([path, { status: 404, text: 'nothing here\n' }])
    }
    expect((await ask(url, '/page.js?../../package.json')).status).toBe(200)
  })
})

describe('where it listens', () => {
  test('this machine alone, unless told otherwise', async () => {
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

  test('a name of the web that leads here is refused', async () => {
    const folder = await temporaryFolder()
    const url = await watch(folder)
    const { host, port } = new URL(url)
    for (const name of ['evil.example', `evil.example:${port}`, 'localhost.evil.example', '127.0.0.1.evil.example'])
      for (const path of ['/', '/runs.json', '/live'])
        expect((await ask(url, path, { headers: { host: name } })).status).toBe(403)
    for (const name of [host, 'localhost', `localhost:${port}`, `[::1]:${port}`])
      expect((await ask(url, '/runs.json', { headers: { host: name } })).status).toBe(200)
    const open = await watch(folder, { host: '0.0.0.0' })
    expect((await ask(open, '/runs.json', { headers: { host: 'lab.example' } })).status).toBe(200)
  })

  test('a port that is taken', async () => {
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
  ])('%j cannot be', async options => {
    await expect(watchRuns('runs', options)).rejects.toMatchObject({ code: expect.stringMatching(/^E_/) })
  })
})

test('runs.json has the state of each run', async () => {
  const folder = await temporaryFolder()
  const url = await watch(join(folder, 'later'))
  expect(JSON.parse((await ask(url, '/runs.json')).text)).toEqual({ folder: join(folder, 'later'), runs: [] })
  await makeRun(folder, 'later/a', 3)
  await makeRun(folder, 'later/deep/b', 2)
  const { runs } = JSON.parse((await ask(url, '/runs.json')).text)
  expect(runs.map(({ name, step }: { name: string; step: number }) => [name, step])).toEqual([
    ['a', 3],
    ['deep/b', 2],
  ])
})

describe('live', () => {
  /** The next message in which a run has a step: files may be seen before anything is in them. */
  async function until(stream: AsyncGenerator<Message>, name: string, step: number) {
    for (;;) {
      const { runs, gone } = (await stream.next()).value as Message
      const run = runs.find(({ state }) => state.name === name && state.step === step)
      if (run !== undefined) return { ...run.series, others: runs.length - 1, gone }
    }
  }

  test('first all there is, then what is added, and what is gone', async () => {
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
    // A second reader has it all, though the first has been told.
    const second = messages(url)
    expect(await until(second, 'a', 2)).toMatchObject({ from: 0, steps: [1, 2], others: 1 })
    await stream.return(undefined)
    await second.return(undefined)
  })

  test('a run that begins anew is sent anew, though it is longer', async () => {
    const folder = await temporaryFolder()
    await makeRun(folder, 'a', 2)
    const stream = messages(await watch(folder))
    await stream.next()
    await rm(join(folder, 'a', 'metrics.jsonl'))
    await makeRun(folder, 'a', 4)
    expect(await until(stream, 'a', 4)).toMatchObject({ from: 0, steps: [1, 2, 3, 4] })
    await stream.return(undefined)
  })

  test('closing ends the connections', async () => {
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

  test('watch tells where the page is, and a signal ends it', async () => {
    const folder = await temporaryFolder()
    await makeRun(folder, 'a')
    const { program, output, code } = start('watch', folder, '--port', '0', '--json')
    await new Promise(done => program.stdout.once('data', done))
    const { url } = JSON.parse(output.out)
    const { runs } = JSON.parse((await ask(url, '/runs.json')).text)
    expect(runs).toMatchObject([{ name: 'a' }])
    program.kill('SIGTERM')
    if (process.platform !== 'win32') expect(await code).toBe(0)
  })

  test.each([
    [[], 2, /moe-trainer COMMAND/],
    [['--help'], 0, /moe-trainer COMMAND/],
    [['train'], 2, /there is no command train/],
    [['watch', 'a', 'b'], 2, /watch takes one folder/],
    [['watch', '--port', 'x'], 2, /--port x is not a whole number/],
    [['watch', '--prot', '1'], 2, /--prot/],
    [['watch', command], 2, /is no folder/],
    [['watch', '--port', '70000'], 1, /port is 70000/],
  ])('%j', async (args, wanted, said) => {
    const { output, code } = start(...args)
    expect(await code).toBe(wanted)
    expect(output.out + output.error).toMatch(said)
  })
})
