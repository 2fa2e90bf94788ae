import { createRequire } from 'node:module'
import { join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'
import type { Plugin } from 'esbuild'

/** Substitutes for Node modules, and the exports that they implement. */
const substitutes: Readonly<Record<string, { readonly file: string; readonly names: readonly string[] }>> = {
  'node:crypto': { file: fileURLToPath(new URL('browser-crypto.ts', import.meta.url)), names: ['createHash'] },
}

/**
 * For browser builds: replaces imports of Node modules. Their functions throw when they are called, except those in `substitutes`.
 * `packages` are treated like Node modules.
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

/** Source of a module with the same exports, each of which throws when it is called. @param from folder of the importing module */
async function standIn(path: string, from: string): Promise<string> {
  const found = createRequire(join(from, 'any.js')).resolve(path)
  const names = Object.keys(await import(found === path ? path : pathToFileURL(found).href)).filter(
    name => /^\w+$/.test(name) && name !== 'default',
  )
  const { file, names: written } = substitutes[path] ?? { file: '', names: [] }
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
    problem: ${JSON.stringify(`${path} is not available in browsers`)},
    fix: 'pass the data itself (texts, files, a URL) instead of a path, and a directory handle to write to',
  })
}
${lines.join('\n')}
`
}
