/** @file npm run docs: builds the site of guides, API reference and decision records. */
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { convert, packages, root } from './project.ts'

const usage = `Builds the documentation site into docs/site: guides, the API reference of every package, and decision records. Neither the build
nor the pages need a network.

usage: npm run docs
`

const out = join(root, 'docs/site')
const args = process.argv.slice(2)
if (args.length > 0) {
  const asks = args.some(arg => arg === '--help' || arg === '-h')
  if (!asks) console.error(`docs: unknown argument ${args.join(' ')}\n`)
  console.log(usage.trimEnd())
  process.exit(asks ? 0 : 2)
}

const started = performance.now()
const { app, project, complaints } = await convert()
await app.generateDocs(project, out)
for (const complaint of complaints.lines) console.error(`docs: ${complaint}`)
if (complaints.lines.length > 0) process.exitCode = 1
const documents = project.documents?.length ?? 0
const took = `${((performance.now() - started) / 1000).toFixed(1)} s`
console.log(`docs: ${packages.length} packages and ${documents} documents in ${took}`)
console.log(`docs: ${pathToFileURL(`${out}/index.html`)}`)
