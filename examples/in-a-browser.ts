/** @file Serves a page in which a model writes (examples/browser): what `npm start` left behind, or another folder. */
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { modelFolder } from '@moe/trainer'
import { bundlePage } from '../scripts/bundle-page.ts'
import { servePage } from '../scripts/serve-page.ts'

const help = `Serves a page in which a model writes.

  npm run page -- [FOLDER] [PORT]

  FOLDER  of a model, or a run (default runs/quickstart, which npm start makes)
  PORT    default 8088; 0 for any
  --help
`

const here = fileURLToPath(new URL('browser', import.meta.url))
const wasm = dirname(createRequire(import.meta.url).resolve('@tensorflow/tfjs-backend-wasm'))

async function main(): Promise<void> {
  const { values, positionals } = parseArgs({
    options: { help: { type: 'boolean', default: false } },
    allowPositionals: true,
  })
  const [folder = 'runs/quickstart', port = '8088'] = positionals
  if (values.help) {
    process.stdout.write(help)
    return
  }
  const { url } = await servePage({
    pages: { '/program.js': { type: 'text/javascript', body: await bundlePage(join(here, 'page.js')) } },
    folders: { '/': here, '/model/': modelFolder(folder), '/wasm/': wasm },
    port: Number(port),
  })
  console.log(`${url} (Ctrl-C ends it)`)
}

try {
  await main()
} catch (error) {
  console.error((error as Error).message)
  process.exitCode = 1
}
