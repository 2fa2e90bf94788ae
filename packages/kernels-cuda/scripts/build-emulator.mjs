// Builds build/emulator/: libmoe-cuda-emulator.so, which replaces the CUDA driver, libmoe-cublas-lt-emulator.so and libmoe-nccl-emulator.so, which replace
// cuBLASLt and NCCL, and one <module>.fatbin per kernel folder (a line of text, which the emulated driver accepts as an image). Plain Node >= 20.
//
//   node scripts/build-emulator.mjs [--ptx[=90a]] [--force] [--verbose] [--keep-going] [--only=op,op]
//
// Kernels (src/kernels/*/*.cu, emulator/tests/*.cu) are compiled as C++ with the hooks of the thread sanitizer, which the runtime (emulator/*.cc)
// implements. --keep-going links what compiles, and keeps the last good object of what does not. --only compiles only these folders and links
// them with the existing objects.
//
// --ptx builds build/emulator-ptx/ instead, from kernels that nvcc has compiled to PTX for this architecture and ptx/translate.mjs has translated. Needs nvcc.
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { basename, dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import { findCompiler, hash, lock, objectBuilder } from '../../kernels-cpu/scripts/objects.mjs'
import { translateSources } from './ptx/sources.mjs'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const options = parseArguments(process.argv.slice(2))
const outDir = join(root, 'build', options.ptx ? 'emulator-ptx' : 'emulator')
const objDir = join(outDir, 'obj')
const ptxDir = join(outDir, 'ptx')
const driver = join(outDir, 'libmoe-cuda-emulator.so')
/** Libraries other than the driver, by their source. */
const libraries = { 'cublas-lt.cc': 'libmoe-cublas-lt-emulator.so', 'nccl.cc': 'libmoe-nccl-emulator.so' }

const common = [
  '-std=c++17',
  '-O2',
  '-fPIC',
  '-fvisibility=hidden',
  '-fno-math-errno',
  '-fno-trapping-math',
  '-fno-exceptions',
  '-fno-rtti',
]
const architecture = process.arch === 'x64' && hasAvx2() ? ['-march=x86-64-v3'] : []
const runtimeFlags = [
  ...common,
  ...architecture,
  '-Wall',
  '-Wextra',
  '-Wno-psabi',
  '-g1',
  `-I${join(root, 'emulator')}`,
]
const kernelFlags = [
  ...common,
  ...architecture,
  '-ffp-contract=fast',
  '-fno-strict-aliasing',
  '-DMOE_EMULATOR',
  // The hooks; line tables let faults report source lines.
  '-g1',
  '-fsanitize=thread,alignment,integer-divide-by-zero',
  '-Wall',
  '-Wno-unknown-pragmas',
  '-Wno-sign-compare',
  '-Wno-array-bounds',
  '-Wno-unused-variable',
  '-Wno-unused-function',
  '-Wno-psabi',
  `-I${join(root, 'device')}`,
  `-I${join(root, 'emulator')}`,
]
/** For translated kernels, which call the hooks themselves. Functions may have thousands of variables, for which more optimization does not pay. */
const translatedFlags = [
  ...common.map(flag => (flag === '-O2' ? '-O1' : flag)),
  ...architecture,
  '-ffp-contract=off',
  '-fno-strict-aliasing',
  '-fwrapv',
  '-g1',
  '-w',
  `-I${join(root, 'emulator')}`,
]
/** By compiler: check indices, and insert no calls at the start and end of functions. */
const kernelFlagsOf = {
  clang: [
    '-fsanitize=array-bounds',
    '-mllvm',
    '-tsan-instrument-func-entry-exit=0',
    '-Wno-unused-command-line-argument',
  ],
  gcc: ['-fsanitize=bounds', '--param', 'tsan-instrument-func-entry-exit=0'],
}

const builder = objectBuilder(root, { ...options, say })

await main()

async function main() {
  const started = Date.now()
  if (process.platform !== 'linux') return say(`not built: the emulator does not support ${process.platform}`)
  const compiler = findCompiler()
  if (!compiler)
    return say('not built: found no C++ compiler (tried $CXX, g++, c++ and clang++); install one and try again')
  mkdirSync(objDir, { recursive: true })
  const unlock = await lock(join(outDir, 'lock'))
  try {
    const { sources, failed: untranslated } = await translateSources(findSources(), { root, ptxDir, ...options })
    if (untranslated.length > 0) return fail(untranslated)
    const objects = sources.map(source => describe(source, compiler))
    const wanted = objects.filter(({ module }) => !options.only || !module || options.only.includes(module))
    const stale = wanted.filter(object => !builder.isFresh(object))
    const failed = await builder.compileAll(stale, compiler)
    if (failed.length > 0 && !options.keepGoing) return fail(failed)
    const linked = link(
      objects.filter(({ file }) => existsSync(file)),
      compiler,
    )
    writeModules(objects)
    builder.removeStrays(objDir, objects)
    const seconds = ((Date.now() - started) / 1000).toFixed(1)
    const what =
      stale.length + linked === 0 ? 'up to date' : `${stale.length - failed.length} objects compiled in ${seconds} s`
    say(`${relative(process.cwd(), outDir)} ${what} (${compiler.version})`)
    if (failed.length > 0) fail(failed)
  } finally {
    unlock()
  }
}

function parseArguments(args) {
  const parsed = { force: false, verbose: false, keepGoing: false, only: undefined, ptx: undefined }
  for (const arg of args) {
    if (arg === '--force') parsed.force = true
    else if (arg === '--verbose') parsed.verbose = true
    else if (arg === '--keep-going') parsed.keepGoing = true
    else if (arg.startsWith('--only=')) parsed.only = arg.slice(7).split(',')
    else if (arg === '--ptx') parsed.ptx = '90a'
    else if (/^--ptx=\d+a?$/.test(arg)) parsed.ptx = arg.slice(6)
    else {
      console.error(
        `kernels-cuda: unknown option ${arg}; options are described at the top of scripts/build-emulator.mjs`,
      )
      process.exit(2)
    }
  }
  return parsed
}

function hasAvx2() {
  return existsSync('/proc/cpuinfo') && /^flags\s.*\bavx2\b/m.test(readFileSync('/proc/cpuinfo', 'utf8'))
}

function say(line) {
  console.log(`kernels-cuda: ${line}`)
}

function fail(failed) {
  for (const { label, output } of failed) console.error(`kernels-cuda: ${label} failed to compile\n${output}`)
  process.exitCode = 1
}

/** Sources, each with its module; runtime sources have none. */
function findSources() {
  const emulator = join(root, 'emulator')
  const kernels = join(root, 'src', 'kernels')
  const list = (folder, ending) =>
    existsSync(folder)
      ? readdirSync(folder)
          .filter(name => name.endsWith(ending))
          .sort()
          .map(name => join(folder, name))
      : []
  const sources = list(emulator, '.cc').map(file => ({ file }))
  for (const ending of ['.cu', '.ptx'])
    for (const file of list(join(emulator, 'tests'), ending)) sources.push({ file, module: 'emulator-tests' })
  if (existsSync(kernels)) {
    for (const entry of readdirSync(kernels, { withFileTypes: true }))
      if (entry.isDirectory())
        for (const file of list(join(kernels, entry.name), '.cu')) sources.push({ file, module: entry.name })
  }
  return sources
}

function describe({ file: source, module, translated }, compiler) {
  const name = translated ? basename(source) : relative(root, source).replaceAll(/[/\\]/g, '-')
  const ofKernel = [...kernelFlags, ...kernelFlagsOf[compiler.version.includes('clang') ? 'clang' : 'gcc']]
  const flags = translated
    ? translatedFlags
    : module
      ? [...ofKernel, `-DMOE_MODULE="${module}"`, '-x', 'c++']
      : runtimeFlags
  return {
    source,
    module,
    flags,
    label: relative(root, source),
    file: join(objDir, `${name}.o`),
    stamp: join(objDir, `${name}.json`),
    key: hash([compiler.command, compiler.version, ...flags].join('\n').replaceAll(root, '.')),
  }
}

function link(objects, compiler) {
  // No -fsanitize here, because the runtime implements the hooks. Signal handlers and faults refer to the library, so it must never be unmapped.
  const flags = ['-pthread', '-ldl', '-lm', '-Wl,-z,nodelete', '-Wl,-z,defs', '-Wl,-Bsymbolic', '-static-libgcc']
  const runtime = objects.filter(({ source }) => !(basename(source) in libraries))
  let linked = builder.link(driver, join(objDir, 'library.link'), runtime, compiler, flags)
  for (const [name, library] of Object.entries(libraries)) {
    const own = objects.filter(({ source }) => basename(source) === name)
    // They use the loaded driver library, which is in the same folder.
    const withDriver = [`-L${outDir}`, '-l:libmoe-cuda-emulator.so', '-Wl,-rpath,$ORIGIN', ...flags]
    linked += builder.link(
      join(outDir, library),
      join(objDir, `${basename(name, '.cc')}.link`),
      own,
      compiler,
      withDriver,
    )
  }
  return linked
}

/** Writes the images for cuModuleLoadData, which replace fatbins: one line with the module's name. */
function writeModules(objects) {
  const modules = new Set(objects.filter(({ module, file }) => module && existsSync(file)).map(({ module }) => module))
  for (const module of modules) {
    const file = join(outDir, `${module}.fatbin`)
    if (!existsSync(file)) writeFileSync(file, `moe-emulated-module ${module}\n`)
  }
  writeFileSync(join(outDir, 'manifest.json'), '{ "cuda": "13.0" }\n')
  for (const name of readdirSync(outDir))
    if (name.endsWith('.fatbin') && !modules.has(name.slice(0, -7))) rmSync(join(outDir, name))
}
