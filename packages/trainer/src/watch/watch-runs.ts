/** @file Serves the dashboard of the runs in a folder over HTTP. */
import { readFile } from 'node:fs/promises'
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http'
import { createRequire } from 'node:module'
import { type AddressInfo, isIP } from 'node:net'
import { dirname, join, resolve } from 'node:path'
import { pathOf } from '@moe/checkpoint'
import { checkOptions, MoeError } from '@moe/core'
import { findRuns } from './find-runs.ts'
import type { SeriesMark } from './run-series.ts'
import { WatchedRun } from './watched-run.ts'

/** Options of `watchRuns`. */
export interface WatchOptions {
  /** Port. Default 7070, or a free one if that is taken. */
  readonly port?: number | undefined
  /** Address to listen on. Default 127.0.0.1: only this machine can open the page. */
  readonly host?: string | undefined
}

/** A running dashboard. */
export interface Watcher {
  /** URL of the page. */
  readonly url: string
  /** Stops the server and closes all connections. */
  close(): Promise<void>
}

const defaultPort = 7070
const intervalMs = 1000
/** Rounds without data after which a keep-alive message is sent. */
const keepAliveRounds = 15
/** Maximum number of unsent bytes for a slow client. */
const maxUnsentBytes = 1 << 22

/** A connected client, and what it has received of each run. */
interface Client {
  readonly response: ServerResponse
  readonly has: Map<string, { state: string; mark: SeriesMark; series: object }>
  quiet: number
}

/**
 * Serves a dashboard with all runs in a folder, live while they train. It only reads files, and only while a page is
 * open: `metrics.jsonl`, `loads.jsonl`, `events.jsonl`, `summary.json` and lock files. The folder may be created later.
 *
 * Paths: `/` is the page, `/live` its data as server-sent events, `/runs.json` the state of each run,
 * `/series.json?run=NAME&from=STEP&to=STEP&most=POINTS` the metrics of a part of a run,
 * `/loads.json?run=NAME&step=STEP` the expert loads at a step, and `/loads.json?run=NAME&layer=LAYER`
 * (`&from=STEP&to=STEP&most=LINES`) those of a layer over time.
 *
 * @throws MoeError E_CONFIG if it cannot listen on the address
 */
export async function watchRuns(folder: string | URL, options: WatchOptions = {}): Promise<Watcher> {
  checkOptions('watchRuns', options, { port: true, host: true })
  const { port, host = '127.0.0.1' } = options
  if (port !== undefined && !(Number.isInteger(port) && port >= 0 && port < 65536))
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'watchRuns',
      problem: `port is ${port}`,
      fix: 'pass an integer from 0 to 65535',
    })
  const watched = new WatchedFolder(resolve(pathOf('watchRuns', folder)))
  const assets = await readAssets()
  const server = createServer((request, response) => {
    answer(watched, assets, loopback.test(host), request, response).catch(error => response.destroy(error))
  })
  await listen(server, port, host)
  const address = server.address() as AddressInfo
  return {
    url: `http://${isIP(host) === 6 ? `[${host}]` : host}:${address.port}/`,
    async close() {
      watched.close()
      server.closeAllConnections()
      await new Promise(done => server.close(done))
    },
  }
}

const loopback = /^(localhost|127\.\d+\.\d+\.\d+|::1)$/

async function listen(server: Server, port: number | undefined, host: string): Promise<void> {
  const attempt = (at: number) =>
    new Promise<void>((done, failed) => {
      server.once('error', failed)
      server.listen(at, host, () => {
        server.off('error', failed)
        done()
      })
    })
  try {
    await attempt(port ?? defaultPort).catch(error => {
      if (port !== undefined || error.code !== 'EADDRINUSE') throw error
      return attempt(0)
    })
  } catch (cause) {
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'watchRuns',
      problem: `cannot listen on ${host}: ${(cause as Error).message}`,
      fix: 'choose another port or host',
      cause,
    })
  }
}

interface Asset {
  readonly type: string
  readonly content: Buffer
}

/** The files of the page, by path. */
async function readAssets(): Promise<Map<string, Asset>> {
  const require = createRequire(import.meta.url)
  const page = join(dirname(require.resolve('@moe/trainer/package.json')), 'page')
  const charts = dirname(require.resolve('uplot'))
  const files = [
    ['/', join(page, 'index.html'), 'text/html'],
    ['/page.css', join(page, 'page.css'), 'text/css'],
    ['/page.js', join(page, 'page.js'), 'text/javascript'],
    ['/numbers.js', join(page, 'numbers.js'), 'text/javascript'],
    ['/charts.js', join(page, 'charts.js'), 'text/javascript'],
    ['/experts.js', join(page, 'experts.js'), 'text/javascript'],
    ['/heat-map.js', join(page, 'heat-map.js'), 'text/javascript'],
    ['/loads.js', join(page, 'loads.js'), 'text/javascript'],
    ['/zoom.js', join(page, 'zoom.js'), 'text/javascript'],
    ['/uplot.js', join(charts, 'uPlot.esm.js'), 'text/javascript'],
    ['/uplot.css', join(charts, 'uPlot.min.css'), 'text/css'],
  ]
  const entries = files.map(async ([path, file, type]) => {
    return [path, { type: `${type}; charset=utf-8`, content: await readFile(file) }] as const
  })
  return new Map(await Promise.all(entries))
}

const headers = {
  'cache-control': 'no-store',
  'x-content-type-options': 'nosniff',
  'content-security-policy':
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:",
}

async function answer(
  watched: WatchedFolder,
  assets: ReadonlyMap<string, Asset>,
  onlyHere: boolean,
  request: IncomingMessage,
  response: ServerResponse,
): Promise<void> {
  const refuse = (status: number, text: string) =>
    response.writeHead(status, { ...headers, 'content-type': 'text/plain; charset=utf-8' }).end(`${text}\n`)
  // A website can point its own host name at this machine (DNS rebinding), so other host names are refused.
  const [, name = ''] = /^\[?(.*?)\]?(:\d+)?$/.exec(request.headers.host ?? '') ?? []
  if (onlyHere && !loopback.test(name))
    return void refuse(403, 'only localhost may access this address; use --host to share it')
  if (request.method !== 'GET' && request.method !== 'HEAD') return void refuse(405, 'only GET and HEAD are allowed')
  const [path, query = ''] = (request.url ?? '/').split('?', 2)
  const asset = assets.get(path)
  if (asset !== undefined) response.writeHead(200, { ...headers, 'content-type': asset.type }).end(asset.content)
  else if (path === '/live') watched.join(response)
  else if (path === '/runs.json') {
    await watched.refresh()
    json(response, { folder: watched.folder, runs: watched.runs.map(({ state }) => state) }, 2)
  } else if (path === '/series.json' || path === '/loads.json') {
    const asked = new URLSearchParams(query)
    const run = await watched.find(asked.get('run') ?? '')
    const found = run && (await (path === '/series.json' ? seriesOf(run, asked) : loadsOf(run, asked)))
    if (found === undefined) refuse(404, 'no such run, or no data in this range')
    else json(response, found)
  } else refuse(404, 'not found')
}

function json(response: ServerResponse, value: unknown, indent?: number): void {
  response.writeHead(200, { ...headers, 'content-type': 'application/json' })
  response.end(`${JSON.stringify(value, null, indent)}\n`)
}

const mostPoints = 8192

function numberIn(asked: URLSearchParams, name: string, otherwise: number): number {
  const value = Number(asked.get(name) || Number.NaN)
  return Number.isNaN(value) ? otherwise : value
}

/** The range of steps that a request asks for, and the maximum number of points. */
function rangeOf(asked: URLSearchParams, usual: number) {
  return {
    from: numberIn(asked, 'from', 0),
    to: numberIn(asked, 'to', Number.POSITIVE_INFINITY),
    most: Math.min(mostPoints, Math.max(2, Math.floor(numberIn(asked, 'most', usual)))),
  }
}

function seriesOf(run: WatchedRun, asked: URLSearchParams) {
  const { from, to, most } = rangeOf(asked, 2000)
  return run.seriesBetween(from, to, most)
}

function loadsOf({ loads }: WatchedRun, asked: URLSearchParams) {
  const layer = asked.get('layer')
  if (layer !== null) return loads.over(layer, rangeOf(asked, 400))
  return loads.at(numberIn(asked, 'step', Number.POSITIVE_INFINITY))
}

class WatchedFolder {
  readonly folder: string
  readonly #runs = new Map<string, WatchedRun>()
  readonly #clients = new Set<Client>()
  #refreshing: Promise<boolean> | undefined
  #timer: NodeJS.Timeout | undefined
  #closed = false

  constructor(folder: string) {
    this.folder = folder
  }

  get runs(): WatchedRun[] {
    return [...this.#runs.values()]
  }

  /** The run with a name. It may have appeared since the folder was last searched. */
  async find(name: string): Promise<WatchedRun | undefined> {
    if (!this.#runs.has(name)) while (await this.refresh());
    return this.#runs.get(name)
  }

  close(): void {
    this.#closed = true
    clearTimeout(this.#timer)
  }

  /** Reads what was added to all runs. @returns whether there is more to read */
  refresh(): Promise<boolean> {
    this.#refreshing ??= this.#refresh().finally(() => {
      this.#refreshing = undefined
    })
    return this.#refreshing
  }

  async #refresh(): Promise<boolean> {
    const found = await findRuns(this.folder)
    for (const name of this.#runs.keys()) if (!found.has(name)) this.#runs.delete(name)
    let more = false
    for (const [name, path] of found) {
      const run = this.#runs.get(name) ?? new WatchedRun(name, path)
      this.#runs.set(name, run)
      if (await run.refresh()) more = true
    }
    return more
  }

  /** Sends all data, and from then on what is added. */
  join(response: ServerResponse): void {
    response.writeHead(200, { ...headers, 'content-type': 'text/event-stream', 'x-accel-buffering': 'no' })
    const client: Client = { response, has: new Map(), quiet: keepAliveRounds }
    this.#clients.add(client)
    response.on('close', () => this.#clients.delete(client))
    if (this.#clients.size === 1) this.#round()
  }

  async #round(): Promise<void> {
    const more = await this.refresh()
    for (const client of this.#clients) this.#send(client)
    if (this.#closed || this.#clients.size === 0) return
    clearTimeout(this.#timer)
    this.#timer = setTimeout(() => this.#round(), more ? 0 : intervalMs)
  }

  #send(client: Client): void {
    const { response, has } = client
    if (response.writableLength > maxUnsentBytes) return
    const gone = [...has.keys()].filter(name => !this.#runs.has(name))
    for (const name of gone) has.delete(name)
    const runs = this.runs.flatMap(({ name, series, state }) => {
      const before = has.get(name)
      const text = JSON.stringify(state)
      if (before?.state === text && before.series === series) return []
      // A new series object replaces everything that was sent of the old one.
      const patch = series.patch(before?.series === series ? before.mark : undefined)
      has.set(name, { state: text, mark: series.mark, series })
      return [{ state, series: patch }]
    })
    const first = client.quiet === keepAliveRounds && has.size === 0
    if (runs.length > 0 || gone.length > 0 || first || ++client.quiet > keepAliveRounds) {
      client.quiet = 0
      response.write(`data: ${JSON.stringify({ folder: this.folder, now: Date.now(), runs, gone })}\n\n`)
    }
  }
}
