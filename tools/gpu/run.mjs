// Runs the parts of `run.sh`, each in its own processes with a time limit, and writes all results so far after each part.
import { spawn, spawnSync } from 'node:child_process'
import { existsSync, globSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { dirname, join, resolve } from 'node:path'
import { pathToFileURL } from 'node:url'
import { parseArgs } from 'node:util'

const help = `./run.sh [--only PART,PART] [--minutes N] [--json FILE] [--list] [--check] [--silence SECONDS]

Runs the parts in the order of --list. A part that already has a result in results/ is only run again if it is named with --only.
--minutes N: stop within N minutes; parts that have not started by then are left for the next call.
--json FILE: write all results so far to this file after each part (default: results/gpu.json).
--check: load all files of tests without running any, as \`pnpm gpu:pack\` does. Needs no GPU.
--silence N: treat a test without output for N seconds as hanging (default: 30). It is reported by name, and the remaining tests
             continue in a new process.
MOE_CUDA_WGMMA=matmul,attention: in parts that end in :wgmma, use Hopper's kernels only for these ops.`

const started = Date.now()
const { values: options } = parseArgs({
  options: {
    only: { type: 'string' },
    minutes: { type: 'string' },
    json: { type: 'string' },
    list: { type: 'boolean', default: false },
    check: { type: 'boolean', default: false },
    silence: { type: 'string', default: '30' },
    help: { type: 'boolean', default: false },
  },
})
const pack = resolve(import.meta.dirname, '..', '..')
const results = join(dirname(pack), 'results')
const json = resolve(options.json ?? join(results, 'gpu.json'))
const node = join(pack, 'node')
const end = options.minutes === undefined ? Number.POSITIVE_INFINITY : started + 60_000 * Number(options.minutes)
const left = () => (stopped ? 0 : (end - Date.now()) / 1000)
let stopped = false
/** The running process and everything that it has started. */
let running
for (const signal of ['SIGTERM', 'SIGINT', 'SIGHUP'])
  process.on(signal, () => {
    stopped = true
    running?.kill()
  })
/** Status of an interrupted part, which the next call runs again. */
const unfinished = 'not finished'
/** Maximum number of tests that hang or crash, per file and per part. */
const mostDied = { file: 3, part: 8 }

/** Environment variables of each kind of matrix product. cuBLASLt's path is added when one is found; MOE_CUDA_WGMMA may list ops for Hopper's kernels. */
const hopper = process.env.MOE_CUDA_WGMMA ?? '1'
const ways = {
  '': { MOE_CUDA_WGMMA: '0' },
  ':wgmma': { MOE_CUDA_WGMMA: hopper },
  ':cublas-lt': { MOE_CUDA_WGMMA: '0', MOE_CUDA_CUBLASLT: '' },
}
const ofSuite = globSync('packages/kernels-cuda/src/**/*.test.ts', { cwd: pack })
  // Without tests of the emulator, of launches on it, and of code on a driver that only keeps books.
  .filter(file => !/\/(emulator|launches|memory\.|modules\.|stream\.|tensor-map\.|device\.)/.test(file))
  .sort()
// Without tests of files and commands, which need more than the pack contains.
const ofModels = globSync('packages/{attention-mla,router,mtp,deepseek}/src/**/*.test.ts', { cwd: pack })
  .filter(file => !/\/gguf\/|cli\.test\.ts$/.test(file))
  .sort()

const suite = (way, seconds) => ({ name: `suite${way}`, way, seconds, files: ofSuite })
const script = (...args) => [node, '--no-warnings', '--expose-gc', ...args]
const bench = (section, way, seconds) => ({
  name: `${section}${way}`,
  way,
  seconds,
  command: (file, peers) => script('bench/cuda.ts', '--only', section, '--json', file, ...peers),
})
const sweep = way => ({
  name: `sweep${way}`,
  way,
  seconds: 120,
  command: file => script('bench/cuda-sweep.ts', '--json', file),
})
const peers = (name, sections, seconds) => ({
  name,
  way: '',
  seconds,
  torch: true,
  command: file => ['python3', '-u', 'bench/peers/cuda_torch.py', '--only', sections, '--json', file],
})
const sanitizer = (tool, way) => ({
  name: `${tool}${way}`,
  way,
  seconds: 150,
  sanitizer: true,
  command: () => {
    const tests = [node, '--no-warnings', 'tools/gpu/file.mjs', 'packages/kernels-cuda/src/backend.test.ts', '0']
    return [
      'compute-sanitizer',
      '--tool',
      tool,
      '--error-exitcode',
      '9',
      ...tests,
      way && 'matmul|experts|entropy|attention',
    ]
  },
})
/** The most important parts come first. */
const parts = [
  suite('', 240),
  suite(':wgmma', 240),
  // The peaks that other results are fractions of.
  peers('peers', 'peak,gemm,attention', 90),
  bench('launch', '', 40),
  {
    name: 'products',
    way: ':cublas-lt',
    seconds: 90,
    // Also without cuBLASLt, with our kernels alone.
    always: true,
    command: file => script('bench/cuda-gemm.ts', '--json', file),
  },
  ...['attention', 'decode', 'gemm'].map(section => bench(section, ':wgmma', 90)),
  bench('train', ':wgmma', 150),
  peers('peers-train', 'train', 200),
  bench('generate', ':wgmma', 150),
  sweep(':wgmma'),
  sweep(''),
  ...['attention', 'decode', 'gemm', 'train', 'generate'].map(section => bench(section, '', 150)),
  { name: 'models', way: '', seconds: 240, files: ofModels, preload: './tools/gpu/models.mjs' },
  suite(':cublas-lt', 180),
  // As many ranks as there are devices.
  { name: 'ranks', way: '', seconds: 120, ranks: true, files: ['packages/parallel/src/nccl/nccl.test.ts'] },
  ...['gemm', 'train'].map(section => bench(section, ':cublas-lt', 150)),
  ...['', ':wgmma'].flatMap(way =>
    ['memcheck', 'synccheck', 'racecheck', 'initcheck'].map(tool => sanitizer(tool, way)),
  ),
]

if (options.help) console.log(help)
else if (options.list) for (const { name, seconds } of parts) console.log(`${name.padEnd(20)} up to ${seconds} s`)
else if (options.check) await check()
else await main()

/** Fails if a file of tests cannot be loaded, such as one that reads a file that has not been packed. */
async function check() {
  let failed = 0
  for (const file of new Set(parts.flatMap(({ files = [] }) => files))) {
    await import(pathToFileURL(join(pack, file)).href).catch(error => {
      failed++
      console.error(`run.sh: ${file} cannot be loaded: ${error.stack}`)
    })
  }
  // The files may have left something open.
  process.exit(failed === 0 ? 0 : 1)
}

async function main() {
  const wanted = options.only?.split(',')
  const unknown = wanted?.filter(name => !parts.some(part => part.name === name)) ?? []
  if (unknown.length > 0) {
    console.error(`run.sh: unknown part ${unknown.join(', ')}; see --list`)
    process.exitCode = 2
    return
  }
  mkdirSync(results, { recursive: true })
  const card = probe()
  if (card.error !== undefined) {
    writeJson(json, { error: card.error, date: new Date().toISOString() })
    process.exitCode = 1
    return
  }
  const has = {
    torch: succeeds('python3', [
      '-c',
      'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)',
    ]),
    sanitizer: succeeds('compute-sanitizer', ['--version']),
  }
  const notRun = []
  for (const part of parts) {
    if (wanted ? !wanted.includes(part.name) : isDone(part.name)) continue
    const missing = whyNot(part, card, has)
    if (missing !== undefined) continue
    // With less time, most parts would only be killed.
    if (left() < 20) {
      notRun.push(part.name)
      continue
    }
    const seconds = Math.min(part.seconds, left() - 5)
    console.log(`== ${part.name} (at ${((Date.now() - started) / 1000).toFixed(0)} s)`)
    const began = Date.now()
    // Saved every few seconds, in case the whole run is killed.
    const known = setInterval(() => {
      const { soFar } = part
      if (soFar === undefined) return
      writeJson(fileOf(part.name), { ...soFar(), status: unfinished, seconds: (Date.now() - began) / 1000 })
      merge(card, notRun)
    }, 3000)
    const result = part.files ? await runTests(part, seconds) : await runCommand(part, seconds)
    clearInterval(known)
    const took = (Date.now() - began) / 1000
    // Interrupted, or because this call has less time than the part may take.
    const cut = stopped || (seconds < part.seconds && took >= seconds)
    const status = cut && result.status !== 'passed' ? unfinished : result.status
    writeJson(fileOf(part.name), { ...result, status, seconds: took })
    if (status !== 'passed') process.exitCode = 1
    console.log(`== ${part.name}: ${status}, ${took.toFixed(0)} s`)
    merge(card, notRun)
  }
  merge(card, notRun)
  if (notRun.length > 0) console.log(`not run for lack of time: ${notRun.join(', ')}`)
  console.log(`wrote ${json}`)
}

function isDone(part) {
  return existsSync(fileOf(part)) && JSON.parse(readFileSync(fileOf(part), 'utf8')).status !== unfinished
}

function fileOf(part) {
  return join(results, `${part.replace(':', '-')}.json`)
}

function whyNot({ way, torch, sanitizer, ranks, always }, { capability, cublasLt, nccl }, has) {
  if (ranks && nccl === undefined) return 'no NCCL'
  if (way === ':wgmma' && capability !== 90) return 'no Hopper'
  if (way === ':cublas-lt' && cublasLt === undefined && !always) return 'no cuBLASLt'
  if (torch && !has.torch) return 'no PyTorch'
  if (sanitizer && !has.sanitizer) return 'no compute-sanitizer'
}

function succeeds(command, args) {
  return spawnSync(command, args, { stdio: 'ignore', timeout: 30_000 }).status === 0
}

/** Libraries next to the PyTorch of a Python installation. */
function ofPython(pattern) {
  const program = `import glob, sys
for folder in sys.path: print(*sorted(glob.glob(folder + "/nvidia/${pattern}"), reverse=True), sep="\\n")`
  return spawnSync('python3', ['-c', program], { encoding: 'utf8' }).stdout?.split('\n').filter(Boolean) ?? []
}

/** The card, and a cuBLASLt and NCCL for it: given by variables, found by the package, or next to a Python's PyTorch. */
function probe() {
  const named = process.env.MOE_CUDA_CUBLASLT
  delete process.env.MOE_CUDA_CUBLASLT
  const [nccl] = ofPython('nccl/lib/libnccl.so.2')
  if (nccl !== undefined) process.env.MOE_NCCL_LIBRARY ??= nccl
  let card
  let error = ''
  for (const candidate of named ? [named] : ['1', ...ofPython('c*/lib/libcublasLt.so.1[23]')]) {
    const env = { ...process.env, MOE_CUDA_CUBLASLT: candidate }
    const { status, stdout, stderr } = spawnSync(node, ['--no-warnings', 'tools/gpu/probe.mjs'], {
      cwd: pack,
      env,
      encoding: 'utf8',
      timeout: 60_000,
      killSignal: 'SIGKILL',
    })
    if (status !== 0) {
      error = `probe: ${status === null ? 'no output within 60 s' : stderr.slice(-3000)}`
      console.error(error)
    } else card = { ...JSON.parse(stdout), cublasLtPath: candidate }
    if (card?.cublasLt !== undefined) break
  }
  if (card?.cublasLt !== undefined) ways[':cublas-lt'] = { MOE_CUDA_CUBLASLT: card.cublasLtPath }
  if (card === undefined) return { error }
  console.log(JSON.stringify(card))
  return { ...card, wgmma: hopper }
}

function environment(way) {
  return { ...process.env, MOE_REQUIRE_CUDA: '1', NO_COLOR: '1', ...ways[way] }
}

/** Starts a program in its own process group, so that everything it starts can be killed. */
function start(command, way, stdio, more = {}) {
  const env = { ...environment(way), ...more }
  const child = spawn(command[0], command.slice(1), { cwd: pack, env, stdio, detached: true })
  child.kill = () => {
    try {
      process.kill(-child.pid, 'SIGKILL')
    } catch {
      // It has already exited.
    }
  }
  running = child
  return child
}

function runCommand(part, seconds) {
  const file = join(results, 'part.json')
  rmSync(file, { force: true })
  const known = ['peers', 'peers-train'].map(fileOf).filter(path => existsSync(path))
  const command = part.command(file, known.length > 0 ? ['--peers', known.join()] : [])
  const measured = () => {
    try {
      return JSON.parse(readFileSync(file, 'utf8'))
    } catch {
      // Not written yet, or incomplete.
      return {}
    }
  }
  return new Promise(done => {
    let output = ''
    let last = ''
    part.soFar = () => ({ ...measured(), output })
    let late = false
    const child = start(command, part.way, ['ignore', 'pipe', 'pipe'])
    const timer = setTimeout(() => {
      late = true
      child.kill()
    }, 1000 * seconds)
    for (const stream of [child.stdout, child.stderr]) {
      stream.setEncoding('utf8').on('data', text => {
        // For a sanitizer, keep the first errors and the latest output; for others, the end.
        if (part.sanitizer) last = text
        else process.stdout.write(text)
        const kept = part.sanitizer ? linesOfSanitizer(text) : text
        output = part.sanitizer ? (output + kept).slice(0, 20_000) : (output + kept).slice(-20_000)
      })
    }
    child.on('error', error => {
      output += error.message
    })
    child.on('close', (code, signal) => {
      clearTimeout(timer)
      const status = late
        ? `killed after ${seconds.toFixed(0)} s`
        : code === 0
          ? 'passed'
          : `ended with ${code ?? signal}`
      if (part.sanitizer) {
        output += `\nended with: ${last.slice(-500)}`
        console.log(output.slice(0, 2000))
      }
      done({ status, ...measured(), ...(status !== 'passed' || part.sanitizer ? { output } : {}) })
    })
  })
}

function linesOfSanitizer(text) {
  return text.replace(/^(?!=====).*\n?/gm, '')
}

async function runTests(part, seconds) {
  const { files, way, preload } = part
  const until = Date.now() + 1000 * seconds
  const result = { status: 'passed', passed: 0, failed: 0, skipped: 0, failures: [], slowest: [], notRun: [] }
  let died = 0
  part.soFar = () => result
  for (const file of files) {
    if (stopped || Date.now() > until || died >= mostDied.part) result.notRun.push(file)
    else died += await runFile(file, way, preload, until, result)
  }
  const { passed, failed, skipped, notRun, slowest } = result
  result.slowest = slowest.sort((a, b) => b.seconds - a.seconds).slice(0, 10)
  console.log(`${passed} passed, ${failed} failed, ${skipped} skipped, ${notRun.length} files not finished`)
  if (failed > 0 || notRun.length > 0) result.status = 'failed'
  return result
}

/** Runs all tests of a file. If one hangs or crashes the process or the device, the rest continue in a new process. Returns how many did. */
async function runFile(file, way, preload, until, result) {
  let from = 0
  const fail = (name, error) => {
    result.failed++
    result.failures.push({ name, file, error })
    console.log(`FAIL ${name} (${file})\n  ${error.replaceAll('\n', '\n  ')}`)
  }
  for (let deaths = 0; ; ) {
    const { count, last, name, open, died, output } = await oneProcess(file, from, way, preload, until, result, fail)
    if (count === 0) fail('(none)', 'the file contains no tests')
    if (died === undefined) return deaths
    if (stopped || Date.now() >= until) {
      result.notRun.push(`${file}, from test ${Math.max(last, 0)}${open ? ` (${name})` : ''}`)
      return deaths
    }
    if (open) fail(name, `${died}\n${output}`)
    else if (count === undefined) fail('(before its first test)', `${died}\n${output}`)
    from = last + 1
    deaths++
    if (count === undefined || from >= count) return deaths
    if (deaths >= mostDied.file) {
      result.notRun.push(`${file}, from test ${from} of ${count}`)
      return deaths
    }
  }
}

function oneProcess(file, from, way, preload, until, result, fail) {
  return new Promise(done => {
    const preloads = preload === undefined ? [] : ['--import', preload]
    const command = [node, '--no-warnings', ...preloads, 'tools/gpu/file.mjs', file, String(from)]
    const child = start(command, way, ['ignore', 'pipe', 'pipe', 'pipe'], { MOE_TEST_REPORT: '3' })
    const seen = { count: undefined, last: from - 1, name: '', open: false, died: undefined, output: '' }
    let began = 0
    let failedHere = false
    let timer
    const watch = () => {
      clearTimeout(timer)
      const silence = Math.min(1000 * Number(options.silence), Math.max(until - Date.now(), 0))
      timer = setTimeout(() => {
        seen.died = `no output within ${options.silence} s; killed`
        child.kill()
      }, silence)
    }
    const take = line => {
      if ('tests' in line) seen.count = line.tests
      else if ('start' in line) {
        Object.assign(seen, { last: line.start, name: line.name, open: true })
        began = Date.now()
      } else if (line.end === 'failed') {
        seen.open = false
        failedHere = true
        if (line.lost) seen.died = 'the device was lost'
        fail(seen.name, line.error)
      } else {
        seen.open = false
        result[line.end]++
      }
      if ('end' in line && Date.now() - began > 1000)
        result.slowest.push({ name: seen.name, seconds: (Date.now() - began) / 1000 })
    }
    let rest = ''
    child.stdio[3].setEncoding('utf8').on('data', text => {
      watch()
      const lines = (rest + text).split('\n')
      rest = lines.pop()
      for (const line of lines) take(JSON.parse(line))
    })
    for (const stream of [child.stdout, child.stderr])
      stream.setEncoding('utf8').on('data', text => {
        seen.output = (seen.output + text).slice(-2000)
      })
    watch()
    child.on('close', (code, signal) => {
      clearTimeout(timer)
      // A file exits with 1 if tests failed, and also if it failed to load.
      if (code !== 0 && !(code === 1 && failedHere)) seen.died ??= `the process exited with ${code ?? signal}`
      done(seen)
    })
  })
}

function merge(card, notRun) {
  const known = parts.filter(({ name }) => existsSync(fileOf(name)))
  const found = Object.fromEntries(known.map(({ name }) => [name, JSON.parse(readFileSync(fileOf(name), 'utf8'))]))
  writeJson(json, { card, date: new Date().toISOString(), parts: found, notRun })
}

/** Writes a file atomically. */
function writeJson(file, value) {
  writeFileSync(`${file}.new`, `${JSON.stringify(value, null, 2)}\n`)
  renameSync(`${file}.new`, file)
}
