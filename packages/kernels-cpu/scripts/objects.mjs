// Shared by the builds of native code: finding a compiler, compiling what changed, linking, locking. Plain Node >= 20.
import { spawn, spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { existsSync, readdirSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { basename, relative } from 'node:path'
import { platformName } from '../src/platforms.mjs'

const compilers = [process.env.CXX, 'g++', 'c++', 'clang++'].filter(Boolean).map(command => [command])

/** The first compiler that runs: { command, first, version }. `first` are arguments that come before all others. */
export function findCompiler(candidates = compilers) {
  for (const [command, ...first] of candidates) {
    const found = spawnSync(command, [...first, '--version'], { encoding: 'utf8' })
    if (found.status === 0) return { command, first, version: found.stdout.split('\n')[0] }
  }
}

/** Name of the output folder in build/. */
export function buildTarget({ sanitize, emulated }) {
  return `${platformName(process.platform, process.arch)}${emulated ? '-emulated' : ''}${sanitize ? '-sanitize' : ''}`
}

export function hash(data) {
  return createHash('sha256').update(data).digest('hex').slice(0, 32)
}

/** Runs a program to its end: { code, output }. `output` is its standard error, and its standard output if that is piped. */
export function run(command, args, stdout = 'ignore') {
  return new Promise(resolve => {
    const child = spawn(command, args, { stdio: ['ignore', stdout, 'pipe'] })
    let output = ''
    const collect = chunk => (output += chunk)
    child.stdout?.on('data', collect)
    child.stderr.on('data', collect)
    child.on('error', error => resolve({ code: 1, output: error.message }))
    child.on('close', code => resolve({ code: code ?? 1, output }))
  })
}

/** The files listed in a make-style dependency file that are inside `root`, relative to it. */
export function dependencies(depFile, root) {
  return readFileSync(depFile, 'utf8')
    .replace(/^[^:]*:/, '')
    .replaceAll('\\\n', ' ')
    .trim()
    .split(/\s+/)
    .map(path => relative(root, path))
    .filter(path => !path.startsWith('..'))
}

/** Waits for the lock, so that one build runs at a time, and returns a function that releases it. Takes over the lock of a dead process. */
export async function lock(path) {
  for (;;) {
    try {
      writeFileSync(path, String(process.pid), { flag: 'wx' })
      return () => rmSync(path, { force: true })
    } catch (error) {
      if (error.code !== 'EEXIST') throw error
    }
    const holder = existsSync(path) ? Number(readFileSync(path, 'utf8')) : 0
    if (holder > 0 && !isAlive(holder)) rmSync(path, { force: true })
    await new Promise(resolve => setTimeout(resolve, 100))
  }
}

function isAlive(pid) {
  try {
    process.kill(pid, 0)
    return true
  } catch (error) {
    return error.code === 'EPERM'
  }
}

/**
 * Compiles and links objects `{ source, label, flags, file, stamp, key }`. `file` is the object; `stamp` records its key and the hashes of its
 * inputs.
 * @param {string} root folder of the package
 * @param {{ force: boolean, verbose: boolean, keepGoing: boolean, say: (line: string) => void }} options
 */
export function objectBuilder(root, { force, verbose, keepGoing, say }) {
  const hashes = new Map()

  function fileHash(path) {
    if (!hashes.has(path)) hashes.set(path, existsSync(path) ? hash(readFileSync(path)) : '')
    return hashes.get(path)
  }

  function isFresh({ file, stamp, key }) {
    if (force || !existsSync(file) || !existsSync(stamp)) return false
    const known = JSON.parse(readFileSync(stamp, 'utf8'))
    return (
      known.key === key &&
      Object.entries(known.inputs).every(([path, digest]) => fileHash(`${root}/${path}`) === digest)
    )
  }

  /** Returns '' on success, otherwise the compiler's output. The previous object is kept until compilation succeeds. */
  async function compile({ source, flags, file, stamp, key, label }, compiler) {
    const started = Date.now()
    const depFile = `${file}.d`
    const temporary = `${file}.new`
    const args = [...compiler.first, ...flags, '-MMD', '-MF', depFile, '-c', source, '-o', temporary]
    if (verbose) say([compiler.command, ...args].join(' '))
    const { code, output } = await run(compiler.command, args)
    if (code !== 0) return output || `exit code ${code}`
    if (output.trim() !== '') process.stderr.write(output)
    const inputs = Object.fromEntries(dependencies(depFile, root).map(path => [path, fileHash(`${root}/${path}`)]))
    renameSync(temporary, file)
    writeFileSync(stamp, JSON.stringify({ key, inputs }))
    rmSync(depFile)
    if (verbose) say(`${label} ${((Date.now() - started) / 1000).toFixed(1)} s`)
    return ''
  }

  /** Compiles, largest source first, and returns the failures: { label, output }. */
  async function compileAll(objects, compiler) {
    const queue = objects
      .map(object => ({ object, size: statSync(object.source).size }))
      .sort((a, b) => b.size - a.size)
    const failed = []
    const worker = async () => {
      for (let next = queue.shift(); next; next = queue.shift()) {
        const output = await compile(next.object, compiler)
        if (output !== '') failed.push({ label: next.object.label, output })
        if (failed.length > 0 && !keepGoing) queue.length = 0
      }
    }
    await Promise.all(Array.from({ length: Math.min(2, availableParallelism()) }, worker))
    return failed
  }

  /** Links a shared library: returns 1 if it was linked, 0 if it was up to date or failed (which sets the exit code). */
  function link(library, stamp, objects, compiler, flags) {
    const key = hash(objects.map(({ file }) => `${basename(file)} ${hash(readFileSync(file))}`).join('\n'))
    if (!force && existsSync(library) && existsSync(stamp) && readFileSync(stamp, 'utf8') === key) return 0
    const args = [...compiler.first, '-shared', '-o', `${library}.new`, ...objects.map(({ file }) => file), ...flags]
    if (verbose) say([compiler.command, ...args].join(' '))
    const { status, stderr } = spawnSync(compiler.command, args, { encoding: 'utf8' })
    if (status !== 0) {
      say(`${basename(library)} failed to link\n${stderr}`)
      process.exitCode = 1
      return 0
    }
    renameSync(`${library}.new`, library)
    writeFileSync(stamp, key)
    return 1
  }

  /** Removes objects of sources that no longer exist. */
  function removeStrays(objDir, objects) {
    const known = new Set(objects.flatMap(({ file, stamp }) => [file, stamp].map(path => basename(path))))
    for (const name of readdirSync(objDir)) if (!known.has(name) && !name.endsWith('.link')) rmSync(`${objDir}/${name}`)
  }

  return { isFresh, compileAll, link, removeStrays }
}
