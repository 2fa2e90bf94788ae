// Builds the native library, one file per instruction set, if its sources changed. Plain Node >= 20.
//
//   node scripts/build-native.mjs [--force] [--verbose] [--keep-going] [--sanitize=address,undefined] [--emulated]
//                                 [--isa=avx2,avx512 | --here] [--platforms[=linux-arm64,win32-x64]]
//
// By default it builds for this machine, into build/<platform>-<arch>/, with the local compiler.
// --here: only the instruction set that this machine uses (or MOE_CPU_ISA allows), a quarter of the work.
// --platforms: what is published, into npm/<platform>/ (all platforms or those named), cross-compiled with Zig.
// --emulated: AVX-512 is emulated with AVX2 (emulated/avx512.h), for tests on machines without it.
// Sanitized and emulated libraries are written to folders of their own.
//
// Every source is compiled once per variant listed in its first lines (`// moe-isa: baseline avx2 avx512`, which is also the default). The
// library of an instruction set links, of each source, the best variant that it can run. There is one library per instruction set rather
// than one for all, because the linker would merge inline functions of different variants.
import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, readdirSync, readFileSync } from 'node:fs'
import { cpus } from 'node:os'
import { dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import { levels, libraryName, platforms } from '../src/platforms.mjs'
import { buildTarget, findCompiler, hash, lock, objectBuilder } from './objects.mjs'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const options = parseArguments(process.argv.slice(2))
/** Helper threads run the library's code, so it must never be unmapped. */
const linuxFlags = ['-Wl,-z,nodelete', '-Wl,-z,defs']
const builder = objectBuilder(root, { ...options, say })

await main()

async function main() {
  if (!options.platforms) return build(forThisMachine())
  for (const name of options.platforms) {
    await build(forPlatform(name))
    if (process.exitCode) return
  }
}

/**
 * What to build. `ladder`: the architecture's instruction sets, lowest first. `wanted`: those that get a library. `flagsOf` and `linkFlags`: compiler
 * and linker flags for each. `outDir` and `objDir`: the folders of the libraries and of the objects.
 */
function forThisMachine() {
  const target = buildTarget(options)
  const ladder = Object.keys(levels[process.arch] ?? {})
  const outDir = join(root, 'build', target)
  const linux = [...linuxFlags, '-pthread', '-static-libgcc']
  // MinGW's libraries are not available where the DLL is used.
  const linkFlags = { linux, win32: ['-static'] }[process.platform] ?? []
  return {
    target,
    os: process.platform,
    ladder,
    wanted: options.isa ?? (options.here ? [ofThisMachine(ladder)] : ladder),
    flagsOf: isa => flagsHere(levels[process.arch][isa].flags, isa, ladder.at(-1)),
    linkFlags: () => (options.sanitize ? [...linkFlags, `-fsanitize=${options.sanitize}`, '-Wl,-z,undefs'] : linkFlags),
    outDir,
    objDir: join(outDir, 'obj'),
    compiler: findCompiler(),
    missing: 'found no C++ compiler (tried $CXX, g++, c++ and clang++); install one and try again',
  }
}

function forPlatform(name) {
  const { target, os, cpu, isas, zig = 'generic' } = platforms[name]
  const ladder = Object.keys(levels[cpu])
  const objDir = join(root, 'build', 'platforms', name)
  const platformFlags = {
    linux: () => linuxFlags,
    // Otherwise the library would contain its path on the build machine.
    darwin: isa => [`-Wl,-install_name,@rpath/${libraryName(isa, os)}`],
    // Keeps the import library, which nobody needs, out of the output folder.
    win32: () => [`-Wl,--out-implib,${join(objDir, 'import.link')}`],
  }
  return {
    target: name,
    os,
    ladder,
    wanted: options.isa ?? isas ?? ladder,
    flagsOf: isa => ['-target', target, `-mcpu=${levels[cpu][isa].zig.replace('generic', zig)}`],
    linkFlags: isa => ['-target', target, '-s', ...platformFlags[os](isa)],
    outDir: join(root, 'npm', name),
    objDir,
    compiler: findCompiler([[process.env.ZIG || 'zig', 'c++']]),
    missing: 'found no Zig (tried $ZIG and zig); install it from https://ziglang.org/download and try again',
  }
}

async function build({ target, os, ladder, wanted, flagsOf, linkFlags, outDir, objDir, compiler, missing }) {
  const started = Date.now()
  if (ladder.length === 0) return say(`not built: ${target} is not supported yet`)
  if (!compiler) {
    // Users without the library fall back to another backend, but a release must have it.
    if (options.platforms) process.exitCode = 1
    return say(`not built: ${missing}`)
  }
  mkdirSync(objDir, { recursive: true })
  const unlock = await lock(`${objDir}.lock`)
  try {
    const objects = findSources().flatMap(source =>
      source.variants
        .filter(isa => ladder.includes(isa))
        .map(isa => describe(source, isa, flagsOf(isa), objDir, compiler)),
    )
    const needed = objects.filter(object => wanted.some(isa => objectsOf(isa, ladder, objects).includes(object)))
    const stale = needed.filter(object => !builder.isFresh(object))
    const failed = await builder.compileAll(stale, compiler)
    if (failed.length > 0 && !options.keepGoing) return fail(failed)
    let linked = 0
    for (const isa of wanted) {
      const parts = objectsOf(isa, ladder, needed).filter(({ file }) => existsSync(file))
      const stamp = join(objDir, `moe-cpu-${isa}.link`)
      linked += builder.link(join(outDir, libraryName(isa, os)), stamp, parts, compiler, linkFlags(isa))
    }
    builder.removeStrays(objDir, objects)
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
  const parsed = {
    force: false,
    verbose: false,
    keepGoing: false,
    sanitize: '',
    emulated: false,
    isa: undefined,
    here: false,
    platforms: undefined,
  }
  for (const arg of args) {
    if (arg === '--force') parsed.force = true
    else if (arg === '--verbose') parsed.verbose = true
    else if (arg === '--keep-going') parsed.keepGoing = true
    else if (arg === '--here') parsed.here = true
    else if (arg === '--emulated') parsed.emulated = true
    else if (arg.startsWith('--sanitize=')) parsed.sanitize = arg.slice(11)
    else if (arg.startsWith('--isa=')) parsed.isa = arg.slice(6).split(',')
    else if (arg === '--platforms') parsed.platforms = Object.keys(platforms)
    else if (arg.startsWith('--platforms=')) parsed.platforms = arg.slice(12).split(',').map(platformNamed)
    else {
      console.error(`kernels-cpu: unknown option ${arg}; options are described at the top of scripts/build-native.mjs`)
      process.exit(2)
    }
  }
  return parsed
}

function platformNamed(name) {
  if (name in platforms) return name
  console.error(`kernels-cpu: unknown platform ${name}; expected ${Object.keys(platforms).join(', ')}`)
  process.exit(2)
}

/** The fastest instruction set of this machine, as moe_fastest_isa() determines it; the lowest if the system does not report features. */
function ofThisMachine(ladder) {
  const features = featuresOfThisMachine()
  const has = (...names) => names.every(name => features.has(name))
  const avx512 = has('avx512f', 'avx512bw', 'avx512dq', 'avx512vl')
  const runs = {
    baseline: true,
    avx2: has('avx2', 'fma', 'bmi2'),
    avx512,
    avx512vnni: avx512 && has('avx512_vnni'),
    avx512bf16: avx512 && has('avx512_vnni', 'avx512_bf16') && !cpus()[0]?.model.startsWith('Intel'),
    dotprod: has('asimddp'),
    bf16: has('asimddp', 'bf16', 'i8mm'),
  }
  const most = ladder.includes(process.env.MOE_CPU_ISA) ? ladder.indexOf(process.env.MOE_CPU_ISA) : ladder.length - 1
  return ladder.slice(0, most + 1).findLast(level => runs[level])
}

/** CPU features, by their Linux names. */
function featuresOfThisMachine() {
  if (process.platform === 'darwin') {
    const { stdout } = spawnSync('sysctl', ['hw.optional.arm'], { encoding: 'utf8' })
    const found = Array.from(stdout?.matchAll(/FEAT_(\w+): 1$/gm) ?? [], ([, name]) => name.toLowerCase())
    return new Set(found.map(name => (name === 'dotprod' ? 'asimddp' : name)))
  }
  const file = '/proc/cpuinfo'
  const line = existsSync(file) ? /^(?:flags|Features)\s*:(.*)$/m.exec(readFileSync(file, 'utf8'))?.[1] : undefined
  return new Set(line?.trim().split(/\s+/))
}

function say(line) {
  console.log(`kernels-cpu: ${line}`)
}

function fail(failed) {
  for (const { label, output } of failed) console.error(`kernels-cpu: ${label} failed to compile\n${output}`)
  process.exitCode = 1
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

function flagsHere(flags, isa, highest) {
  const own = options.emulated && isa.startsWith('avx512') ? emulated() : [...flags]
  // The CPU's features do not include it.
  if (options.emulated) own.push(`-DMOE_EMULATED_ISA="${highest}"`)
  if (options.sanitize)
    own.push(`-fsanitize=${options.sanitize}`, '-fno-omit-frame-pointer', '-fno-sanitize-recover=all', '-g', '-O1')
  return own
}

/** Replaces the AVX-512 flags. Uses -O2, because the compiler is slow on vectors that fit no register. */
function emulated() {
  return [...levels.x64.avx2.flags, '-O2', '-include', join(root, 'emulated', 'avx512.h')]
}

function describe({ file, variants }, isa, own, objDir, compiler) {
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
    '-Wno-ignored-attributes',
    '-Wno-uninitialized',
    '-Wno-maybe-uninitialized',
    '-fno-math-errno',
    '-fno-trapping-math',
    '-ffp-contract=fast',
    `-I${join(root, 'native')}`,
    ...own,
    `-DMOE_ISA_${isa.toUpperCase()}=1`,
  ]
  // A warning that only g++ knows.
  if (compiler.version.includes('clang')) flags.push('-Wno-unknown-warning-option')
  return {
    source: file,
    variants,
    isa,
    flags,
    label: `${relative(root, file)} [${isa}]`,
    file: join(objDir, `${name}-${isa}.o`),
    stamp: join(objDir, `${name}-${isa}.json`),
    key: hash([compiler.command, compiler.version, ...flags].join('\n').replaceAll(root, '.')),
  }
}

/** The best variant of every source that an instruction set can run. */
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
