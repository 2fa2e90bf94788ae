/**
 * Packs this build into one folder, to test and benchmark it on a machine with an NVIDIA GPU that only needs Linux and the driver: no network, no Node.
 *
 *     pnpm gpu:pack [--out gpu]
 *
 * The folder contains Node, an archive of the packages with their kernels, tests and benchmarks, and `gpu/run.sh`, which unpacks and runs them. Build the kernels
 * first: `node packages/kernels-cuda/scripts/build-fatbins.mjs`.
 */
import { execFileSync, spawnSync } from 'node:child_process'
import { cpSync, existsSync, mkdirSync, readFileSync, rmSync, statSync, symlinkSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { parseArgs } from 'node:util'
import { gzipSync } from 'node:zlib'
import { type BuildOptions, build, type Plugin } from 'esbuild'

/** Some places accept at most 64 MiB at a time. Node is a separate file, so that it can be copied first. */
const mostBytes = 58e6
const root = join(import.meta.dirname, '..', '..')
const { values: options } = parseArgs({ options: { out: { type: 'string', default: join(root, 'gpu') } } })
const out = join(options.out, 'pack')

/** The packages that the tests and benchmarks need. */
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
/** CPU libraries that are not packed: machines with such a card have at least AVX2, which replaces AVX-512 without VNNI. */
const unusedLibrary = process.arch === 'x64' ? /-(baseline|avx512)\.so$/ : /(?!)/
/** Packages whose tests are run there (run.mjs). */
const tested = ['kernels-cuda', 'attention-mla', 'router', 'mtp', 'deepseek']
/** Tests that are not run there, and the files that only they read. */
const isLeftOut = (name: string, path: string) =>
  !tested.includes(name) && /\.test\.ts$|\/fixtures(\/|$)/.test(path) && !path.endsWith('/nccl.test.ts')
/** JavaScript dependencies that are bundled into one file each, and a package that depends on each. */
const bundled = { zod: 'deepseek', tinyglobby: 'trainer' } as const

/** zod's error messages in other languages are nearly half of it. */
const withoutTranslations: Plugin = {
  name: 'without-translations',
  setup: ({ onLoad }) => onLoad({ filter: /\/zod\/v4\/locales\/index\.js$/ }, () => ({ contents: '' })),
}

if (process.platform !== 'linux') throw new Error('gpu:pack only runs on Linux, because the folder is for Linux')
execFileSync(process.execPath, [join(root, 'packages/kernels-cuda/scripts/build-fatbins.mjs'), '--check'], {
  stdio: 'inherit',
})
rmSync(out, { recursive: true, force: true })
mkdirSync(join(out, 'node_modules', '@moe'), { recursive: true })
copyPackages()
await copyDependencies()
copyTools()
execFileSync(process.execPath, [join(out, 'tools', 'gpu', 'run.mjs'), '--check'], { stdio: 'inherit' })
const archive = join(options.out, 'pack.tar.gz')
execFileSync('tar', ['-C', out, '-c', '-f', `${archive}.tar`, '.'])
writeFileSync(archive, gzipSync(readFileSync(`${archive}.tar`), { level: 9 }))
rmSync(`${archive}.tar`)
rmSync(out, { recursive: true })
const node = join(options.out, 'node.gz')
writeFileSync(node, gzipSync(readNode(), { level: 9 }))
cpSync(join(import.meta.dirname, 'run.sh'), join(options.out, 'run.sh'))

const bytes = statSync(archive).size + statSync(node).size
console.log(`${options.out}: ${(bytes / 1e6).toFixed(1)} MB; copy it to the machine with the GPU and run run.sh there`)
if (bytes > mostBytes) {
  console.error(`gpu:pack: the folder exceeds ${mostBytes / 1e6} MB (install binutils, whose strip makes Node smaller)`)
  process.exitCode = 1
}

/** Node without its symbols, which are a tenth of its size. */
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
        // Skips compiler output and sources of native code.
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
      // Node is built for glibc; also skips sources.
      filter: path => !/koffi\/(doc|vendor|lib)(\/|$)|\/musl_|\.(cc|hh|inc|def|asm|S|md)$/.test(path),
    })
  copy(koffi, 'koffi')
  // Its native part, which is an optional dependency.
  const native = join('@koromix', `koffi-linux-${process.arch}`)
  copy(join(koffi, '..', native), native)
  const ofCpu = createRequire(join(root, 'packages/kernels-cpu/package.json'))
  copy(dirname(ofCpu.resolve('detect-libc/package.json')), 'detect-libc')
  for (const [name, user] of Object.entries(bundled)) {
    await bundle({ stdin: { contents: `export * from '${name}'`, resolveDir: join(root, 'packages', user) } }, name)
  }
  await bundle({ entryPoints: [join(import.meta.dirname, 'vitest.ts')] }, 'vitest')
}

/** Bundles an ES module with its imports into one file under node_modules. */
async function bundle(entry: Pick<BuildOptions, 'entryPoints' | 'stdin'>, name: string): Promise<void> {
  const folder = join(out, 'node_modules', name)
  // Globals that bundled CommonJS modules expect.
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
    plugins: [withoutTranslations],
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
