// A small server for pages that are tried by hand: what is given, and a folder's files at /files/, by ranges.
import { createReadStream, statSync } from 'node:fs'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { basename, extname, join } from 'node:path'

interface Given {
  readonly type: string
  readonly body: string | Uint8Array
}

interface Pages {
  readonly [path: string]: Given | ((kind: string, body: string) => void) | undefined
  /** Is told of what is posted: the path without its slash, and the body. */
  readonly received?: (kind: string, body: string) => void
}

const types: Readonly<Record<string, string>> = {
  '.json': 'application/json',
  '.js': 'text/javascript',
  '.wasm': 'application/wasm',
}

/** @param folder whose own files are served, not those of folders in it */
export async function serveFolder(
  folder: string | undefined,
  pages: Pages,
  port = 0,
): Promise<{ url: string; close(): Promise<void> }> {
  const server = createServer((request, response) => {
    const path = decodeURIComponent((request.url as string).replace(/\?.*/, ''))
    if (request.method === 'POST') {
      let body = ''
      request.setEncoding('utf8').on('data', chunk => {
        body += chunk
      })
      request.on('end', () => {
        response.end()
        pages.received?.(path.slice(1), body)
      })
      return
    }
    const given = Object.hasOwn(pages, path) ? pages[path] : undefined
    if (typeof given === 'object') {
      response.writeHead(200, { 'content-type': given.type }).end(given.body)
      return
    }
    const name = path.startsWith('/files/') ? basename(path) : ''
    const file = folder !== undefined && name !== '' ? join(folder, name) : undefined
    const stats = file === undefined ? undefined : statSync(file, { throwIfNoEntry: false })
    if (file === undefined || !stats?.isFile()) {
      response.writeHead(404).end()
      return
    }
    const [, first, last] = /^bytes=(\d+)-(\d*)$/.exec(request.headers.range ?? '') ?? []
    const start = Number(first ?? 0)
    const end = Math.min(last ? Number(last) : stats.size - 1, stats.size - 1)
    if (start > end) {
      response.writeHead(416, { 'content-range': `bytes */${stats.size}` }).end()
      return
    }
    response.writeHead(first === undefined ? 200 : 206, {
      'content-type': types[extname(name)] ?? 'application/octet-stream',
      'content-length': end - start + 1,
      'accept-ranges': 'bytes',
      etag: `"${stats.size}-${stats.mtimeMs}"`,
      ...(first !== undefined && { 'content-range': `bytes ${start}-${end}/${stats.size}` }),
    })
    createReadStream(file, { start, end }).pipe(response)
  })
  server.listen(port, '127.0.0.1')
  await new Promise((resolve, reject) => server.once('listening', resolve).once('error', reject))
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}/`,
    async close() {
      server.closeAllConnections()
      await new Promise(resolve => server.close(resolve))
    },
  }
}
