// Tests the packages as users get them: packs each one (after `pnpm build`), checks the tarball with publint, installs all tarballs with npm
// into an empty folder and imports every entry point there, without sources or TypeScript. Entry points for browsers are bundled for one. If
// native kernels were built for publishing (`node packages/kernels-cpu/scripts/build-native.mjs --platforms`), this machine's platform
// package must work.
//
// --release: the native libraries of all platforms and up-to-date fatbins are required.
// --tarballs=DIR: checks the tarballs that `changeset pack --out-dir DIR` wrote, instead of packing; needs no build. They must contain a
//   native library for this machine.
// --runtimes: also runs everything in Bun and Deno, installed from npm.
import { execFileSync, spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { basename, join, resolve } from 'node:path'
import { parseArgs } from 'node:util'
import { build } from 'esbuild'
import { publint } from 'publint'
import { formatMessage } from 'publint/utils'
import { librariesOf, platforms } from '../packages/kernels-cpu/src/platforms.mjs'

interface Manifest {
  name: string
  version: string
  private?: boolean
  bin?: Record<string, string>
  exports?: Record<string, unknown>
  dependencies?: Record<string, string>
  peerDependencies?: Record<string, string>
  peerDependenciesMeta?: Record<string, { optional?: boolean }>
  optionalDependencies?: Record<string, string>
  publishConfig?: { exports?: Record<string, unknown>; bin?: Record<string, string>; os?: string[] }
}

interface Packed {
  manifest: Manifest
  tarball: string
}

/** Entry points without a `browser` condition that also run in browsers. */
const asTheyAre = ['@moe/core', '@moe/backend-tfjs', '@moe/kernels-webgpu']

const { values: options } = parseArgs({
  options: { release: { type: 'boolean' }, tarballs: { type: 'string' }, runtimes: { type: 'boolean' } },
})
const work = mkdtempSync(join(tmpdir(), 'moe-pack-'))
const problems: string[] = []
try {
  const packages = [...foldersIn('packages'), ...foldersIn(join('packages', 'kernels-cpu', 'npm'))].flatMap(pack)
  for (const { manifest, tarball } of packages) await lint(manifest, tarball)
  for (const folder of foldersIn('packages')) problems.push(...bundledByMistake(folder))
  if (options.release) requireKernels()
  await installAndImport(packages)
  const bytes = packages.reduce((sum, { tarball }) => sum + statSync(tarball).size, 0)
  console.log(`${packages.length} packages packed (${(bytes / 1e3).toFixed(0)} kB), installed and imported`)
} finally {
  rmSync(work, { recursive: true, force: true })
}
for (const problem of problems) console.error(problem)
process.exitCode = problems.length > 0 ? 1 : 0

function foldersIn(folder: string): string[] {
  return readdirSync(folder).map(name => join(folder, name))
}

function pack(folder: string): Packed[] {
  if (!existsSync(join(folder, 'package.json'))) return []
  const manifest: Manifest = JSON.parse(readFileSync(join(folder, 'package.json'), 'utf8'))
  if (manifest.private) return []
  if (options.tarballs) {
    // A package that was published before a release failed half-way is not packed again; npm installs it from the registry.
    const tarball = resolve(options.tarballs, 'packages', tarballName(manifest))
    return existsSync(tarball) ? [{ manifest, tarball }] : []
  }
  if (manifest.exports && !existsSync(join(folder, 'dist')))
    throw new Error(`${folder}/dist is missing: run \`pnpm build\` first`)
  const tarball = join(work, `${basename(folder)}.tgz`)
  pnpm(['pack', '--out', tarball], folder)
  return [{ manifest, tarball }]
}

/** The file name that `changeset pack` and `pnpm pack` give to a package. */
function tarballName({ name, version }: Manifest): string {
  return `${name.replace('@', '').replace('/', '-')}-${version}.tgz`
}

/** Reports native libraries and fatbins that are missing or out of date. */
function requireKernels(): void {
  for (const platform of Object.keys(platforms)) {
    const missing = librariesOf(platform).filter(file => !existsSync(join('packages/kernels-cpu/npm', platform, file)))
    if (missing.length > 0)
      problems.push(`@moe/kernels-cpu-${platform} lacks ${missing.join(', ')}; run \`pnpm build:platforms\``)
  }
  const fatbins = spawnSync(
    process.execPath,
    ['packages/kernels-cuda/scripts/build-fatbins.mjs', '--check', '--published'],
    { encoding: 'utf8' },
  )
  if (fatbins.status !== 0) problems.push(`@moe/kernels-cuda: ${fatbins.stderr.trim()}`)
}

function hasLibrary(folder: string): boolean {
  return readdirSync(folder).some(name => name.startsWith('moe-cpu-'))
}

/** Reports sources of other packages in the files for Node: a bundled package has no access to its own files, such as kernels. */
function bundledByMistake(folder: string): string[] {
  const dist = join(folder, 'dist')
  if (!existsSync(dist)) return []
  return readdirSync(dist)
    .filter(name => name.endsWith('.js.map'))
    .flatMap(name => {
      const { sources } = JSON.parse(readFileSync(join(dist, name), 'utf8')) as { sources: string[] }
      const foreign = sources.filter(source => !source.startsWith('../src/'))
      return foreign.length === 0
        ? []
        : [`${folder}: dist/${name.slice(0, -4)} contains ${foreign[0]} of another package`]
    })
}

async function lint(manifest: Manifest, tarball: string): Promise<void> {
  const data = readFileSync(tarball)
  const { messages, pkg } = await publint({ pack: { tarball: new Uint8Array(data).buffer }, strict: true })
  for (const message of messages) {
    if (message.type !== 'suggestion') problems.push(`${manifest.name}: publint: ${formatMessage(message, pkg ?? {})}`)
  }
}

async function installAndImport(packages: Packed[]): Promise<void> {
  const app = join(work, 'app')
  mkdirSync(app)
  // Tarballs replace the registry, also for dependencies between packages. Like a user, install required peers.
  const tarballs = Object.fromEntries(packages.map(({ manifest, tarball }) => [manifest.name, `file:${tarball}`]))
  const peers = Object.fromEntries(
    packages.flatMap(({ manifest }) =>
      Object.entries(manifest.peerDependencies ?? {}).filter(
        ([name]) => !manifest.peerDependenciesMeta?.[name]?.optional,
      ),
    ),
  )
  // Platform packages are installed as optional dependencies, or not at all.
  const forAnySystem = packages
    .filter(({ manifest }) => !manifest.publishConfig?.os)
    .map(({ manifest }) => manifest.name)
  const dependencies = { ...peers, ...Object.fromEntries(forAnySystem.map(name => [name, tarballs[name]])) }
  writeFileSync(join(app, 'package.json'), JSON.stringify({ type: 'module', dependencies, overrides: tarballs }))
  execFileSync('npm', ['install', '--ignore-scripts', '--no-audit', '--no-fund', '--loglevel=error'], {
    cwd: app,
    stdio: ['ignore', 'ignore', 'inherit'],
    shell: process.platform === 'win32',
  })
  const entries = packages.flatMap(({ manifest }) =>
    Object.keys(manifest.publishConfig?.exports ?? manifest.exports ?? {})
      .filter(entry => !entry.endsWith('.json') && !entry.includes('*'))
      .map(entry => `${manifest.name}${entry.slice(1)}`),
  )
  const native = foldersIn(join(app, 'node_modules', '@moe')).some(
    folder => /kernels-cpu-/.test(folder) && hasLibrary(folder),
  )
  if ((options.release || options.tarballs) && !native)
    problems.push('@moe/kernels-cpu: npm installed no native library for this machine')
  writeFileSync(join(app, 'import-all.js'), importAll(entries) + openPage() + (native ? useNativeKernels() : ''))
  for (const [program, ...args] of [...nodes(), ...(options.runtimes ? installRuntimes() : [])]) {
    const output = execFileSync(program, [...args, 'import-all.js'], { cwd: app, encoding: 'utf8' })
    for (const line of output.split('\n').filter(Boolean)) problems.push(`${basename(program)}: ${line}`)
  }
  checkDeclarations(app, entries)
  await bundleForBrowsers(app, packages)
  for (const { manifest } of packages) {
    for (const name of Object.keys(manifest.bin ?? {})) {
      try {
        execFileSync('npm', ['exec', '--', name, '--help'], {
          cwd: app,
          stdio: ['ignore', 'ignore', 'pipe'],
          shell: process.platform === 'win32',
        })
      } catch (error) {
        problems.push(`${manifest.name}: \`${name} --help\` failed: ${error instanceof Error ? error.message : error}`)
      }
    }
  }
}

/** A program that imports each entry point and prints a line for each that fails or exports nothing, and for each class with a wrong name. */
function importAll(entries: string[]): string {
  return `for (const entry of ${JSON.stringify(entries)}) {
  try {
    const module = await import(entry)
    if (Object.keys(module).length === 0) console.log(entry + ': exports nothing')
    for (const [name, value] of Object.entries(module)) {
      if (typeof value === 'function' && /^class\\b/.test(value) && value.name !== name)
        console.log(entry + ': ' + name + ' has the name ' + value.name)
    }
  } catch (error) {
    console.log(entry + ': ' + (error?.stack ?? error))
  }
}
`
}

/** A program that prints a line for each file of the training page that is not served. */
function openPage(): string {
  return `const { watchRuns } = await import('@moe/trainer/watch')
try {
  const watcher = await watchRuns('runs', { port: 0 })
  for (const path of ['', 'page.js', 'uplot.js']) {
    const { status } = await fetch(watcher.url + path)
    if (status !== 200) console.log('@moe/trainer/watch: /' + path + ' returned status ' + status)
  }
  await watcher.close()
} catch (error) {
  console.log('@moe/trainer/watch: ' + (error?.stack ?? error))
}
`
}

/** A program that prints a line if the installed native kernels do not work. */
function useNativeKernels(): string {
  return `const { createBackend } = await import('@moe/kernels-cpu')
const { setDefaultBackend, tensor } = await import('@moe/core')
setDefaultBackend(await createBackend())
const x = tensor([1, 2, 3, 4], [2, 2])
const product = await x.matmul(x).values()
if (String(product) !== '7,10,15,22') console.log('@moe/kernels-cpu: [1 2; 3 4] squared is ' + product)
`
}

/** The workspace's Node, and the Node that started npm, which is often an older one that the packages must support. */
function nodes(): string[][] {
  const outer = process.env.npm_node_execpath
  return outer && outer !== process.execPath ? [[process.execPath], [outer]] : [[process.execPath]]
}

/** Installs Bun and Deno, and returns the commands that run a program. */
function installRuntimes(): string[][] {
  const folder = join(work, 'runtimes')
  mkdirSync(folder)
  writeFileSync(join(folder, 'package.json'), '{}')
  execFileSync('npm', ['install', '--no-audit', '--no-fund', '--loglevel=error', 'bun', 'deno'], {
    cwd: folder,
    stdio: ['ignore', 'ignore', 'inherit'],
    shell: process.platform === 'win32',
  })
  const bin = join(folder, 'node_modules', '.bin')
  return [
    [join(bin, 'bun'), 'run'],
    [join(bin, 'deno'), 'run', '--allow-all'],
  ]
}

/** Bundles browser entry points as an application would, which fails if one imports a Node module. */
async function bundleForBrowsers(app: string, packages: Packed[]): Promise<void> {
  const entries = packages.flatMap(({ manifest }) =>
    Object.entries(manifest.publishConfig?.exports ?? manifest.exports ?? {})
      .filter(([, target]) => Object.keys(target as object).includes('browser'))
      .map(([entry]) => `${manifest.name}${entry.slice(1)}`),
  )
  for (const entry of [...asTheyAre, ...entries]) {
    const { errors } = await build({
      stdin: { contents: `export * from '${entry}'`, resolveDir: app },
      bundle: true,
      platform: 'browser',
      format: 'esm',
      outdir: join(work, 'bundle'),
      external: ['@tensorflow/*'],
      logLevel: 'silent',
    }).catch(error => error as { errors: { text: string }[] })
    for (const { text } of errors) problems.push(`${entry}: cannot be bundled for browsers: ${text}`)
  }
}

/** Compiles the declarations as in a project without Node's types and without skipLibCheck. Errors in other libraries are ignored. */
function checkDeclarations(app: string, entries: string[]): void {
  writeFileSync(join(app, 'import-all.ts'), `${entries.map(entry => `import '${entry}'`).join('\n')}\n`)
  const compilerOptions = {
    target: 'ES2022',
    lib: ['ES2023', 'ESNext.Disposable', 'DOM'],
    module: 'NodeNext',
    strict: true,
    noEmit: true,
    types: [],
  }
  writeFileSync(join(app, 'tsconfig.json'), JSON.stringify({ compilerOptions, files: ['import-all.ts'] }))
  const { stdout } = spawnSync('tsc', ['-p', app, '--pretty', 'false'], {
    encoding: 'utf8',
    cwd: app,
    shell: process.platform === 'win32',
  })
  for (const line of stdout.split('\n')) if (/^(node_modules\/@moe\/|import-all)/.test(line)) problems.push(line)
}

function pnpm(args: string[], cwd: string): void {
  execFileSync('pnpm', args, { cwd, stdio: ['ignore', 'ignore', 'inherit'], shell: process.platform === 'win32' })
}
