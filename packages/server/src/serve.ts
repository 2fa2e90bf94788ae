/** @file Listens on a port, with graceful shutdown. */
import { createServer, type Server } from 'node:http'
import type { AddressInfo } from 'node:net'
import { getRequestListener } from '@hono/node-server'
import { checkOptions, MoeError, shown } from '@moe/core'
import { ApiError } from './errors.ts'

/** Options of {@link serve}. */
export interface ServeOptions {
  /** Port to listen on; 0 selects a free one. Default: 8000. */
  readonly port?: number | undefined
  /** Address to listen on. Default: 127.0.0.1, which accepts connections from this machine only; use 0.0.0.0 or :: for all interfaces. */
  readonly host?: string | undefined
}

/** A listening server, as returned by {@link serve}. */
export interface RunningServer {
  /** The server's URL without a path, for example `http://127.0.0.1:8000`. */
  readonly url: string
  /** The port that the server listens on, including one that was selected for port 0. */
  readonly port: number
  /**
   * Stops accepting connections, waits for running responses to finish, and closes connections that are still open after the time limit. Resolves when all
   * connections are closed.
   * @param options.timeout time limit in milliseconds. Default: 10,000.
   */
  close(options?: { readonly timeout?: number }): Promise<void>
}

/**
 * Serves an application, such as the one that {@link createServer} returns, over HTTP.
 * @throws MoeError `E_ATTR` if `app` has no `fetch` method, or if the address is in use or not available
 */
export async function serve(
  app: { fetch(request: Request): Response | Promise<Response> },
  options: ServeOptions = {},
): Promise<RunningServer> {
  if (typeof app?.fetch !== 'function') {
    const fix = 'pass createServer({ model, engine, tokenizer, name })'
    throw new MoeError({
      code: 'E_ATTR',
      op: 'serve',
      problem: `expected an application with a fetch method, got ${shown(app)}`,
      fix,
    })
  }
  checkOptions('serve', options, { port: true, host: true })
  const { port = 8000, host = '127.0.0.1' } = options
  const server = createServer(
    getRequestListener(request => app.fetch(request), {
      overrideGlobalObjects: false,
      errorHandler: malformed,
    }),
  )
  await listen(server, port, host)
  const address = server.address() as AddressInfo
  const name = address.family === 'IPv6' ? `[${address.address}]` : address.address
  return {
    url: `http://${name}:${address.port}`,
    port: address.port,
    close: ({ timeout = 10_000 } = {}) => close(server, timeout),
  }
}

/** The response to a request whose host or path is invalid. */
function malformed(cause: unknown): Response {
  const reason = cause instanceof Error ? cause.message : String(cause)
  return Response.json(new ApiError(400, `malformed request: ${reason}`).toJSON(), { status: 400 })
}

async function listen(server: Server, port: number, host: string): Promise<void> {
  try {
    await new Promise<void>((resolve, reject) => {
      server.once('error', reject)
      server.listen(port, host, () => {
        server.off('error', reject)
        resolve()
      })
    })
  } catch (cause) {
    const { code, message } = cause as NodeJS.ErrnoException
    const taken = code === 'EADDRINUSE'
    throw new MoeError({
      code: 'E_ATTR',
      op: 'serve',
      problem: taken
        ? `port ${port} of ${host} is already in use`
        : `cannot listen on ${host}, port ${port}: ${message}`,
      fix: taken ? 'choose another port, or 0 for any free port' : 'choose another host or port',
      cause,
    })
  }
}

async function close(server: Server, timeout: number): Promise<void> {
  const closed = new Promise<void>(resolve => server.close(() => resolve()))
  // After its response, a keep-alive connection would stay open for another request.
  const idle = setInterval(() => server.closeIdleConnections(), 50)
  const limit = setTimeout(() => server.closeAllConnections(), timeout)
  await closed
  clearInterval(idle)
  clearTimeout(limit)
}
