// Sets up a checkout: pnpm, dependencies, Node 24, native kernels. A step is skipped if none of its inputs have changed, so a second run
// takes milliseconds. Runs on Node 20 without dependencies.
import { spawn, spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { delimiter, dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

export const root = dirname(dirname(fileURLToPath(import.meta.url)))

const windows = process.platform === 'win32'
const stampFile = join(root, 'node_modules', '.moe-setup')
const buildNative = join(root, 'packages', 'kernels-cpu', 'scripts', 'build-native.mjs')
const buildEmulator = join(root, 'packages', 'kernels-cuda', 'scripts', 'build-emulator.mjs')

/**
 * Sets up the checkout and puts its tools first on PATH.
 * @param {{ native?: boolean, nativeRequired: boolean, allVariants?: boolean, emulator?: boolean }} options
 * `native`: build the native kernels. `nativeRequired`: exit if a build fails (but not if there is no compiler). `allVariants`: build the kernels
 * for all instruction sets rather than only this machine's best. `emulator`: build the GPU emulator. Tests need the last two.
 * @returns {Promise<string>} path of the Node that runs the workspace
 */
export async function setUp({ native = true, nativeRequired, allVariants = true, emulator = false }) {
  requireNode(20)
  process.env.PATH = `${join(root, 'node_modules', '.bin')}${delimiter}${process.env.PATH ?? ''}`
  await installDependencies()
  const node = workspaceNode()
  if (native)
    await runBuild(node, [buildNative, ...(allVariants ? [] : ['--here'])], 'the native kernels', nativeRequired)
  if (emulator) await runBuild(node, [buildEmulator], 'the CUDA kernels for the emulator', nativeRequired)
  return node
}

function requireNode(major) {
  if (Number.parseInt(process.versions.node, 10) >= major) return
  fail(`Node ${major} or later is required, but this is ${process.version}; see https://nodejs.org/en/download`)
}

async function installDependencies() {
  const stamp = hashOfInstallInputs()
  if (existsSync(stampFile) && readFileSync(stampFile, 'utf8') === stamp) return
  const pnpm = findPnpm()
  say(`installing dependencies with ${pnpm.name}`)
  const started = Date.now()
  const env = { ...process.env }
  // With NODE_ENV=production, pnpm would skip the development dependencies.
  delete env.NODE_ENV
  const result = await run(pnpm.command, [...pnpm.args, 'install', '--frozen-lockfile'], { env, shell: pnpm.shell })
  if (result.code !== 0) {
    process.stderr.write(result.output)
    const hint = /OUTDATED_LOCKFILE/.test(result.output)
      ? 'a package.json has changed; run `npx -y pnpm@12 install` to update pnpm-lock.yaml'
      : 'see the output above; behind a proxy or mirror, configure it with `npm config set registry|proxy|cafile`'
    fail(`installing dependencies failed (exit code ${result.code}): ${hint}`)
  }
  writeFileSync(stampFile, stamp)
  say(`dependencies installed in ${seconds(started)}`)
}

function hashOfInstallInputs() {
  const manifests = ['package.json', 'pnpm-lock.yaml', 'pnpm-workspace.yaml']
  for (const folder of ['.', 'packages']) {
    for (const entry of readdirSync(join(root, folder), { withFileTypes: true })) {
      const manifest = join(folder, entry.name, 'package.json')
      if (entry.isDirectory() && entry.name !== 'node_modules' && existsSync(join(root, manifest)))
        manifests.push(manifest)
    }
  }
  const hash = createHash('sha256').update(`${process.platform} ${process.arch}\n`)
  for (const manifest of manifests.sort()) hash.update(`${manifest}\n`).update(readFileSync(join(root, manifest)))
  return hash.digest('hex')
}

/** An installed pnpm of the right major version, otherwise the pinned version through npx, which needs no global installation. */
function findPnpm() {
  const { packageManager } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'))
  const major = packageManager.match(/@(\d+)/)[1]
  const found = spawnSync('pnpm', ['--version'], { encoding: 'utf8', shell: windows, cwd: root })
  const version = found.status === 0 ? found.stdout.trim() : ''
  if (version.split('.')[0] === major) return { name: `pnpm ${version}`, command: 'pnpm', args: [], shell: windows }
  return { name: `npx ${packageManager}`, command: 'npx', args: ['-y', packageManager], shell: windows }
}

/** Node from the npm package `node`; if its binary does not run (musl), the Node that runs this script, if it is recent enough. */
function workspaceNode() {
  const installed = join(root, 'node_modules', 'node', 'bin', windows ? 'node.exe' : 'node')
  if (spawnSync(installed, ['--version']).status === 0) return installed
  const [major, minor] = process.versions.node.split('.').map(Number)
  if (major >= 24 || (major === 22 && minor >= 18)) return process.execPath
  return fail(
    `${installed} does not run on this machine, and ${process.version} cannot run TypeScript; install Node 24`,
  )
}

async function runBuild(node, script, what, required) {
  // If the build ends before this, nothing had to be compiled.
  const compiling = setTimeout(() => say(`compiling ${what}, a minute or two the first time`), 1500)
  const { code } = await run(node, script, { stdio: ['ignore', 2, 2] })
  clearTimeout(compiling)
  if (code === 0) return
  if (required) fail(`building ${what} failed (exit code ${code}); for details run: node ${script.join(' ')} --verbose`)
  say(`building ${what} failed (exit code ${code}); continuing without them`)
}

/**
 * Runs one step to its end. Ctrl-C ends the step and then this process.
 * @returns {Promise<{ code: number, output: string }>}
 */
function run(command, args, options) {
  return new Promise((resolve, reject) => {
    const child = spawn(command, args, { cwd: root, stdio: ['ignore', 'pipe', 'pipe'], ...options })
    let output = ''
    child.stdout?.on('data', chunk => (output += chunk))
    child.stderr?.on('data', chunk => (output += chunk))
    const stop = signal => child.kill(signal)
    process.on('SIGINT', stop).on('SIGTERM', stop)
    child.on('error', reject)
    child.on('close', (code, signal) => {
      process.off('SIGINT', stop).off('SIGTERM', stop)
      if (signal) process.kill(process.pid, signal)
      else if (code === 130) process.exit(130)
      else resolve({ code: code ?? 1, output })
    })
  })
}

/** Prints to standard error, because standard output belongs to the program that runs afterwards (`npm start -- --json`). */
function say(line) {
  console.error(`setup: ${line}`)
}

function fail(line) {
  console.error(`setup: ${line}`)
  process.exit(1)
}

function seconds(started) {
  return `${((Date.now() - started) / 1000).toFixed(0)} s`
}
