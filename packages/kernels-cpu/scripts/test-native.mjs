// Builds the library with sanitizers or with emulated AVX-512 and runs this package's tests on it (Linux, g++; takes minutes).
//
//   node scripts/test-native.mjs [--sanitize[=address,undefined]] [--emulated] [--isa=avx2,baseline] [files or options for vitest]
//
// --sanitize: uses the address and undefined-behaviour sanitizers, or those named.
// --emulated: emulates AVX-512 with AVX2, for machines without it, and runs all tests once for each AVX-512 instruction set.
// --isa: the instruction sets to run on, one after another. Tests that cover all instruction sets also run on the lower ones.
// To run tests of other packages: `--project=examples same-losses`.
import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { buildTarget } from './objects.mjs'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const top = dirname(dirname(root))
const compiler = process.env.CXX ?? 'g++'
const { sanitize, emulated, levels, forVitest } = parseArguments(process.argv.slice(2))

// Excluded with sanitizers: loading several copies of the library into one process, and C++ exceptions on koffi's own stack, which the
// address sanitizer does not know about and reports as an overflow.
const exclude = sanitize ? ['--exclude', '**/load.test.ts', '--testNamePattern', '^(?!.*an expert out of range)'] : []
const project = forVitest.some(arg => arg.startsWith('--project')) ? [] : ['--project=kernels-cpu']

run(process.execPath, [
  join(root, 'scripts', 'build-native.mjs'),
  ...(sanitize ? [`--sanitize=${sanitize}`] : []),
  ...(emulated ? ['--emulated'] : []),
])
const vitest = join(top, 'node_modules', 'vitest', 'vitest.mjs')
// Tests run on the workspace's Node, which may be newer than the one that runs this script.
const installed = join(top, 'node_modules', 'node', 'bin', 'node')
const node = existsSync(installed) ? installed : process.execPath
for (const isa of levels) {
  console.log(
    `kernels-cpu: tests on ${buildTarget({ sanitize, emulated })}, ${isa || 'best instruction set of this machine'}`,
  )
  run(node, [vitest, 'run', ...project, ...exclude, ...forVitest], {
    MOE_CPU_LIBRARY: join(root, 'build', buildTarget({ sanitize, emulated })),
    MOE_CPU_ISA: isa,
    ...(sanitize ? sanitizerVariables() : {}),
  })
}

function parseArguments(args) {
  const parsed = { sanitize: '', emulated: false, levels: undefined, forVitest: [] }
  for (const arg of args) {
    if (arg === '--sanitize') parsed.sanitize = 'address,undefined'
    else if (arg.startsWith('--sanitize=')) parsed.sanitize = arg.slice(11)
    else if (arg === '--emulated') parsed.emulated = true
    else if (arg.startsWith('--isa=')) parsed.levels = arg.slice(6).split(',')
    else parsed.forVitest.push(arg)
  }
  if (!parsed.sanitize && !parsed.emulated) {
    console.error(
      'kernels-cpu: pass --sanitize or --emulated; options are described at the top of scripts/test-native.mjs',
    )
    process.exit(2)
  }
  return { ...parsed, levels: parsed.levels ?? (parsed.emulated ? ['avx512', 'avx512vnni', 'avx512bf16'] : ['']) }
}

/** The sanitizers' libraries must be loaded first, because Node is not linked against them. */
function sanitizerVariables() {
  const libraries = ['libasan.so', 'libubsan.so'].map(name => output(compiler, [`-print-file-name=${name}`]))
  return {
    LD_PRELOAD: libraries.join(' '),
    ASAN_OPTIONS: 'detect_leaks=0',
    UBSAN_OPTIONS: 'print_stacktrace=1',
  }
}

function run(command, args, variables = {}) {
  const { status } = spawnSync(command, args, { cwd: top, stdio: 'inherit', env: { ...process.env, ...variables } })
  if (status !== 0) process.exit(status ?? 1)
}

function output(command, args) {
  return spawnSync(command, args, { encoding: 'utf8' }).stdout.trim()
}
