/**
 * Makes one folder that says everything about this build on a machine with an NVIDIA GPU: Linux and its driver, no network, no Node.
 *
 *     pnpm gpu:pack [--out gpu]
 *
 * It holds Node, an archive of the packages, their kernels, tests and benchmarks, and what unpacks and starts them: `gpu/run.sh`. Build the kernels first:
 * `node packages/kernels-cuda/scripts/build-fatbins.mjs`.
 */
import { execFileSync, spawnSync } from 'node:child_process'
import { cpSync, existsSync, mkdirSync, readFileSync, rmSync, statSync, symlinkSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { parseArgs } from 'node:util'
import { gzipSync } from 'node:zlib'
import { type BuildOptions, build } from 'esbuild'

/** Some places take 64 MiB at a time: Node is a file of its own, which may go before the rest. */
const mostBytes = 57e6
const root = join(import.meta.dirname, '..', '..')
const { values: options } = parseArgs({ options: { out: { type: 'string', default: join(root, 'gpu') } } })
const out = join(options.out, 'pack')

/** What the tests and benchmarks need of the workspace. */
const packages = [
  'core',
  'kernels-cpu',
  'kernels-cuda',
  'attention-mla',
  'router',
  'mtp',
  'checkpoint',
  'deepseek',
  'trainer',
  'parallel',
]
/** CPU libraries that stay behind: machines with such a card have AVX2 at least, and AVX2 stands in for AVX-512 without bf16. */
const unusedLibrary = process.arch === 'x64' ? /-(baseline|avx512)\.so$/ : /(?!)/
/** Whose tests are run there (run.mjs). */
const tested = ['kernels-cuda', 'attention-mla', 'router', 'mtp', 'deepseek']
/** Tests that are not run there, and what only they read. */
const isLeftOut = (name: string, path: string) =>
  !tested.includes(name) && /\.test\.ts$|\/fixtures(\/|$)/.test(path) && !path.endsWith('/nccl.test.ts')
/** Plain JavaScript packages, bundled into one file each; whoever depends on them comes first. */
const bundled = { zod: 'deepseek', tinyglobby: 'trainer' } as const

if (process.platform !== 'linux') throw new Error('the folder is for Linux and is packed there')
execFileSync(process.execPath, [join(root, 'packages/kernels-cuda/scripts/build-fatbins.mjs'), '--check'], {
  stdio: 'inherit',
})
rmSync(out, { recursive: true, force: true })
mkdirSync(join(out, 'node_modules', '@moe'), { recursive: true })
copyPackages()
await copyDependencies()
copyTools()
const archive = join(options.out, 'pack.tar.gz')
execFileSync('tar', ['-C', out, '-c', '-f', `${archive}.tar`, '.'])
writeFileSync(archive, gzipSync(readFileSync(`${archive}.tar`), { level: 9 }))
rmSync(`${archive}.tar`)
rmSync(out, { recursive: true })
const node = join(options.out, 'node.gz')
writeFileSync(node, gzipSync(readNode(), { level: 9 }))
cpSync(join(import.meta.dirname, 'run.sh'), join(options.out, 'run.sh'))

const bytes = statSync(archive).size + statSync(node).size
console.log(`${options.out}: ${(bytes / 1e6).toFixed(1)} MB; copy it to the machine and start run.sh there`)
if (bytes > mostBytes) {
  console.error(`gpu:pack: the folder may have ${mostBytes / 1e6} MB (binutils' strip makes Node smaller)`)
  process.exitCode = 1
}

/** Node without its symbols, which are a tenth of it. */
function readNode(): Buffer {
  const from = join(root, 'node_modules/node/bin/node')
  const stripped = join(options.out, 'node')
  try {
    return readFileSync(spawnSync('strip', ['-o', stripped, from]).status === 0 ? stripped : from)
  } finally {
    rmSync(stripped, { force: true })
  }
}

function copyPackages(): void {
  for (const name of packages) {
    const from = join(root, 'packages', name)
    const to = join(out, 'packages', name)
    for (const part of [
      'package.json',
      'src',
      'fixtures',
      join('build', `linux-${process.arch}`),
      join('build', 'fatbins'),
    ]) {
      if (!existsSync(join(from, part))) continue
      cpSync(join(from, part), join(to, part), {
        recursive: true,
        // Compiler output and sources of native code stay behind.
        filter: path =>
          !isLeftOut(name, path) &&
          !/\/obj(\/|$)|\.(cc|cu|cuh|h|link)$|fatbins\/(?!manifest).*\.json$/.test(path) &&
          !unusedLibrary.test(path),
      })
    }
    symlinkSync(join('..', '..', 'packages', name), join(out, 'node_modules', '@moe', name))
  }
}

async function copyDependencies(): Promise<void> {
  const modules = join(out, 'node_modules')
  const koffi = dirname(createRequire(join(root, 'packages/kernels-cuda/package.json')).resolve('koffi'))
  const copy = (from: string, name: string) =>
    cpSync(from, join(modules, name), {
      recursive: true,
      dereference: true,
      // Node is glibc's; sources stay behind here, too.
      filter: path => !/koffi\/(doc|vendor|lib)(\/|$)|\/musl_|\.(cc|hh|inc|def|asm|S|md)$/.test(path),
    })
  copy(koffi, 'koffi')
  // Installed beside it, as its optional dependency.
  const native = join('@koromix', `koffi-linux-${process.arch}`)
  copy(join(koffi, '..', native), native)
  const ofCpu = createRequire(join(root, 'packages/kernels-cpu/package.json'))
  copy(dirname(ofCpu.resolve('detect-libc/package.json')), 'detect-libc')
  for (const [name, user] of Object.entries(bundled)) {
    await bundle({ stdin: { contents: `export * from '${name}'`, resolveDir: join(root, 'packages', user) } }, name)
  }
  await bundle({ entryPoints: [join(import.meta.dirname, 'vitest.ts')] }, 'vitest')
}

/** One ES module under node_modules, with all that it imports inside. */
async function bundle(entry: Pick<BuildOptions, 'entryPoints' | 'stdin'>, name: string): Promise<void> {
  const folder = join(out, 'node_modules', name)
  // What CommonJS inside takes for granted.
  const banner = {
    js: "import { createRequire } from 'node:module'; const require = createRequire(import.meta.url), __dirname = import.meta.dirname;",
  }
  await build({
    ...entry,
    outfile: join(folder, 'index.mjs'),
    bundle: true,
    minify: true,
    platform: 'node',
    format: 'esm',
    banner,
    logLevel: 'error',
  })
  writeFileSync(join(folder, 'package.json'), `${JSON.stringify({ name, type: 'module', exports: './index.mjs' })}\n`)
}

function copyTools(): void {
  cpSync(join(root, 'bench'), join(out, 'bench'), {
    recursive: true,
    filter: path => !/node_modules|results|__pycache__/.test(path),
  })
  const tools = join(out, 'tools', 'gpu')
  mkdirSync(tools, { recursive: true })
  for (const file of ['run.mjs', 'file.mjs', 'models.mjs', 'probe.mjs'])
    cpSync(join(import.meta.dirname, file), join(tools, file))
  writeFileSync(join(out, 'package.json'), '{ "name": "moe-gpu", "private": true, "type": "module" }\n')
}
