// `summary.mjs FILE`: one line of a test run and its failures. `summary.mjs --merge FOLDER`: all results as one object.
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'

const [first, folder] = process.argv.slice(2)
if (first === '--merge') {
  const read = name =>
    existsSync(join(folder, name)) ? JSON.parse(readFileSync(join(folder, name), 'utf8')) : undefined
  const tools = readdirSync(folder).filter(name => name.endsWith('.code'))
  const sanitizer = Object.fromEntries(
    tools.map(name => [
      name.slice('sanitizer-'.length, -'.code'.length),
      {
        exitCode: Number(readFileSync(join(folder, name), 'utf8')),
        ...lastLine(join(folder, name.replace(/code$/, 'log'))),
      },
    ]),
  )
  const { machine, date, results } = read('bench.json') ?? { date: new Date().toISOString() }
  const merged = {
    date,
    machine,
    suite: read('suite.json'),
    suiteWithWgmma: read('suite-wgmma.json'),
    suiteWithCublasLt: read('suite-cublas-lt.json'),
    models: read('models.json'),
    sanitizer,
    results,
    resultsWithWgmma: read('bench-wgmma.json')?.results,
    resultsWithCublasLt: read('bench-cublas-lt.json')?.results,
    products: read('bench-gemm.json'),
    peers: read('peers.json'),
  }
  console.log(JSON.stringify(merged, null, 2))
} else {
  const { passed, failed, skipped, failures } = JSON.parse(readFileSync(first, 'utf8'))
  for (const { name, file, error } of failures) console.log(`FAIL ${name} (${file})\n${error}`)
  console.log(`${passed} passed, ${failed} failed, ${skipped} skipped`)
}

function lastLine(path) {
  if (!existsSync(path)) return {}
  return { summary: readFileSync(path, 'utf8').trim().split('\n').at(-1) }
}
