/** @file Listening to a port, and ending that without cutting off what runs. */
import { createServer, type Server } from 'node:http'
import type { AddressInfo } from 'node:net'
import { getRequestListener } from '@hono/node-server'
import { checkOptions, MoeError, shown } from '@moe/core'
import { ApiError } from './errors.ts'

/** Where the server listens. */
export interface ServeOptions {
  /** Default 8000; 0 takes one that is free. */
  readonly port?: number
  /** Address to listen at. Default 127.0.0.1, which only this machine reaches; 0.0.0.0 and :: are all there are. */
  readonly host?: string
}

/** A server that listens. */
export interface Serving {
  /** Without the path: `http://127.0.0.1:8000`. */
  readonly url: string
  /** The port that it listens to, also where a free one was taken. */
  readonly port: number
  /**
   * Takes no more connections, waits until those there are have their answers, and cuts off those that take longer than this. Resolves when none is left.
   * @param options.within milliseconds; default 10,000
   */
  close(options?: { readonly within?: number }): Promise<void>
}

/**
 * Listens to a port for an application, such as that of `createServer`.
 * @throws MoeError E_ATTR for what is no application, and when the address cannot be had
 */
export async function serve(
  app: { fetch(request: Request): Response | Promise<Response> },
  options: ServeOptions = {},
): Promise<Serving> {
  if (typeof app?.fetch !== 'function') {
    const fix = 'pass createServer({ model, engine, tokenizer, name })'
    throw new MoeError({
      code: 'E_ATTR',
      op: 'serve',
      problem: `the application is ${shown(app)}, which has no fetch`,
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
    close: ({ within = 10_000 } = {}) => close(server, within),
  }
}

/** What is no request to an application: a host or path that cannot be. */
function malformed(cause: unknown): Response {
  const reason = cause instanceof Error ? cause.message : String(cause)
  return Response.json(new ApiError(400, `the request cannot be read: ${reason}`).toJSON(), { status: 400 })
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
      problem: taken ? `port ${port} of ${host} is taken` : `cannot listen to ${host}, port ${port}: ${message}`,
      fix: taken ? 'choose another port; 0 takes one that is free' : 'choose another host or port',
      cause,
    })
  }
}

async function close(server: Server, within: number): Promise<void> {
  const closed = new Promise<void>(resolve => server.close(() => resolve()))
  // A connection that has its answer would stay open for another request.
  const idle = setInterval(() => server.closeIdleConnections(), 50)
  const limit = setTimeout(() => server.closeAllConnections(), within)
  await closed
  clearInterval(idle)
  clearTimeout(limit)
}
