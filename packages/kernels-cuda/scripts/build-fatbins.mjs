// Builds the kernels for GPUs into build/fatbins/, one file per op, if its sources changed. Needs nvcc (CUDA 12.8 or later). Plain Node >= 20.
//
//   node scripts/build-fatbins.mjs [--arch=80,90a] [--jit] [--force] [--verbose] [--check [--published]]
//
// Machine code needs a driver of the compiler's CUDA version (13: 580; 12: 550, because it is compressed). --jit writes PTX of version 8.0 instead, for drivers from
// 525 on, which compile each module when it is first needed. That takes minutes in total, once per user and driver, and is not used for published packages.
// A module `<op>-sm90a` is built for that architecture only. Published packages contain all architectures; if all are built, the registers and shared memory of each
// kernel are written to device/resources.txt.
// --check compiles nothing. It fails if a fatbin is missing or older than its sources, if a kernel spills registers, or if the fatbins are too large;
// with --published also if they lack an architecture that published packages contain.
import {
  appendFileSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs'
import { availableParallelism } from 'node:os'
import { basename, dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import { dependencies, hash, run } from '../../kernels-cpu/scripts/objects.mjs'
import { nvccVersion } from './nvcc.mjs'

/** Architectures with machine code; the driver compiles the PTX of the last one on newer devices. */
const published = ['80', '86', '89', '90a', '100', '120']
const portable = '80'
/** With --jit: the oldest PTX version that supports everything the kernels use, and the driver version that accepts it. */
const oldest = { ptx: '8.0', cuda: '12.0' }
/** Maximum size of the unpacked package. */
const mostBytes = 20e6

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const outDir = join(root, 'build', 'fatbins')
const report = join(root, 'device', 'resources.txt')
const options = parseArguments(process.argv.slice(2))
const architectures = options.arch ?? published

await main()

async function main() {
  const started = Date.now()
  const modules = findModules()
  if (options.check) return check(modules)
  const version = nvccVersion()
  if (version === undefined) return fail('not built: found no nvcc; install the CUDA toolkit and try again')
  mkdirSync(outDir, { recursive: true })
  const key = keyOf(version, options.jit ? ['jit'] : architectures)
  const stale = modules.filter(module => options.force || !isFresh(module, key))
  const failed = await compileAll(stale, key)
  for (const { module, output } of failed) console.error(`kernels-cuda: ${module.name} failed to compile\n${output}`)
  if (failed.length > 0) {
    process.exitCode = 1
    return
  }
  removeStrays(modules)
  const major = Number.parseInt(version, 10)
  // Drivers for CUDA 12.4 and later can read compressed fatbins.
  const driver = options.jit ? oldest.cuda : major === 12 ? '12.4' : `${major}.0`
  const built = options.jit ? [] : architectures
  writeFileSync(
    join(outDir, 'manifest.json'),
    `${JSON.stringify({ cuda: version, driver, architectures: built, portable })}\n`,
  )
  if (options.arch === undefined && !options.jit) writeReport(modules, version)
  const bytes = modules.reduce((sum, { file }) => sum + statSync(file).size, 0)
  const what =
    stale.length === 0
      ? 'up to date'
      : `${stale.length} of ${modules.length} built in ${((Date.now() - started) / 1000).toFixed(0)} s`
  say(`${relative(process.cwd(), outDir)} ${what}, ${(bytes / 1e6).toFixed(1)} MB (CUDA ${version})`)
  if (!options.jit && bytes > mostBytes) fail(`the kernels have ${bytes} bytes, but the limit is ${mostBytes}`)
}

function parseArguments(args) {
  const parsed = { arch: undefined, jit: false, force: false, verbose: false, check: false, published: false }
  for (const arg of args) {
    if (arg === '--force') parsed.force = true
    else if (arg === '--jit') parsed.jit = true
    else if (arg === '--verbose') parsed.verbose = true
    else if (arg === '--check') parsed.check = true
    else if (arg === '--published') parsed.published = true
    else if (arg.startsWith('--arch=')) parsed.arch = arg.slice(7).split(',')
    else {
      console.error(
        `kernels-cuda: unknown option ${arg}; options are described at the top of scripts/build-fatbins.mjs`,
      )
      process.exit(2)
    }
  }
  return parsed
}

function say(line) {
  console.log(`kernels-cuda: ${line}`)
}

function fail(line) {
  console.error(`kernels-cuda: ${line}`)
  process.exitCode = 1
}

function findModules() {
  const kernels = join(root, 'src', 'kernels')
  return readdirSync(kernels, { withFileTypes: true })
    .filter(entry => entry.isDirectory() && existsSync(join(kernels, entry.name, `${entry.name}.cu`)))
    .map(({ name }) => ({
      name,
      source: join(kernels, name, `${name}.cu`),
      file: join(outDir, `${name}.fatbin`),
      stamp: join(outDir, `${name}.json`),
      only: onlyOf(name),
      targets: targetsOf(onlyOf(name)),
    }))
    .filter(({ targets }) => targets.length > 0)
}

/** The module's architecture, if it is built for only one. */
function onlyOf(module) {
  return module.match(/-sm(\w+)$/)?.[1]
}

/** nvcc options: machine code for each architecture, and PTX; for a module with one architecture, only its machine code. */
function targetsOf(only) {
  const machine = architectures
    .filter(arch => only === undefined || arch === only)
    .flatMap(arch => ['-gencode', `arch=compute_${arch},code=sm_${arch}`])
  return only === undefined ? [...machine, '-gencode', `arch=compute_${portable},code=compute_${portable}`] : machine
}

/** What a fatbin was compiled with and for, as its stamp records it. */
function keyOf(version, architectures) {
  return hash([version, ...architectures].join(' '))
}

function isFresh({ file, stamp }, key) {
  if (!existsSync(file) || !existsSync(stamp)) return false
  const known = JSON.parse(readFileSync(stamp, 'utf8'))
  if (key !== undefined && known.key !== key) return false
  return Object.entries(known.inputs).every(
    ([path, digest]) => existsSync(join(root, path)) && hash(readFileSync(join(root, path))) === digest,
  )
}

async function compileAll(modules, key) {
  const queue = modules.map(module => ({ module, size: statSync(module.source).size })).sort((a, b) => b.size - a.size)
  const failed = []
  const worker = async () => {
    for (let next = queue.shift(); next; next = queue.shift()) {
      const started = Date.now()
      const output = await compile(next.module, key)
      if (output !== '') failed.push({ module: next.module, output })
      else if (options.verbose) say(`${next.module.name} ${((Date.now() - started) / 1000).toFixed(1)} s`)
    }
  }
  await Promise.all(Array.from({ length: Math.min(4, availableParallelism()) }, worker))
  return failed
}

/** Returns '' on success, otherwise the compiler's output. */
async function compile({ source, file, stamp, only, targets }, key) {
  const temporary = `${file}.new`
  const depFile = `${file}.d`
  const arch = only ?? portable
  // A tenth of the size of the default.
  const form = options.jit
    ? ['-ptx', `-arch=compute_${arch}`]
    : ['-fatbin', '--compress-mode=size', '-Xptxas', '-v', ...targets]
  const args = [
    ...form,
    '-std=c++17',
    '-O3',
    `-I${join(root, 'device')}`,
    '-MD',
    '-MF',
    depFile,
    '-o',
    temporary,
    source,
  ]
  if (options.verbose) say(['nvcc', ...args].join(' '))
  let { code, output } = await run('nvcc', args, 'pipe')
  if (code === 0 && options.jit) ({ code, output } = await assemble(temporary, arch))
  if (code !== 0) return output || `exit code ${code}`
  // wgmmas that the compiler serialized, because something accesses their accumulators in between; and all other warnings.
  const said = output.match(/.*(wgmma.*serialized|warpgroup\.\w+ is injected|warning|Performance Loss).*/i)
  if (said) return said[0]
  const resources = parseResources(output)
  // The copy engine reads tensor maps from parameters. If the compiler copies one, it is in the thread's local memory.
  const framed = only && resources.find(({ stack }) => stack > 0)
  if (framed) return `${framed.name} keeps ${framed.stack} bytes in local memory, perhaps a tensor map`
  const inputs = dependencies(depFile, root)
  rmSync(depFile)
  renameSync(temporary, file)
  writeFileSync(
    stamp,
    JSON.stringify({
      key,
      inputs: Object.fromEntries(inputs.map(path => [path, hash(readFileSync(join(root, path)))])),
      resources,
    }),
  )
  return ''
}

/** Sets the oldest PTX version and lets ptxas compile the result, which checks that this version supports it. */
async function assemble(file, arch) {
  writeFileSync(file, readFileSync(file, 'utf8').replace(/^\.version .*$/m, `.version ${oldest.ptx}`))
  const assembled = await run('ptxas', [`-arch=sm_${arch}`, '-v', file, '-o', `${file}.cubin`], 'pipe')
  rmSync(`${file}.cubin`, { force: true })
  appendFileSync(file, '\0') // the driver expects a terminated string
  return assembled
}

/** The resources of each kernel as ptxas reports them: { name, arch, registers, shared, stack, spill }. */
function parseResources(output) {
  const found = []
  let current
  for (const line of output.split('\n')) {
    const entry = line.match(/Compiling entry function '(\w+)' for 'sm_(\w+)'/)
    if (entry) {
      current = { name: entry[1], arch: entry[2], registers: 0, shared: 0, stack: 0, spill: 0 }
      found.push(current)
    }
    if (!current) continue
    const frame = line.match(/(\d+) bytes stack frame, (\d+) bytes spill stores/)
    if (frame) {
      current.stack = Number(frame[1])
      current.spill = Number(frame[2])
    }
    const used = line.match(/Used (\d+) registers/)
    if (used) {
      current.registers = Number(used[1])
      current.shared = Number(line.match(/(\d+) bytes smem/)?.[1] ?? 0)
    }
  }
  return found
}

function resourcesOf({ stamp }) {
  return JSON.parse(readFileSync(stamp, 'utf8')).resources
}

/** Writes one line per kernel: registers on each architecture, and spilled bytes and stack frame if not zero. */
function writeReport(modules, version) {
  const lines = [
    `Registers per thread of each kernel by architecture (CUDA ${version}), bytes of static shared memory, and bytes of register spills.`,
    `Written by scripts/build-fatbins.mjs.`,
    '',
    ['kernel'.padEnd(52), ...published.map(arch => `sm_${arch}`.padStart(7)), ' shared', '  spilled'].join(''),
  ]
  for (const module of modules) {
    const byKernel = groupByName(resourcesOf(module))
    for (const [name, uses] of [...byKernel].sort(([a], [b]) => (a < b ? -1 : 1))) {
      const registers = published.map(arch => uses.find(use => use.arch === arch)?.registers ?? '-')
      const spills = uses.filter(({ spill }) => spill > 0).map(({ arch, spill }) => `sm_${arch}: ${spill} bytes`)
      const columns = [
        name.padEnd(52),
        ...registers.map(count => String(count).padStart(7)),
        String(uses[0].shared).padStart(7),
      ]
      lines.push(`${columns.join('')}  ${spills.join(', ') || 'none'}`)
    }
  }
  writeFileSync(report, `${lines.join('\n')}\n`)
}

function groupByName(uses) {
  const groups = new Map()
  for (const use of uses) groups.set(use.name, [...(groups.get(use.name) ?? []), use])
  return groups
}

function check(modules) {
  const manifest = join(outDir, 'manifest.json')
  const { cuda, architectures } = existsSync(manifest) ? JSON.parse(readFileSync(manifest, 'utf8')) : {}
  const missing = modules.filter(module => !isFresh(module, options.published ? keyOf(cuda, published) : undefined))
  if (missing.length > 0)
    fail(`not up to date: ${missing.map(({ name }) => name).join(', ')}; run node scripts/build-fatbins.mjs`)
  const built = modules.filter(({ stamp }) => existsSync(stamp))
  const spills = built.flatMap(resourcesOf).filter(({ spill }) => spill > 0)
  for (const { name, arch, spill } of spills) fail(`${name} spills ${spill} bytes on sm_${arch}`)
  const bytes = modules.reduce((sum, { file }) => sum + (existsSync(file) ? statSync(file).size : 0), 0)
  const isText = architectures?.length === 0
  if (!isText && bytes > mostBytes) fail(`the kernels have ${bytes} bytes, but the limit is ${mostBytes}`)
  if (process.exitCode === undefined) say(`${modules.length} fatbins up to date, ${(bytes / 1e6).toFixed(1)} MB`)
}

function removeStrays(modules) {
  const known = new Set(modules.flatMap(({ file, stamp }) => [basename(file), basename(stamp)]))
  for (const name of readdirSync(outDir)) if (!known.has(name) && name !== 'manifest.json') rmSync(join(outDir, name))
}
