// Analyzes the machine code of Hopper's kernels (build/fatbins/*-sm90a.fatbin) and writes a summary to device/machine-code.txt. Needs cuobjdump and nvdisasm (CUDA toolkit) in PATH.
//
//   node scripts/machine-code.mjs [MODULE…]
//
// It follows every path through a kernel, tracks the wgmmas in flight, and fails if an instruction accesses a register that one of them uses for its accumulator or its A
// operand. It also fails if a kernel uses local memory, ends with wgmmas in flight, waits after each of several wgmmas, or has waited for all of them before the first exponential.
import { spawnSync } from 'node:child_process'
import { existsSync, readdirSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const fatbins = join(root, 'build', 'fatbins')
const named = process.argv.slice(2)
const modules = readdirSync(existsSync(fatbins) ? fatbins : root)
  .filter(file => file.endsWith('-sm90a.fatbin'))
  .map(file => file.replace('.fatbin', ''))
  .sort()
const columns = [
  ['instructions', 14],
  ['wgmma', 7],
  ['groups', 8],
  ['waits', 7],
  ['loop', 8],
  ['wgmma', 7],
  ['exp', 5],
  ['overlap', 9],
]
const lines = [
  "Machine code of Hopper's kernels that use wgmma: instructions, wgmmas, the groups in which they are committed, and waits for groups; then, for the loop with",
  'most wgmmas, its instructions, its wgmmas, its exponentials, and how many of these overlap with wgmmas in flight. Written by scripts/machine-code.mjs, which fails',
  'if an instruction accesses registers of wgmmas in flight.',
  '',
  `${'kernel'.padEnd(56)}${columns.map(([name, width]) => name.padStart(width)).join('')}`,
]
/** Instructions that do not write their first operand. */
const writesNone =
  /^(ST|RED|SYNCS\.ARR|UT|UBLK|BRA|BAR|EXIT|R2UR|WARP|ISETP|FSETP|DSETP|BSSY|BSYNC|MEMBAR|LDGSTS|PLOP|R2P|VOTE|NANOSLEEP|CCTL|FENCE|DEPBAR|ERRBAR)/
let faults = 0

if (modules.length === 0) fail('found no fatbins; run node scripts/build-fatbins.mjs first')
for (const module of named.length > 0 ? named : modules) {
  for (const [name, code] of [...disassemble(join(fatbins, `${module}.fatbin`))].sort(([a], [b]) => (a < b ? -1 : 1))) {
    const products = code.filter(isWgmma)
    for (const fault of faultsOf(code)) fail(`${name}: ${fault}`)
    if (products.length === 0) continue
    const groups = products.filter(({ operands }) => operands.includes('gsb0')).length
    const waits = code.filter(isWait).length
    // A wait after each of several wgmmas means that ptxas has serialized them.
    if (products.length > 4 && groups > products.length / 2)
      fail(`${name}: ${products.length} wgmmas in ${groups} groups`)
    const loop = loopOf(code)
    const { all, overlapping } = exponentialsOf(loop)
    // With only two groups, the second multiplies the result of the first.
    if (all > 0 && overlapping === 0 && groups > 2) fail(`${name}: waits for all wgmmas before the first exponential`)
    const numbers = [
      code.length,
      products.length,
      groups,
      waits,
      loop.length,
      loop.filter(isWgmma).length,
      all,
      overlapping,
    ]
    lines.push(name.padEnd(56) + numbers.map((x, i) => String(x).padStart(columns[i][1])).join(''))
  }
}
console.log(lines.slice(4).join('\n'))
if (faults > 0) process.exitCode = 1
else if (named.length === 0) writeFileSync(join(root, 'device', 'machine-code.txt'), `${lines.join('\n')}\n`)

function fail(line) {
  console.error(`kernels-cuda: ${line}`)
  faults++
  process.exitCode = 1
}

/** Kernels of a fatbin by name: instructions { at, predicate, op, operands, text }. */
function disassemble(file) {
  const { status, stdout, stderr, error } = spawnSync('cuobjdump', ['-sass', file], {
    encoding: 'utf8',
    maxBuffer: 2 ** 30,
  })
  if (status !== 0) {
    fail(`cuobjdump ${file}: ${error?.message ?? stderr}`)
    return new Map()
  }
  const kernels = new Map()
  let code
  for (const line of stdout.split('\n')) {
    const name = line.match(/Function : (\w+)/)?.[1]
    if (name) {
      code = []
      kernels.set(name, code)
    }
    const found = line.match(/^\s*\/\*([0-9a-f]+)\*\/\s+(@!?U?P\w+ )?\s*([\w.]+)\s*(.*?)\s*;/)
    if (!found) continue
    const [, at, predicate, op, rest] = found
    const operands = rest.split(',').map(operand => operand.trim())
    code.push({ at: Number.parseInt(at, 16), predicate, op, operands, text: `${op} ${rest}` })
  }
  return kernels
}

function isWgmma({ op }) {
  return /^[HQI]GMMA/.test(op)
}
function isWait({ op }) {
  return op.startsWith('WARPGROUP.DEPBAR')
}
function targetOf({ op, operands }) {
  return op.startsWith('BRA') ? Number.parseInt(operands.at(-1).match(/0x[0-9a-f]+$/)?.[0] ?? 'x', 16) : undefined
}

/** The innermost loop with the most wgmmas. Warpgroups may have a loop each: then the one with the most overlapping exponentials. */
function loopOf(code) {
  const loops = code.flatMap((instruction, end) => {
    const target = targetOf(instruction)
    const begin = target === undefined ? -1 : code.findIndex(({ at }) => at === target)
    return begin >= 0 && begin <= end ? [code.slice(begin, end + 1)] : []
  })
  const count = loop => loop.filter(isWgmma).length
  const most = Math.max(0, ...loops.map(count))
  const innermost = loops.filter(
    loop => most > 0 && count(loop) === most && !loops.some(other => contains(loop, other) && count(other) === most),
  )
  return innermost.reduce((best, loop) => {
    const [more, before] = [loop, best].map(each => exponentialsOf(each).overlapping)
    return best.length === 0 || more > before || (more === before && loop.length < best.length) ? loop : best
  }, [])
}

/** Whether a loop contains another one. */
function contains(loop, other) {
  return other !== loop && loop[0].at <= other[0].at && other.at(-1).at <= loop.at(-1).at
}

/** The number of exponentials in a loop, and how many of them run while wgmmas are in flight. */
function exponentialsOf(loop) {
  const found = { all: 0, overlapping: 0 }
  let inFlight = false
  for (const instruction of loop) {
    if (isWgmma(instruction)) inFlight = true
    else if (isWait(instruction) && Number(instruction.operands[1]) === 0) inFlight = false
    if (instruction.op !== 'MUFU.EX2') continue
    found.all++
    if (inFlight) found.overlapping++
  }
  return found
}

/** The number of registers of a value. */
function widthOf(op) {
  if (op.includes('.128')) return 4
  if (/WIDE|\.64/.test(op) && !op.startsWith('SYNCS')) return 2
  return op.startsWith('CS2R') && !op.includes('.32') ? 2 : 1
}
/** The registers of an operand, starting with the one it names. */
function registers(operand, width) {
  const first = operand.match(/^[-|~!]*R(\d+)/)?.[1]
  return first === undefined ? [] : Array.from({ length: width }, (_, i) => Number(first) + i)
}
function accessesOf({ op, operands }) {
  const width = widthOf(op)
  const written = writesNone.test(op) ? [] : registers(operands[0], width)
  const read = (written.length > 0 ? operands.slice(1) : operands).flatMap(operand =>
    [...operand.matchAll(/(?<![U\w])R(\d+)(\.64)?/g)].flatMap(([, r, wide]) => (wide ? [+r, +r + 1] : [+r])),
  )
  // The stored value is as wide as the store.
  if (op.startsWith('ST')) read.push(...registers(operands.at(-1), width))
  return { written, read }
}

/** Instructions that access registers of wgmmas in flight, on any path. */
function faultsOf(code) {
  const found = new Set()
  const indexOf = new Map(code.map(({ at }, i) => [at, i]))
  const targets = new Set(code.map(targetOf))
  const seen = new Set()
  // Per path: wgmmas that are not committed, and committed groups, oldest first.
  const paths = [{ from: 0, open: [], closed: [] }]
  for (let path = paths.pop(); path; path = paths.pop()) {
    let { from: i, open, closed } = path
    for (; i < code.length; i++) {
      const instruction = code[i]
      const { at, predicate, op, operands, text } = instruction
      if (targets.has(at)) {
        const key = JSON.stringify([i, open, closed])
        if (seen.has(key)) break
        seen.add(key)
      }
      const report = what => found.add(`at 0x${at.toString(16)} ${what}: ${text}`)
      const inFlight = [...closed.flat(), ...open]
      if (/^(LDL|STL)/.test(op)) report('local memory')
      if (isWgmma(instruction)) {
        const accumulator = registers(operands[0], Number(op.match(/64x(\d+)x/)[1]) / 2)
        const left = registers(operands[1], 4)
        for (const other of inFlight) {
          if (left.some(r => other.accumulator.includes(r))) report('the A operand is in an accumulator in flight')
          if (accumulator[0] !== other.accumulator[0] && accumulator.some(r => other.accumulator.includes(r)))
            report('the accumulator overlaps with another one in flight')
          if (accumulator.some(r => other.left.includes(r)))
            report('the accumulator overlaps with an A operand in flight')
        }
        open = [...open, { accumulator, left }]
        if (operands.includes('gsb0')) {
          closed = [...closed, open]
          open = []
        }
        continue
      }
      if (isWait(instruction)) {
        const pending = Number(operands[1])
        closed = pending === 0 ? [] : closed.slice(-pending)
        continue
      }
      const { written, read } = accessesOf(instruction)
      for (const { accumulator, left } of inFlight) {
        if (written.some(r => accumulator.includes(r))) report('writes an accumulator in flight')
        if (written.some(r => left.includes(r))) report('writes an A operand in flight')
        if (read.some(r => accumulator.includes(r))) report('reads an accumulator in flight')
      }
      const target = targetOf(instruction)
      if (target !== undefined) {
        if (indexOf.has(target)) paths.push({ from: indexOf.get(target), open, closed })
        if (predicate === undefined && !/^!?U?P\d/.test(operands[0])) break
      }
      if (op === 'EXIT' && predicate === undefined) {
        if (inFlight.length > 0) report('ends with wgmmas in flight')
        break
      }
    }
  }
  return found
}
