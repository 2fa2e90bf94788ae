// Bundles a program for a web page from the packages' sources. With packages from npm no plugin is needed, as bundlers find their browser builds.
import { fileURLToPath } from 'node:url'
import { build, type Plugin, type StdinOptions } from 'esbuild'
import { withoutNode } from './without-node.ts'

const source = (path: string) => fileURLToPath(new URL(`../packages/${path}`, import.meta.url))

const fromSource: Plugin = {
  name: 'from-source',
  setup(build) {
    build.onResolve({ filter: /^@moe\/tokenizer-bpe$/ }, () => ({ path: source('tokenizer-bpe/src/browser.ts') }))
    // For the substitutes of Node's modules, also in packages that do not depend on core.
    const filter = /^@moe\/core$/
    build.onResolve({ filter, namespace: 'without-node' }, () => ({ path: source('core/src/index.ts') }))
  },
}

/** @param program path of a module, or its source and the folder from which it resolves imports */
export async function bundlePage(program: string | StdinOptions): Promise<string> {
  const { outputFiles } = await build({
    ...(typeof program === 'string' ? { entryPoints: [program] } : { stdin: program }),
    bundle: true,
    format: 'esm',
    platform: 'browser',
    target: 'es2022',
    minify: true,
    write: false,
    logLevel: 'error',
    external: ['@tensorflow/tfjs-node', '@tensorflow/tfjs-node-gpu'],
    plugins: [fromSource, withoutNode(['tinyglobby'])],
  })
  return outputFiles[0].text
}
