import { createRequire } from 'node:module'
import { join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'
import type { Plugin } from 'esbuild'

/** Modules that have some of the names of Node's, by these. */
const anew: Readonly<Record<string, { readonly file: string; readonly names: readonly string[] }>> = {
  'node:crypto': { file: fileURLToPath(new URL('browser-crypto.ts', import.meta.url)), names: ['createHash'] },
}

/**
 * For builds that run in browsers: no module of Node is imported, and what comes from one throws when it is called.
 * `packages` are treated as Node's modules are. What is written anew for them does not: `anew`.
 */
export function withoutNode(packages: readonly string[] = []): Plugin {
  const filter = new RegExp(`^(${['node:.*', ...packages].join('|')})$`)
  return {
    name: 'without-node',
    setup(build) {
      build.onResolve({ filter }, ({ path, resolveDir }) => ({
        path,
        namespace: 'without-node',
        sideEffects: false,
        pluginData: resolveDir,
      }))
      build.onLoad({ filter: /./, namespace: 'without-node' }, async ({ path, pluginData }) => ({
        contents: await standIn(path, pluginData),
        resolveDir: pluginData as string,
      }))
    },
  }
}

/** A module with the names of another one, each of which throws when it is called. @param from folder of who imports it */
async function standIn(path: string, from: string): Promise<string> {
  const found = createRequire(join(from, 'any.js')).resolve(path)
  const names = Object.keys(await import(found === path ? path : pathToFileURL(found).href)).filter(
    name => /^\w+$/.test(name) && name !== 'default',
  )
  const { file, names: written } = anew[path] ?? { file: '', names: [] }
  const lines = names.map(name =>
    written.includes(name)
      ? `export { ${name} } from ${JSON.stringify(file)}`
      : `export const ${name} = /* @__PURE__ */ absent(${JSON.stringify(name)})`,
  )
  return `import { MoeError } from '@moe/core'
const absent = op => () => {
  throw new MoeError({
    code: 'E_UNSUPPORTED',
    op,
    problem: ${JSON.stringify(`${path} is not there in a browser`)},
    fix: 'pass what is read itself (texts, files, an address), and the handle of a folder to write to',
  })
}
${lines.join('\n')}
`
}
