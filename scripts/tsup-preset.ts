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
  })
}
