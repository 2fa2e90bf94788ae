// pnpm check [--skip-tests] [STEP ...]: everything that a commit must pass, with one line per step. A step that fails prints its full
// output, and the others still run. The exit code is 1 if any step failed.
import { spawn } from 'node:child_process'

interface Step {
  name: string
  what: string
  command: [program: string, ...args: string[]]
}

const node = process.execPath
const steps: Step[] = [
  { name: 'format', what: 'biome format, sorted imports', command: ['biome', 'check', '--linter-enabled=false', '.'] },
  { name: 'lint', what: 'biome lint', command: ['biome', 'lint', '--error-on-warnings', '.'] },
  {
    name: 'edges',
    what: 'package edges and circular imports',
    command: ['depcruise', '--config', 'dependency-cruiser.config.mjs', 'packages', 'examples', 'bench'],
  },
  {
    name: 'typecheck',
    what: 'tsc over the whole workspace',
    command: ['tsc', '-p', 'tsconfig.json', '--pretty', 'false'],
  },
  {
    name: 'unused',
    what: 'knip: unused files, exports, dependencies',
    command: ['knip', '--no-progress', '--no-config-hints'],
  },
  { name: 'docs', what: 'documentation snippets', command: [node, 'scripts/doc-snippets.ts'] },
  {
    name: 'api',
    what: 'API reference: docstrings, exported types, links',
    command: [node, 'tools/docs/check.ts'],
  },
  {
    name: 'build',
    what: 'tsup: ESM and declarations',
    command: ['turbo', 'run', 'build', '--output-logs=errors-only'],
  },
  { name: 'pack', what: 'packages as npm installs them', command: [node, 'scripts/pack-check.ts'] },
  { name: 'test', what: 'vitest', command: [node, 'scripts/bootstrap.mjs', 'test'] },
]

const args = process.argv.slice(2)
const names = args.filter(arg => !arg.startsWith('-'))
const unknown = [
  ...names.filter(name => !steps.some(step => step.name === name)),
  ...args.filter(arg => arg.startsWith('-') && arg !== '--skip-tests'),
]
if (unknown.length > 0) {
  console.error(`check: unknown step or option ${unknown.join(', ')}\n\nusage: pnpm check [--skip-tests] [STEP ...]\n`)
  for (const { name, what } of steps) console.error(`  ${name.padEnd(10)} ${what}`)
  process.exit(2)
}

const failed: string[] = []
for (const step of steps) {
  if (names.length > 0 ? !names.includes(step.name) : step.name === 'test' && args.includes('--skip-tests')) continue
  const started = performance.now()
  const { code, output } = await run(step)
  const took = `${((performance.now() - started) / 1000).toFixed(1)} s`
  console.log(`${code === 0 ? 'ok  ' : 'FAIL'} ${step.name.padEnd(10)} ${took.padStart(7)}  ${step.what}`)
  if (code === 0) continue
  failed.push(step.name)
  process.stdout.write(`${output.trimEnd()}\n\n`)
}
if (failed.length > 0) {
  console.log(`check: ${failed.join(', ')} failed; to repeat them, run: pnpm check ${failed.join(' ')}`)
  process.exitCode = 1
}

function run(step: Step): Promise<{ code: number; output: string }> {
  return new Promise((resolve, reject) => {
    const [program, ...rest] = step.command
    // On Windows, commands of packages are .cmd files, which need a shell. Node's path may contain spaces, which a shell would split.
    const shell = process.platform === 'win32' && program !== node
    const child = spawn(program, rest, { stdio: ['ignore', 'pipe', 'pipe'], shell })
    let output = ''
    const collect = (chunk: Buffer) => {
      output += chunk
    }
    child.stdout.on('data', collect)
    child.stderr.on('data', collect)
    child.on('error', reject)
    child.on('close', code => resolve({ code: code ?? 1, output }))
  })
}
