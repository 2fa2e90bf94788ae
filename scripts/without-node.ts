import type { Plugin } from 'esbuild'

/**
 * For builds that run in browsers: no module of Node is imported, and what comes from one throws when it is called.
 * `packages` are treated as Node's modules are.
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
        contents: await standIn(path),
        resolveDir: pluginData as string,
      }))
    },
  }
}

/** A module with the names of another one, each of which throws when it is called. */
async function standIn(path: string): Promise<string> {
  const names = Object.keys(await import(path)).filter(name => name !== 'default')
  const lines = names.map(name => `export const ${name} = /* @__PURE__ */ absent(${JSON.stringify(name)})`)
  return `import { MoeError } from '@moe/core'
const absent = op => () => {
  throw new MoeError({
    code: 'E_UNSUPPORTED',
    op,
    problem: ${JSON.stringify(`${path} is not there in a browser`)},
    fix: 'read by address, new URL(name, document.baseURI), or from files that a page was given; what writes files needs Node',
  })
}
${lines.join('\n')}
`
}
