import { defineConfig, type Options } from 'tsup'
import { withoutNode } from './without-node.ts'

type Config = ReturnType<typeof defineConfig>

const usual: Options = {
  format: ['esm'],
  target: 'node20',
  sourcemap: true,
  silent: true,
  // Deno and edge runtimes only support Node's modules with the `node:` prefix.
  removeNodeProtocol: false,
  plugins: [{ name: 'class-names', renderChunk: (code, { map }) => ({ code: ownNames(code), map }) }],
}

/**
 * The build of a library package: ESM and declarations for Node 20, with external dependencies. `entry` maps output names below dist/ to source
 * files.
 */
export function library(entry: Record<string, string>): Config {
  // Without skipNodeModulesBundle, optional dependencies are bundled, and then do not find their own files.
  return defineConfig({
    ...usual,
    entry,
    platform: 'node',
    skipNodeModulesBundle: true,
    dts: true,
    clean: ['!browser/**'],
  })
}

/**
 * The browser build of the same sources, into dist/browser. It imports no Node modules; functions from Node modules throw when they are called.
 * `packages` are treated like Node modules.
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
 * esbuild turns a class that refers to itself into `var Tensor = class _Tensor`, and `console.log` then prints `_Tensor`. Replacing the underscore
 * by a space restores the name and keeps the source map correct.
 */
function ownNames(code: string): string {
  const renamed = [...code.matchAll(/\b(?:var|let) (\w+) = class _\1\b/g)].map(([, name]) => name)
  return renamed.reduce((text, name) => text.replace(new RegExp(`(?<![\\w$.#'"])_${name}\\b`, 'g'), ` ${name}`), code)
}
