#!/usr/bin/env node
// The door to the repository on a bare machine: `npm start`, `npm test`. Plain JavaScript without dependencies, because it
// runs on whatever Node (20 or later) is there, before anything is installed. It sets up what is missing (setup.mjs), then runs
// the asked thing on the workspace's own Node.
import { existsSync, mkdirSync } from 'node:fs'
import { join } from 'node:path'
import { runInPlace } from './run-in-place.mjs'
import { root, setUp } from './setup.mjs'

const commands = {
  /** The quickstart: trains a small model on real text. A failed native build is no reason to stop, it falls back to wasm. */
  start: args => ({
    script: 'examples/quickstart.ts',
    args,
    ownGroup: true,
    nativeRequired: false,
    allVariants: false,
  }),
  /** Lets a trained model write. */
  generate: args => ({
    script: 'examples/generate.ts',
    args,
    ownGroup: true,
    nativeRequired: false,
    allVariants: false,
  }),
  /** Shows runs in a browser. */
  watch: args => ({
    script: 'packages/trainer/src/cli.ts',
    args: ['watch', ...args],
    ownGroup: true,
    nativeRequired: false,
    allVariants: false,
  }),
  /** Serves a model by OpenAI's protocol. */
  serve: args => ({
    script: 'packages/server/src/cli.ts',
    args,
    ownGroup: true,
    nativeRequired: false,
    allVariants: false,
  }),
  /** Says what a model is worth. */
  evaluate: args => ({
    script: 'packages/evaluation/src/cli.ts',
    args,
    ownGroup: true,
    nativeRequired: false,
    allVariants: false,
  }),
  /** Serves a page in which a model writes. */
  page: args => ({ script: 'examples/in-a-browser.ts', args, ownGroup: true, native: false }),
  test: args => ({
    script: 'node_modules/vitest/vitest.mjs',
    args: ['run', ...reporters(args), ...args],
    emulator: true,
  }),
  bench: ([name, ...args]) => {
    const script = `bench/${name}.ts`
    const asks = args.some(arg => arg === '--help' || arg === '-h')
    if (!name || !existsSync(script) || asks) return { script: 'scripts/list-benches.ts', args: name ? [name] : [] }
    return { script, args, nodeOptions: ['--expose-gc'], ownGroup: true, allVariants: false }
  },
  /** The documentation's site: TypeScript sources and Markdown, nothing is computed. */
  docs: args => ({ script: 'tools/docs/build.ts', args, native: false }),
  check: args => ({ script: 'scripts/check.ts', args }),
  setup: () => undefined,
}

/** Unless the caller chose reporters: the usual one for people, and JSON for `.ci/run` and other programs. */
function reporters(args) {
  if (args.some(arg => arg.startsWith('--reporter') || arg.startsWith('--outputFile'))) return []
  mkdirSync(join(root, '.cache'), { recursive: true })
  return ['--reporter=default', '--reporter=json', '--outputFile.json=.cache/test-results.json']
}

const [command, ...rest] = process.argv.slice(2)
if (!Object.hasOwn(commands, command ?? '')) {
  console.error(`usage: node scripts/bootstrap.mjs ${Object.keys(commands).join('|')} [arguments]`)
  process.exit(2)
}
// npm takes the `--` away, pnpm hands it on.
if (rest[0] === '--') rest.shift()

process.chdir(root)
const plan = commands[command](rest)
const { native, nativeRequired = true, allVariants, emulator } = plan ?? {}
const node = await setUp({ native, nativeRequired, allVariants, emulator })
if (plan) {
  if (!existsSync(plan.script)) {
    console.error(`${command}: ${plan.script} does not exist in this checkout`)
    process.exit(1)
  }
  const args = [...(plan.nodeOptions ?? []), plan.script, ...plan.args]
  await runInPlace(node, args, { ownGroup: plan.ownGroup ?? false })
}
