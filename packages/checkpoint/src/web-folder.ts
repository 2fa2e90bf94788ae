/**
 * @file Reads folders and files from the web with range requests. Every response is validated: its range, its length, and that the file
 * has not changed.
 */

import { isMoeError, MoeError } from '@moe/core'
import { checkpointError, shown } from './checkpoint-error.ts'
import type { Fetch, Folder, OpenFile, Watch } from './folder.ts'
import { blobFile } from './named-blobs.ts'

/** Requests start at multiples of this size, since tensors are mostly read in file order, and many are small. */
const BLOCK_BYTES = 4 * 2 ** 20
/** Maximum size of a request. */
const PIECE_BYTES = 16 * 2 ** 20
/** Maximum size of the cache of a folder. */
const CACHE_BYTES = 64 * 2 ** 20
/** Maximum size of a file that is downloaded as a whole, from a server without range requests. */
const WHOLE_BYTES = 4 * 2 ** 30

/** @param address URL of the folder. Its query is sent with every request, but not shown in messages. */
export function webFolder(address: URL, fetch: Fetch | undefined, watch: Watch): Folder {
  const pieces = new PieceCache()
  const addressOf = (name: string): URL => {
    const url = new URL(address)
    // Encode the name, so that it stays a single path segment.
    url.pathname = `${url.pathname.replace(/\/$/, '')}/${encodeURIComponent(name)}`
    return url
  }
  return {
    path: withoutQuery(address),
    pathOf: name => withoutQuery(addressOf(name)),
    open: name => openOnWeb(new Server(addressOf(name), fetch, watch), pieces),
  }
}

/** Opens a file. @throws MoeError E_CHECKPOINT, also if it does not exist */
export async function webFile(address: URL, fetch: Fetch | undefined, watch: Watch): Promise<OpenFile> {
  const server = new Server(address, fetch, watch)
  const file = await openOnWeb(server, new PieceCache())
  if (file === undefined) throw checkpointError(server.path, 'no such file')
  return file
}

/** Queries may contain tokens. */
const withoutQuery = ({ origin, pathname }: URL): string => `${origin}${pathname}`

/** Performs requests for one URL. */
class Server {
  readonly path: string
  readonly watch: Watch
  readonly #address: URL
  readonly #fetch: Fetch

  constructor(address: URL, fetch: Fetch | undefined, watch: Watch) {
    this.path = withoutQuery(address)
    this.watch = watch
    this.#address = address
    // Look up the global at the time of the request, since pages and tests replace it.
    this.#fetch = fetch ?? ((to, init) => globalThis.fetch(to, init))
  }

  /** @param range first and last byte; default: the whole file */
  async ask(range?: readonly [number, number]): Promise<Response> {
    this.watch.check(this.path)
    const { signal } = this.watch
    const headers: Record<string, string> = range ? { range: `bytes=${range[0]}-${range[1]}` } : {}
    try {
      return await this.#fetch(this.#address.href, { headers, ...(signal && { signal }) })
    } catch (cause) {
      throw this.failed('the request failed', cause)
    }
  }

  /** Passes the bytes of a response to `take` as they arrive. */
  async receive(response: Response, take: (chunk: Uint8Array<ArrayBuffer>) => void): Promise<void> {
    if (!response.body) return
    const reader = response.body.getReader()
    let received = 0
    try {
      for (;;) {
        const { done, value } = await reader.read()
        if (done) return
        received += value.length
        take(value)
        this.watch.check(this.path)
      }
    } catch (cause) {
      await reader.cancel().catch(() => {})
      throw this.failed(`the connection broke after ${received} bytes`, cause)
    }
  }

  error(problem: string, fix?: string, details: Record<string, unknown> = {}): MoeError {
    return checkpointError(this.path, problem, fix, details)
  }

  failed(problem: string, cause: unknown): MoeError {
    if (isMoeError(cause)) return cause
    if (this.watch.signal?.aborted) {
      const { reason } = this.watch.signal
      return new MoeError({ code: 'E_ABORTED', op: this.path, problem: 'reading was cancelled', cause: reason })
    }
    // Node's fetch reports the reason in the cause of its error.
    const why = [cause, (cause as Error | undefined)?.cause].map(error => (error as Error | undefined)?.message)
    const fix = 'the server is unreachable, or, in a browser, does not allow this page to read it (CORS)'
    return checkpointError(this.path, [problem, ...why.filter(Boolean)].join(': '), fix, {}, cause)
  }
}

async function openOnWeb(server: Server, pieces: PieceCache): Promise<OpenFile | undefined> {
  const response = await server.ask([0, BLOCK_BYTES - 1])
  const { status } = response
  if (status === 404 || status === 410 || isPage(response)) {
    await discard(response)
    return undefined
  }
  if (status === 200) return await openWhole(server, response)
  if (status === 416) {
    await discard(response)
    return blobFile(server.path, new Blob([]))
  }
  if (status !== 206) throw await refusal(server, response)
  if (response.headers.get('content-range') === null) {
    // Another origin may hide the header, which leaves the length of the file unknown.
    await discard(response)
    const whole = await server.ask()
    if (whole.status !== 200) throw await refusal(server, whole)
    return await openWhole(server, whole)
  }
  const { end, total } = await checkRange(server, response, 0, BLOCK_BYTES)
  const bytes = await receiveExactly(server, response, end)
  return server.watch.over(new RangedFile(server, pieces, total, versionOf(response), bytes))
}

/** Some servers respond with an HTML page instead of 404. */
const isPage = ({ status, headers }: Response): boolean =>
  (status === 200 || status === 206) && /^text\/html\b/i.test(headers.get('content-type') ?? '')

async function openWhole(server: Server, response: Response): Promise<OpenFile> {
  const { watch, path } = server
  // The length of a compressed response differs from the file's, and another origin may hide that it is compressed.
  let expected = Number(response.headers.get('content-length')) || 0
  watch.opened(expected)
  const chunks: Uint8Array<ArrayBuffer>[] = []
  let received = 0
  await server.receive(response, chunk => {
    chunks.push(chunk)
    received += chunk.length
    if (received > WHOLE_BYTES) {
      throw server.error(
        `the server does not support range requests and sent more than ${WHOLE_BYTES} bytes`,
        'read large files from a server that supports range requests',
      )
    }
    if (received > expected) {
      watch.opened(received - expected)
      expected = received
    }
    watch.arrived(chunk.length)
  })
  watch.opened(received - expected)
  return blobFile(path, new Blob(chunks))
}

/** A file that is read with range requests. */
class RangedFile implements OpenFile {
  readonly path: string
  readonly bytes: number
  readonly #server: Server
  readonly #pieces: PieceCache
  readonly #version: Version

  constructor(server: Server, pieces: PieceCache, bytes: number, version: Version, first: Uint8Array) {
    this.path = server.path
    this.bytes = bytes
    this.#server = server
    this.#pieces = pieces
    this.#version = version
    pieces.keep({ file: this, begin: 0, end: first.length, bytes: Promise.resolve(first) })
  }

  async read(into: Uint8Array, offset: number, length: number, position: number): Promise<number> {
    if (position >= this.bytes) return 0
    const piece = this.#pieces.find(this, position) ?? this.#pieces.keep(this.#ask(position, position + length))
    const from = position - piece.begin
    let part: Uint8Array
    try {
      part = (await piece.bytes).subarray(from, from + length)
    } catch (error) {
      this.#pieces.drop(one => one === piece)
      throw error
    }
    into.set(part, offset)
    return part.length
  }

  async close(): Promise<void> {
    this.#pieces.drop(({ file }) => file === this)
  }

  /** Requests whole blocks, starting with the one that contains `position`, up to `until` or the next cached piece. */
  #ask(position: number, until: number): Piece {
    const begin = Math.floor(position / BLOCK_BYTES) * BLOCK_BYTES
    const blocks = Math.ceil(until / BLOCK_BYTES) * BLOCK_BYTES
    const next = this.#pieces.nextBegin(this, begin)
    const end = Math.min(blocks, begin + PIECE_BYTES, this.bytes, next)
    return { file: this, begin, end, bytes: this.#fetch(begin, end) }
  }

  async #fetch(begin: number, end: number): Promise<Uint8Array> {
    const response = await this.#server.ask([begin, end - 1])
    if (response.status === 200) {
      await discard(response)
      throw this.#server.error('the server sent the whole file in response to a range request', 'open it again')
    }
    if (response.status !== 206) throw await refusal(this.#server, response)
    const range = await checkRange(this.#server, response, begin, end)
    const changed = changeOf(this.#version, versionOf(response))
    if (range.total !== this.bytes || changed) {
      await discard(response)
      const what = changed ?? `its size was ${this.bytes} bytes and is now ${range.total}`
      throw this.#server.error(`the file changed while it was read: ${what}`, 'open it again')
    }
    return receiveExactly(this.#server, response, end - begin)
  }
}

interface Piece {
  readonly file: object
  readonly begin: number
  readonly end: number
  readonly bytes: Promise<Uint8Array>
}

/** A cache of the most recently used pieces of all files of a folder. */
class PieceCache {
  /** Sorted by last use, the most recent last. */
  #kept: Piece[] = []

  find(file: object, position: number): Piece | undefined {
    const found = this.#kept.find(piece => piece.file === file && piece.begin <= position && position < piece.end)
    if (found) this.keep(found)
    return found
  }

  keep(piece: Piece): Piece {
    this.drop(one => one === piece)
    this.#kept.push(piece)
    let bytes = 0
    for (const { begin, end } of this.#kept) bytes += end - begin
    while (bytes > CACHE_BYTES) {
      const [{ begin, end }] = this.#kept.splice(0, 1)
      bytes -= end - begin
    }
    return piece
  }

  drop(of: (piece: Piece) => boolean): void {
    this.#kept = this.#kept.filter(piece => !of(piece))
  }

  nextBegin(file: object, after: number): number {
    const begins = this.#kept.filter(piece => piece.file === file && piece.begin > after).map(({ begin }) => begin)
    return Math.min(Number.POSITIVE_INFINITY, ...begins)
  }
}

/** Checks that a partial response contains the requested bytes: from `begin` to `end`, or to the end of the file. */
async function checkRange(
  server: Server,
  response: Response,
  begin: number,
  end: number,
): Promise<{ end: number; total: number }> {
  const text = response.headers.get('content-range')
  const [, first, last, size] = /^bytes (\d+)-(\d+)\/(\d+)$/i.exec(text ?? '') ?? []
  const total = Number(size)
  const until = Math.min(end, total)
  if (size !== undefined && Number.isSafeInteger(total) && Number(first) === begin && Number(last) + 1 === until) {
    return { end: until, total }
  }
  await discard(response)
  throw server.error(
    `the server sent the range ${shown(text)} when asked for bytes ${begin} to ${end - 1}`,
    'the server is broken; copy the files to another one',
  )
}

async function receiveExactly(server: Server, response: Response, bytes: number): Promise<Uint8Array> {
  const out = new Uint8Array(bytes)
  let received = 0
  await server.receive(response, chunk => {
    if (received + chunk.length > bytes) {
      throw server.error(`the server sent more than the requested ${bytes} bytes`)
    }
    out.set(chunk, received)
    received += chunk.length
  })
  if (received === bytes) return out
  throw server.error(`the server sent only ${received} of the requested ${bytes} bytes`, 'try again')
}

/** Identifies the version of a file, if the server sends it and the page may read it. */
interface Version {
  readonly etag: string | null
  readonly modified: string | null
}

const versionOf = ({ headers }: Response): Version => ({
  etag: headers.get('etag'),
  modified: headers.get('last-modified'),
})

function changeOf(before: Version, after: Version): string | undefined {
  if (before.etag !== null && after.etag !== null) {
    return before.etag === after.etag ? undefined : `its ETag was ${shown(before.etag)} and is now ${shown(after.etag)}`
  }
  if (before.modified === null || after.modified === null || before.modified === after.modified) return undefined
  return `it was last modified ${shown(before.modified)}, now ${shown(after.modified)}`
}

/** The error for a response with an unexpected status. */
async function refusal(server: Server, response: Response): Promise<MoeError> {
  await discard(response)
  const { status, statusText } = response
  const fix =
    status === 401 || status === 403
      ? 'the file may be private or not exist; pass { fetch } that sends a token'
      : status === 429 || status >= 500
        ? 'try again later'
        : undefined
  const answer = statusText ? `${status} ${statusText.slice(0, 60)}` : status
  return server.error(`the server responded with ${answer}`, fix, { status })
}

/** Releases the connection. */
async function discard(response: Response): Promise<void> {
  await response.body?.cancel().catch(() => {})
}
