#!/usr/bin/env node
// Entry point of the npm scripts (`npm start`, `npm test`). It sets up what is missing (setup.mjs) and then runs the command with the
// workspace's own Node. Plain JavaScript without dependencies, because it runs on the installed Node (20 or later) before anything else is.
import { existsSync, mkdirSync } from 'node:fs'
import { join } from 'node:path'
import { runInPlace } from './run-in-place.mjs'
import { root, setUp } from './setup.mjs'

const commands = {
  /** The quickstart: trains a small model on real text. If the native build fails, it falls back to wasm. */
  start: args => ({
    script: 'examples/quickstart.ts',
    args,
    ownGroup: true,
    nativeRequired: false,
    allVariants: false,
  }),
  /** Generates text with a trained model. */
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
  /** Serves a model through an OpenAI-compatible API. */
  serve: args => ({
    script: 'packages/server/src/cli.ts',
    args,
    ownGroup: true,
    nativeRequired: false,
    allVariants: false,
  }),
  /** Chats with a model in the terminal. */
  chat: args => commands.serve(['--chat', ...args]),
  /** Evaluates a model. */
  evaluate: args => ({
    script: 'packages/evaluation/src/cli.ts',
    args,
    ownGroup: true,
    nativeRequired: false,
    allVariants: false,
  }),
  /** Serves a web page in which a model generates text. */
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
  /** Builds the documentation site; needs no kernels. */
  docs: args => ({ script: 'tools/docs/build.ts', args, native: false }),
  check: args => ({ script: 'scripts/check.ts', args }),
  setup: () => undefined,
}

/** Unless the caller chose reporters: the default one for people, and JSON for `.ci/run` and other programs. */
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
// npm removes the `--`; pnpm passes it on.
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
