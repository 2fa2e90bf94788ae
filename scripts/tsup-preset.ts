import { defineConfig } from 'tsup'

/**
 * The one way a library package is built: ESM and declarations for Node 20, dependencies left external.
 * `entry` maps an output name below dist/ to its source file.
 */
export function library(entry: Record<string, string>): ReturnType<typeof defineConfig> {
  return defineConfig({
    entry,
    format: ['esm'],
    target: 'node20',
    platform: 'node',
    dts: true,
    sourcemap: true,
    clean: true,
    silent: true,
    // Deno and runtimes at the edge know Node's modules by `node:` alone.
    removeNodeProtocol: false,
    plugins: [{ name: 'class-names', renderChunk: (code, { map }) => ({ code: ownNames(code), map }) }],
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
