// Builds the native library into build/<platform>-<arch>/, one file per instruction set, when sources changed. Plain Node >= 20.
//
//   node scripts/build-native.mjs [--force] [--verbose] [--keep-going] [--sanitize=address,undefined] [--emulated]
//                                 [--isa=avx2,avx512 | --here]
//
// --here: only what this machine uses (or MOE_CPU_ISA allows), a quarter of the work.
// --emulated: AVX-512 is computed with AVX2 (emulated/avx512.h), for tests on machines without it.
// Libraries that are sanitized or emulated have a folder of their own.
//
// Every source is compiled once per variant named in its first lines (`// moe-isa: baseline avx2 avx512`, which is also the
// default). The library of a level links, of each source, the best variant that the level can run. One library per level, rather
// than one with all levels, because the linker would merge inline functions of different levels.
import { existsSync, mkdirSync, readdirSync, readFileSync } from 'node:fs'
import { dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import { buildTarget, findCompiler, hash, lock, objectBuilder } from './objects.mjs'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const options = parseArguments(process.argv.slice(2))
const target = buildTarget(options)
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

// Instead of the flags of AVX-512. With -O2, because the compiler takes its time over vectors that no register holds.
const emulated = [...levels.x64.avx2, '-O2', '-include', join(root, 'emulated', 'avx512.h')]

const builder = objectBuilder(root, { ...options, say })

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
    const wanted = options.isa ?? (options.here ? [ofThisMachine(ladder)] : ladder)
    const sources = findSources()
    const objects = sources.flatMap(source =>
      source.variants.filter(isa => ladder.includes(isa)).map(isa => describe(source, isa, compiler)),
    )
    const needed = objects.filter(object => wanted.some(isa => objectsOf(isa, ladder, objects).includes(object)))
    const stale = needed.filter(object => !builder.isFresh(object))
    const failed = await builder.compileAll(stale, compiler)
    if (failed.length > 0 && !options.keepGoing) return fail(failed)
    let linked = 0
    for (const isa of wanted)
      linked += link(
        isa,
        objectsOf(isa, ladder, needed).filter(({ file }) => existsSync(file)),
        compiler,
      )
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
  }
  for (const arg of args) {
    if (arg === '--force') parsed.force = true
    else if (arg === '--verbose') parsed.verbose = true
    else if (arg === '--keep-going') parsed.keepGoing = true
    else if (arg === '--here') parsed.here = true
    else if (arg === '--emulated') parsed.emulated = true
    else if (arg.startsWith('--sanitize=')) parsed.sanitize = arg.slice(11)
    else if (arg.startsWith('--isa=')) parsed.isa = arg.slice(6).split(',')
    else {
      console.error(`kernels-cpu: unknown option ${arg}; see the head of scripts/build-native.mjs`)
      process.exit(2)
    }
  }
  return parsed
}

/** The highest level that this machine runs, as moe_cpu_isa() finds it; the lowest where the system does not tell. */
function ofThisMachine(ladder) {
  const file = '/proc/cpuinfo'
  const flags = new Set(
    existsSync(file) ? /^flags\s*:(.*)$/m.exec(readFileSync(file, 'utf8'))?.[1].trim().split(/\s+/) : [],
  )
  const has = (...names) => names.every(name => flags.has(name))
  const runs = {
    baseline: true,
    avx2: has('avx2', 'fma', 'bmi2'),
    avx512: has('avx512f', 'avx512bw', 'avx512dq', 'avx512vl'),
    avx512bf16: has('avx512f', 'avx512bw', 'avx512dq', 'avx512vl', 'avx512_bf16', 'avx512_vnni'),
  }
  const most = ladder.includes(process.env.MOE_CPU_ISA) ? ladder.indexOf(process.env.MOE_CPU_ISA) : ladder.length - 1
  return ladder.slice(0, most + 1).findLast(level => runs[level])
}

function say(line) {
  console.log(`kernels-cpu: ${line}`)
}

function fail(failed) {
  for (const { label, output } of failed) console.error(`kernels-cpu: ${label} does not compile\n${output}`)
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
  flags.push(...(options.emulated && isa.startsWith('avx512') ? emulated : levels[process.arch][isa]))
  // The CPU does not say that it has it.
  if (options.emulated) flags.push(`-DMOE_EMULATED_ISA="${Object.keys(levels[process.arch]).at(-1)}"`)
  flags.push(`-DMOE_ISA_${isa.toUpperCase()}=1`)
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
    key: hash([compiler.command, compiler.version, ...flags].join('\n').replaceAll(root, '.')),
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

function link(isa, objects, compiler) {
  const library = join(outDir, `moe-cpu-${isa}.${extension}`)
  const flags = []
  // Helper threads run code of the library, so it may never be unmapped.
  if (process.platform === 'linux') flags.push('-pthread', '-Wl,-z,nodelete', '-Wl,-z,defs', '-static-libgcc')
  if (options.sanitize) flags.push(`-fsanitize=${options.sanitize}`, '-Wl,-z,undefs')
  return builder.link(library, join(objDir, `moe-cpu-${isa}.link`), objects, compiler, flags)
}
