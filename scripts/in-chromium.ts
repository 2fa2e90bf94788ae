// Runs a program in headless Chromium, for manual checks, and serves files of folders next to it.
import { spawn } from 'node:child_process'
import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { servePage } from './serve-page.ts'

/** Among others, select a software WebGPU adapter (SwiftShader). */
const flags = [
  ...['--headless', '--no-sandbox', '--disable-quic', '--disable-background-networking', '--disable-component-update'],
  ...['--disable-sync', '--no-first-run', '--remote-debugging-port=0'],
  ...[
    '--enable-unsafe-webgpu',
    '--use-webgpu-adapter=swiftshader',
    '--enable-unsafe-swiftshader',
    '--disable-gpu-watchdog',
  ],
]

const page = `<!doctype html><meta charset="utf-8"><script type="module">
const send = (kind, value) => fetch('/' + kind, { method: 'POST', body: JSON.stringify(value) })
globalThis.note = text => send('note', text)
globalThis.report = value => send('report', value)
addEventListener('error', ({ message }) => send('failure', message))
addEventListener('unhandledrejection', ({ reason }) => send('failure', String(reason?.stack ?? reason)))
import('/program.js')
</script>`

/**
 * Resolves to the value that `program` passes to `report(value)`, a global function of the page. Another one, `note(text)`, prints a line.
 * @param program an ECMAScript module
 * @param folders folders whose files are served, by URL path
 */
export async function inChromium(
  program: string,
  { folders, seconds = 120 }: { folders?: Readonly<Record<string, string>>; seconds?: number } = {},
): Promise<unknown> {
  const chromium = ['/usr/bin/chromium-headless-shell', '/usr/bin/chromium', '/usr/bin/google-chrome'].find(existsSync)
  if (chromium === undefined) throw new Error('found no Chromium in /usr/bin; install chromium')
  let resolve: (value: unknown) => void = () => {}
  let reject: (error: Error) => void = () => {}
  const reported = new Promise<unknown>((done, failed) => {
    resolve = done
    reject = failed
  })
  const server = await servePage({
    pages: {
      '/': { type: 'text/html', body: page },
      '/program.js': { type: 'text/javascript', body: program },
    },
    folders,
    received: (kind, body) => {
      const value = body === '' ? undefined : JSON.parse(body)
      if (kind === 'note') console.log(value)
      else if (kind === 'report') resolve(value)
      else reject(new Error(String(value)))
    },
  })
  const profile = mkdtempSync(join(tmpdir(), 'moe-chromium-'))
  const browser = spawn(chromium, [...flags, `--user-data-dir=${profile}`, server.url], { stdio: 'ignore' })
  const timer = setTimeout(() => reject(new Error(`no report within ${seconds} s`)), seconds * 1000)
  try {
    return await reported
  } finally {
    clearTimeout(timer)
    const gone = new Promise(done => browser.once('exit', done))
    browser.kill()
    await gone
    await server.close()
    rmSync(profile, { recursive: true, force: true, maxRetries: 5 })
  }
}
