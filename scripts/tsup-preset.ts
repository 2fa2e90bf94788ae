import { defineConfig, type Options } from 'tsup'
import { withoutNode } from './without-node.ts'

type Config = ReturnType<typeof defineConfig>

const usual: Options = {
  format: ['esm'],
  target: 'node20',
  sourcemap: true,
  silent: true,
  // Deno and runtimes at the edge know Node's modules by `node:` alone.
  removeNodeProtocol: false,
  plugins: [{ name: 'class-names', renderChunk: (code, { map }) => ({ code: ownNames(code), map }) }],
}

/**
 * The one way a library package is built: ESM and declarations for Node 20, dependencies left external.
 * `entry` maps an output name below dist/ to its source file.
 */
export function library(entry: Record<string, string>): Config {
  return defineConfig({ ...usual, entry, platform: 'node', dts: true, clean: ['!browser/**'] })
}

/**
 * The same source once more for browsers, into dist/browser: no module of Node is imported, and what comes from one throws when it is called.
 * `packages` are treated as Node's modules are.
 */
export function browserLibrary(entry: Record<string, string>, packages: readonly string[] = []): Config {
  return defineConfig({
    ...usual,
    entry,
    outDir: 'dist/browser',
    target: 'es2022',
    platform: 'browser',
    clean: true,
    noExternal: [...packages],
    esbuildPlugins: [withoutNode(packages)],
  })
}

/**
 * esbuild turns a class that names itself into `var Tensor = class _Tensor`, which is then what `console.log` prints. A space in place of the
 * underscore leaves the source map right.
 */
function ownNames(code: string): string {
  const renamed = [...code.matchAll(/\b(?:var|let) (\w+) = class _\1\b/g)].map(([, name]) => name)
  return renamed.reduce((text, name) => text.replace(new RegExp(`(?<![\\w$.#'"])_${name}\\b`, 'g'), ` ${name}`), code)
}
