/**
 * @file Serves a page in which a model writes (examples/browser): what `npm start` left behind, or another folder.
 *
 *   npm run page -- [FOLDER] [PORT]
 */
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { modelFolder } from '@moe/trainer'
import { bundlePage } from '../scripts/bundle-page.ts'
import { servePage } from '../scripts/serve-page.ts'

const here = fileURLToPath(new URL('browser', import.meta.url))
const [folder = 'runs/quickstart', port = '8088'] = process.argv.slice(2)
const wasm = dirname(createRequire(import.meta.url).resolve('@tensorflow/tfjs-backend-wasm'))
try {
  const { url } = await servePage({
    pages: { '/program.js': { type: 'text/javascript', body: await bundlePage(join(here, 'page.js')) } },
    folders: { '/': here, '/model/': modelFolder(folder), '/wasm/': wasm },
    port: Number(port),
  })
  console.log(`${url} (Ctrl-C ends it)`)
} catch (error) {
  console.error((error as Error).message)
  process.exitCode = 1
}
