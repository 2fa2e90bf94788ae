// Builds the library with the address and undefined-behaviour sanitizers and runs this package's tests on it (Linux, g++, minutes).
//
//   node scripts/test-sanitized.mjs [files or options for vitest]
import { spawnSync } from 'node:child_process'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const top = dirname(dirname(root))
const compiler = process.env.CXX ?? 'g++'

// Tests that cannot run so: several copies of the library in one process, and a C++ exception on koffi's own stack, which the
// address sanitizer does not know and takes for an overflow.
const exclude = ['--exclude', '**/load.test.ts', '--testNamePattern', '^(?!.*an expert that does not exist)']

run(process.execPath, [join(root, 'scripts', 'build-native.mjs'), '--sanitize=address,undefined'])
const libraries = ['libasan.so', 'libubsan.so'].map(name => output(compiler, [`-print-file-name=${name}`]))
const vitest = join(top, 'node_modules', 'vitest', 'vitest.mjs')
run(process.execPath, [vitest, 'run', '--project', 'kernels-cpu', ...exclude, ...process.argv.slice(2)], {
  MOE_CPU_LIBRARY: join(root, 'build', `${process.platform}-${process.arch}-sanitize`),
  LD_PRELOAD: libraries.join(' '),
  ASAN_OPTIONS: 'detect_leaks=0',
  UBSAN_OPTIONS: 'print_stacktrace=1',
})

function run(command, args, variables = {}) {
  const { status } = spawnSync(command, args, { cwd: top, stdio: 'inherit', env: { ...process.env, ...variables } })
  if (status !== 0) process.exit(status ?? 1)
}

function output(command, args) {
  return spawnSync(command, args, { encoding: 'utf8' }).stdout.trim()
}
