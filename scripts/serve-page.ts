// A small local web server for given pages and for files of folders, with range requests.
import { createReadStream, statSync } from 'node:fs'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { extname, join } from 'node:path'

export interface PageServer {
  /** Pages by URL path. */
  readonly pages?: Readonly<Record<string, { readonly type: string; readonly body: string }>>
  /** Folders by URL path, with a trailing slash. Only files directly in a folder are served; the path itself is its index.html. */
  readonly folders?: Readonly<Record<string, string>>
  /** Called for POST requests with the path, without its slash, and the body. */
  readonly received?: (kind: string, body: string) => void
  readonly port?: number
}

const types: Readonly<Record<string, string>> = {
  '.html': 'text/html; charset=utf-8',
  '.json': 'application/json',
  '.css': 'text/css',
  '.js': 'text/javascript',
  '.wasm': 'application/wasm',
}

export async function servePage(options: PageServer): Promise<{ url: string; close(): Promise<void> }> {
  const { pages = {}, folders = {}, received, port = 0 } = options
  const server = createServer((request, response) => {
    const path = (request.url as string).replace(/\?.*/, '')
    if (request.method === 'POST') {
      let body = ''
      request.setEncoding('utf8').on('data', chunk => {
        body += chunk
      })
      request.on('end', () => {
        response.end()
        received?.(path.slice(1), body)
      })
      return
    }
    if (Object.hasOwn(pages, path)) {
      response.writeHead(200, { 'content-type': pages[path].type }).end(pages[path].body)
      return
    }
    const [, above, name] = /^(.*\/)([\w.-]*)$/.exec(path) ?? []
    const file = Object.hasOwn(folders, above ?? '') ? join(folders[above], name || 'index.html') : ''
    const stats = statSync(file, { throwIfNoEntry: false })
    if (!stats?.isFile()) {
      response.writeHead(404).end()
      return
    }
    const [, first, last] = /^bytes=(\d+)-(\d*)$/.exec(request.headers.range ?? '') ?? []
    const start = Number(first ?? 0)
    const end = Math.min(last ? Number(last) : stats.size - 1, stats.size - 1)
    if (first !== undefined && start > end) {
      response.writeHead(416, { 'content-range': `bytes */${stats.size}` }).end()
      return
    }
    response.writeHead(first === undefined ? 200 : 206, {
      'content-type': types[extname(file)] ?? 'application/octet-stream',
      'content-length': end - start + 1,
      'accept-ranges': 'bytes',
      etag: `"${stats.size}-${stats.mtimeMs}"`,
      ...(first !== undefined && { 'content-range': `bytes ${start}-${end}/${stats.size}` }),
    })
    createReadStream(file, { start, end: Math.max(end, 0) }).pipe(response)
  })
  server.listen(port, '127.0.0.1')
  await new Promise((resolve, reject) => server.once('listening', resolve as () => void).once('error', reject))
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}/`,
    async close() {
      const closed = new Promise(resolve => server.close(resolve))
      server.closeAllConnections()
      await closed
    },
  }
}
