/**
 * @file Folders and files on the web, read with `fetch` by ranges. What a server says is checked: which bytes it sends, how many, and whether they are still of the
 * same file.
 */

import { isMoeError, MoeError } from '@moe/core'
import { checkpointError, shown } from './checkpoint-error.ts'
import type { Fetch, Folder, OpenFile, Watch } from './folder.ts'
import { blobFile } from './named-blobs.ts'

/** Pieces begin at multiples of this: tensors mostly come in the order of the file, and many are small. */
const BLOCK_BYTES = 4 * 2 ** 20
/** Longest piece of one request. */
const PIECE_BYTES = 16 * 2 ** 20
/** Pieces kept for a folder, in all. */
const KEPT_BYTES = 64 * 2 ** 20
/** Largest file that is taken whole, from a server that has no ranges. */
const WHOLE_BYTES = 4 * 2 ** 30

/** @param address of the folder; its query goes with every request, and is not shown */
export function webFolder(address: URL, fetch: Fetch | undefined, watch: Watch): Folder {
  const pieces = new Pieces()
  const addressOf = (name: string): URL => {
    const url = new URL(address)
    // A name is one step of the path, whatever is in it.
    url.pathname = `${url.pathname.replace(/\/$/, '')}/${encodeURIComponent(name)}`
    return url
  }
  return {
    path: withoutQuery(address),
    pathOf: name => withoutQuery(addressOf(name)),
    open: name => openOnWeb(new Server(addressOf(name), fetch, watch), pieces),
  }
}

/** @throws MoeError E_CHECKPOINT also where there is none */
export async function webFile(address: URL, fetch: Fetch | undefined, watch: Watch): Promise<OpenFile> {
  const server = new Server(address, fetch, watch)
  const file = await openOnWeb(server, new Pieces())
  if (file === undefined) throw checkpointError(server.path, 'there is no such file')
  return file
}

/** Queries may hold tokens. */
const withoutQuery = ({ origin, pathname }: URL): string => `${origin}${pathname}`

/** One address, and what is asked of it. */
class Server {
  readonly path: string
  readonly watch: Watch
  readonly #address: URL
  readonly #fetch: Fetch

  constructor(address: URL, fetch: Fetch | undefined, watch: Watch) {
    this.path = withoutQuery(address)
    this.watch = watch
    this.#address = address
    // The global one as it is at the time of the request: pages and tests replace it.
    this.#fetch = fetch ?? ((to, init) => globalThis.fetch(to, init))
  }

  /** @param range first and last byte; everything without */
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

  /** Gives the bytes of an answer to `take`, as they come. */
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
      return new MoeError({ code: 'E_ABORTED', op: this.path, problem: 'reading was stopped', cause: reason })
    }
    // Node's fetch says why in the cause of its error.
    const why = [cause, (cause as Error | undefined)?.cause].map(error => (error as Error | undefined)?.message)
    const fix = 'the server cannot be reached, or in a browser does not allow this page to read it (CORS)'
    return checkpointError(this.path, [problem, ...why.filter(Boolean)].join(': '), fix, {}, cause)
  }
}

async function openOnWeb(server: Server, pieces: Pieces): Promise<OpenFile | undefined> {
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
    // Another site may hide it from a page, and then nothing says how long the file is.
    await discard(response)
    const whole = await server.ask()
    if (whole.status !== 200) throw await refusal(server, whole)
    return await openWhole(server, whole)
  }
  const { end, total } = await checkRange(server, response, 0, BLOCK_BYTES)
  const bytes = await receiveExactly(server, response, end)
  return server.watch.over(new RangedFile(server, pieces, total, versionOf(response), bytes))
}

/** What stands in for a file that is not there, on servers of pages with one address for all of them. */
const isPage = ({ status, headers }: Response): boolean =>
  (status === 200 || status === 206) && /^text\/html\b/i.test(headers.get('content-type') ?? '')

async function openWhole(server: Server, response: Response): Promise<OpenFile> {
  const { watch, path } = server
  // Compressed answers have another length than the file, and another site may hide that they are.
  let expected = Number(response.headers.get('content-length')) || 0
  watch.opened(expected)
  const chunks: Uint8Array<ArrayBuffer>[] = []
  let received = 0
  await server.receive(response, chunk => {
    chunks.push(chunk)
    received += chunk.length
    if (received > WHOLE_BYTES) {
      throw server.error(
        `the server has no ranges, and sends more than ${WHOLE_BYTES} bytes`,
        'read larger files from a server that answers requests for ranges',
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

/** A file that is read by ranges. */
class RangedFile implements OpenFile {
  readonly path: string
  readonly bytes: number
  readonly #server: Server
  readonly #pieces: Pieces
  readonly #version: Version

  constructor(server: Server, pieces: Pieces, bytes: number, version: Version, first: Uint8Array) {
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

  /** Whole blocks from the one at `position` on, as many as are asked for and not kept. */
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
      throw this.#server.error('the server answered with the whole file when it was asked for a part', 'open it again')
    }
    if (response.status !== 206) throw await refusal(this.#server, response)
    const range = await checkRange(this.#server, response, begin, end)
    const changed = changeOf(this.#version, versionOf(response))
    if (range.total !== this.bytes || changed) {
      await discard(response)
      const what = changed ?? `it had ${this.bytes} bytes and has ${range.total}`
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

/** The pieces that were read last, of all files of a folder. */
class Pieces {
  /** The one that was used last stands last. */
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
    while (bytes > KEPT_BYTES) {
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

/** Checks that a partial answer is the one that was asked for: the bytes from `begin` up to `end`, or up to the end of the file. */
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
    `the server answered with the range ${shown(text)} when it was asked for bytes ${begin} to ${end - 1}`,
    'the server is at fault; copy the files to another one',
  )
}

async function receiveExactly(server: Server, response: Response, bytes: number): Promise<Uint8Array> {
  const out = new Uint8Array(bytes)
  let received = 0
  await server.receive(response, chunk => {
    if (received + chunk.length > bytes) {
      throw server.error(`the server sent more than the ${bytes} bytes that it was asked for`)
    }
    out.set(chunk, received)
    received += chunk.length
  })
  if (received === bytes) return out
  throw server.error(`the server sent ${received} of the ${bytes} bytes that it was asked for`, 'try again')
}

/** What tells one version of a file from another, where the server says and the page may see it. */
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
    return before.etag === after.etag ? undefined : `its ETag was ${shown(before.etag)} and is ${shown(after.etag)}`
  }
  if (before.modified === null || after.modified === null || before.modified === after.modified) return undefined
  return `it was last modified ${shown(before.modified)} and then ${shown(after.modified)}`
}

/** The error for an answer that is none. */
async function refusal(server: Server, response: Response): Promise<MoeError> {
  await discard(response)
  const { status, statusText } = response
  const fix =
    status === 401 || status === 403
      ? 'it may be private, or not be there: pass { fetch } that sends a token'
      : status === 429 || status >= 500
        ? 'try again later'
        : undefined
  const said = statusText ? `${status} ${statusText.slice(0, 60)}` : status
  return server.error(`the server answered ${said}`, fix, { status })
}

/** Gives the connection back. */
async function discard(response: Response): Promise<void> {
  await response.body?.cancel().catch(() => {})
}
