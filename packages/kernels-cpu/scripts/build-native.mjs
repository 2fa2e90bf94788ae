// Builds the native library into build/<platform>-<arch>/, one file per instruction set, when sources changed. Plain Node >= 20.
//
//   node scripts/build-native.mjs [--force] [--verbose] [--keep-going] [--sanitize=address,undefined] [--isa=avx2,avx512]
//
// Every source is compiled once per variant named in its first lines (`// moe-isa: baseline avx2 avx512`, which is also the
// default). The library of a level links, of each source, the best variant that the level can run. One library per level, rather
// than one with all levels, because the linker would merge inline functions of different levels.
import { spawn, spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { basename, dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const options = parseArguments(process.argv.slice(2))
const target = `${process.platform}-${process.arch}${options.sanitize ? '-sanitize' : ''}`
const outDir = join(root, 'build', target)
const objDir = join(outDir, 'obj')
const extension = { darwin: 'dylib', win32: 'dll' }[process.platform] ?? 'so'

/** Instruction sets by architecture, lowest first, with the compiler flags of each. */
const levels = {
  x64: {
    baseline: ['-march=x86-64'],
    avx2: ['-march=x86-64', '-mavx2', '-mfma', '-mf16c', '-mbmi', '-mbmi2', '-mlzcnt', '-mpopcnt', '-mmovbe'],
    avx512: ['-march=skylake-avx512', '-mtune=icelake-server', '-mprefer-vector-width=512'],
    avx512bf16: [
      '-march=skylake-avx512',
      '-mtune=icelake-server',
      '-mprefer-vector-width=512',
      '-mavx512vnni',
      '-mavx512bf16',
    ],
  },
  arm64: { baseline: [] },
}

const fileHashes = new Map()

await main()

async function main() {
  const started = Date.now()
  const ladder = Object.keys(levels[process.arch] ?? {})
  if (process.platform === 'win32' || ladder.length === 0) return say(`not built: no build for ${target} yet`)
  const compiler = findCompiler()
  if (!compiler)
    return say('not built: no C++ compiler (looked for $CXX, g++, c++, clang++); install one and run this again')
  mkdirSync(objDir, { recursive: true })
  const unlock = await lock(join(outDir, 'lock'))
  try {
    const wanted = options.isa ?? ladder
    const sources = findSources()
    const objects = sources.flatMap(source =>
      source.variants.filter(isa => ladder.includes(isa)).map(isa => describe(source, isa, compiler)),
    )
    const needed = objects.filter(object => wanted.some(isa => objectsOf(isa, ladder, objects).includes(object)))
    const stale = needed.filter(object => options.force || !isFresh(object))
    const failed = await compileAll(stale, compiler)
    if (failed.length > 0 && !options.keepGoing) return fail(failed)
    let linked = 0
    for (const isa of wanted)
      linked += link(
        isa,
        objectsOf(isa, ladder, needed).filter(({ file }) => existsSync(file)),
        compiler,
      )
    removeStrays(objects)
    const seconds = ((Date.now() - started) / 1000).toFixed(1)
    const what =
      stale.length + linked === 0
        ? 'up to date'
        : `${stale.length} objects compiled, ${linked} libraries linked in ${seconds} s`
    say(`${relative(process.cwd(), outDir)} ${what} (${compiler.version})`)
    if (failed.length > 0) fail(failed)
  } finally {
    unlock()
  }
}

function parseArguments(args) {
  const parsed = { force: false, verbose: false, keepGoing: false, sanitize: '', isa: undefined }
  for (const arg of args) {
    if (arg === '--force') parsed.force = true
    else if (arg === '--verbose') parsed.verbose = true
    else if (arg === '--keep-going') parsed.keepGoing = true
    else if (arg.startsWith('--sanitize=')) parsed.sanitize = arg.slice(11)
    else if (arg.startsWith('--isa=')) parsed.isa = arg.slice(6).split(',')
    else {
      console.error(`kernels-cpu: unknown option ${arg}; see the head of scripts/build-native.mjs`)
      process.exit(2)
    }
  }
  return parsed
}

function say(line) {
  console.log(`kernels-cpu: ${line}`)
}

function fail(failed) {
  for (const { label, output } of failed) console.error(`kernels-cpu: ${label} does not compile\n${output}`)
  process.exitCode = 1
}

/** The first compiler that runs: { command, version }. */
function findCompiler() {
  for (const command of [process.env.CXX, 'g++', 'c++', 'clang++'].filter(Boolean)) {
    const found = spawnSync(command, ['--version'], { encoding: 'utf8' })
    if (found.status === 0) return { command, version: found.stdout.split('\n')[0] }
  }
}

function findSources() {
  const folders = [join(root, 'native')]
  const kernels = join(root, 'src', 'kernels')
  if (existsSync(kernels)) {
    for (const entry of readdirSync(kernels, { withFileTypes: true }))
      if (entry.isDirectory()) folders.push(join(kernels, entry.name))
  }
  return folders
    .flatMap(folder => readdirSync(folder).map(name => join(folder, name)))
    .filter(file => file.endsWith('.cc'))
    .map(file => {
      const head = readFileSync(file, 'utf8').slice(0, 1000)
      const named = head.match(/moe-isa:([ \w]+)/)
      return { file, variants: (named ? named[1] : 'baseline avx2 avx512').trim().split(/\s+/) }
    })
}

function describe({ file, variants }, isa, compiler) {
  const name = relative(root, file).replaceAll(/[/\\]/g, '-').replace(/\.cc$/, '')
  const flags = [
    '-std=c++17',
    '-O3',
    '-fPIC',
    '-fvisibility=hidden',
    '-fvisibility-inlines-hidden',
    '-Wall',
    '-Wextra',
    '-Wno-psabi',
  ]
  flags.push(
    '-Wno-ignored-attributes',
    '-Wno-uninitialized',
    '-Wno-maybe-uninitialized',
    '-fno-math-errno',
    '-fno-trapping-math',
    '-ffp-contract=fast',
    `-I${join(root, 'native')}`,
  )
  flags.push(...levels[process.arch][isa], `-DMOE_ISA_${isa.toUpperCase()}=1`)
  if (options.sanitize)
    flags.push(`-fsanitize=${options.sanitize}`, '-fno-omit-frame-pointer', '-fno-sanitize-recover=all', '-g', '-O1')
  return {
    source: file,
    variants,
    isa,
    flags,
    label: `${relative(root, file)} [${isa}]`,
    file: join(objDir, `${name}-${isa}.o`),
    stamp: join(objDir, `${name}-${isa}.json`),
    key: hash([compiler.command, compiler.version, ...flags].join('\n')),
  }
}

/** The best variant of every source that a level can run. */
function objectsOf(isa, ladder, objects) {
  const reach = ladder.indexOf(isa)
  const best = new Map()
  for (const object of objects) {
    const rank = ladder.indexOf(object.isa)
    const known = best.get(object.source)
    if (rank <= reach && (!known || rank > ladder.indexOf(known.isa))) best.set(object.source, object)
  }
  return [...best.values()]
}

function isFresh({ file, stamp, key }) {
  if (!existsSync(file) || !existsSync(stamp)) return false
  const known = JSON.parse(readFileSync(stamp, 'utf8'))
  if (known.key !== key) return false
  return Object.entries(known.inputs).every(([path, digest]) => fileHash(join(root, path)) === digest)
}

function fileHash(path) {
  if (!fileHashes.has(path)) fileHashes.set(path, existsSync(path) ? hash(readFileSync(path)) : '')
  return fileHashes.get(path)
}

function hash(data) {
  return createHash('sha256').update(data).digest('hex').slice(0, 32)
}

async function compileAll(objects, compiler) {
  const queue = objects.map(object => ({ object, size: statSync(object.source).size })).sort((a, b) => b.size - a.size)
  const failed = []
  const worker = async () => {
    for (let next = queue.shift(); next; next = queue.shift()) {
      const output = await compile(next.object, compiler)
      if (output !== '') failed.push({ label: next.object.label, output })
      if (failed.length > 0 && !options.keepGoing) queue.length = 0
    }
  }
  await Promise.all(Array.from({ length: Math.min(2, availableParallelism()) }, worker))
  return failed
}

/** Empty when it compiled, otherwise what the compiler said. The object of an earlier success stays until this one succeeds. */
async function compile({ source, flags, file, stamp, key, label }, compiler) {
  const started = Date.now()
  const depFile = `${file}.d`
  const temporary = `${file}.new`
  const args = [...flags, '-MMD', '-MF', depFile, '-c', source, '-o', temporary]
  if (options.verbose) say([compiler.command, ...args].join(' '))
  const { code, output } = await run(compiler.command, args)
  if (code !== 0) return output || `exit code ${code}`
  if (output.trim() !== '') process.stderr.write(output)
  const inputs = readFileSync(depFile, 'utf8')
    .replace(/^[^:]*:/, '')
    .replaceAll('\\\n', ' ')
    .trim()
    .split(/\s+/)
  const own = inputs.map(path => relative(root, path)).filter(path => !path.startsWith('..'))
  renameSync(temporary, file)
  writeFileSync(
    stamp,
    JSON.stringify({ key, inputs: Object.fromEntries(own.map(path => [path, fileHash(join(root, path))])) }),
  )
  rmSync(depFile)
  if (options.verbose) say(`${label} ${((Date.now() - started) / 1000).toFixed(1)} s`)
  return ''
}

/** 1 when the library was linked, 0 when it was up to date. */
function link(isa, objects, compiler) {
  const library = join(outDir, `moe-cpu-${isa}.${extension}`)
  const stamp = join(objDir, `moe-cpu-${isa}.link`)
  const key = hash(objects.map(({ file }) => `${basename(file)} ${hash(readFileSync(file))}`).join('\n'))
  if (!options.force && existsSync(library) && existsSync(stamp) && readFileSync(stamp, 'utf8') === key) return 0
  const args = ['-shared', '-o', `${library}.new`, ...objects.map(({ file }) => file)]
  // Helper threads run code of the library, so it may never be unmapped.
  if (process.platform === 'linux') args.push('-pthread', '-Wl,-z,nodelete', '-Wl,-z,defs', '-static-libgcc')
  if (options.sanitize) args.push(`-fsanitize=${options.sanitize}`, '-Wl,-z,undefs')
  if (options.verbose) say([compiler.command, ...args].join(' '))
  const { status, stderr } = spawnSync(compiler.command, args, { encoding: 'utf8' })
  if (status !== 0) {
    console.error(`kernels-cpu: ${basename(library)} does not link\n${stderr}`)
    process.exitCode = 1
    return 0
  }
  renameSync(`${library}.new`, library)
  writeFileSync(stamp, key)
  return 1
}

/** Objects of sources that are gone. */
function removeStrays(objects) {
  const known = new Set(objects.flatMap(({ file, stamp }) => [file, stamp].map(path => basename(path))))
  for (const name of readdirSync(objDir)) if (!known.has(name) && !name.endsWith('.link')) rmSync(join(objDir, name))
}

/** One build at a time. A lock whose process is gone is taken over. */
async function lock(path) {
  for (;;) {
    try {
      writeFileSync(path, String(process.pid), { flag: 'wx' })
      return () => rmSync(path, { force: true })
    } catch (error) {
      if (error.code !== 'EEXIST') throw error
    }
    const holder = existsSync(path) ? Number(readFileSync(path, 'utf8')) : 0
    if (holder > 0 && !isAlive(holder)) rmSync(path, { force: true })
    await new Promise(resolve => setTimeout(resolve, 100))
  }
}

function isAlive(pid) {
  try {
    process.kill(pid, 0)
    return true
  } catch (error) {
    return error.code === 'EPERM'
  }
}

function run(command, args) {
  return new Promise(resolve => {
    const child = spawn(command, args, { stdio: ['ignore', 'ignore', 'pipe'] })
    let output = ''
    child.stderr.on('data', chunk => (output += chunk))
    child.on('error', error => resolve({ code: 1, output: error.message }))
    child.on('close', code => resolve({ code: code ?? 1, output }))
  })
}
