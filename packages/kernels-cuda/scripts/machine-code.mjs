// Analyzes the machine code of Hopper's kernels (build/fatbins/*-sm90a.fatbin) and writes a summary to device/machine-code.txt. Needs cuobjdump and nvdisasm (CUDA toolkit) in PATH.
//
//   node scripts/machine-code.mjs [MODULE…]
//
// It follows every path through a kernel, tracks the products of warpgroups in flight, and fails if an instruction accesses a register that one of them uses for its accumulator or left
// operand. It also fails if a kernel uses local memory, ends with products in flight, waits after each of several products, or has waited for all of them before the first exponential.
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
  ['products', 10],
  ['groups', 8],
  ['waits', 7],
  ['loop', 8],
  ['in it', 7],
  ['exp', 5],
  ['beside', 8],
]
const lines = [
  "Machine code of Hopper's kernels that multiply: instructions, products of warpgroups, groups in which they are committed, waits for groups; of the loop with most products",
  'the instructions, products and exponentials among them, and how many of those are computed beside products. Written by scripts/machine-code.mjs, which fails where registers of',
  'products on their way are touched.',
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
    const products = code.filter(isProduct)
    for (const fault of faultsOf(code)) fail(`${name}: ${fault}`)
    if (products.length === 0) continue
    const groups = products.filter(({ operands }) => operands.includes('gsb0')).length
    const waits = code.filter(isWait).length
    // A wait after each of several products means that ptxas has serialized them.
    if (products.length > 4 && groups > products.length / 2)
      fail(`${name}: ${products.length} products in ${groups} groups`)
    const loop = loopOf(code)
    const { all, beside } = exponentialsOf(loop)
    // With only two groups, the second multiplies the result of the first.
    if (all > 0 && beside === 0 && groups > 2) fail(`${name}: all products are waited for before the first exponential`)
    const numbers = [
      code.length,
      products.length,
      groups,
      waits,
      loop.length,
      loop.filter(isProduct).length,
      all,
      beside,
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

function isProduct({ op }) {
  return /^[HQI]GMMA/.test(op)
}
function isWait({ op }) {
  return op.startsWith('WARPGROUP.DEPBAR')
}
function targetOf({ op, operands }) {
  return op.startsWith('BRA') ? Number.parseInt(operands.at(-1).match(/0x[0-9a-f]+$/)?.[0] ?? 'x', 16) : undefined
}

/** The innermost loop with the most products. */
function loopOf(code) {
  const loops = code.flatMap((instruction, end) => {
    const target = targetOf(instruction)
    const begin = target === undefined ? -1 : code.findIndex(({ at }) => at === target)
    return begin >= 0 && begin <= end ? [code.slice(begin, end + 1)] : []
  })
  const count = loop => loop.filter(isProduct).length
  return loops.reduce((best, loop) => {
    const [more, most] = [count(loop), count(best)]
    return more > most || (more === most && more > 0 && loop.length < best.length) ? loop : best
  }, [])
}

/** The number of exponentials in a loop, and how many of them run while products are in flight. */
function exponentialsOf(loop) {
  const found = { all: 0, beside: 0 }
  let underway = false
  for (const instruction of loop) {
    if (isProduct(instruction)) underway = true
    else if (isWait(instruction) && Number(instruction.operands[1]) === 0) underway = false
    if (instruction.op !== 'MUFU.EX2') continue
    found.all++
    if (underway) found.beside++
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

/** Instructions that access registers of products in flight, on any path. */
function faultsOf(code) {
  const found = new Set()
  const indexOf = new Map(code.map(({ at }, i) => [at, i]))
  const targets = new Set(code.map(targetOf))
  const seen = new Set()
  // Per path: products that are not committed, and committed groups, oldest first.
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
      const underway = [...closed.flat(), ...open]
      if (/^(LDL|STL)/.test(op)) report('local memory')
      if (isProduct(instruction)) {
        const sums = registers(operands[0], Number(op.match(/64x(\d+)x/)[1]) / 2)
        const left = registers(operands[1], 4)
        for (const other of underway) {
          if (left.some(r => other.sums.includes(r))) report('a left operand among sums on their way')
          if (sums[0] !== other.sums[0] && sums.some(r => other.sums.includes(r)))
            report('sums among others on their way')
          if (sums.some(r => other.left.includes(r))) report('sums among left operands on their way')
        }
        open = [...open, { sums, left }]
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
      for (const { sums, left } of underway) {
        if (written.some(r => sums.includes(r))) report('writes sums on their way')
        if (written.some(r => left.includes(r))) report('writes a left operand on its way')
        if (read.some(r => sums.includes(r))) report('reads sums on their way')
      }
      const target = targetOf(instruction)
      if (target !== undefined) {
        if (indexOf.has(target)) paths.push({ from: indexOf.get(target), open, closed })
        if (predicate === undefined && !/^!?U?P\d/.test(operands[0])) break
      }
      if (op === 'EXIT' && predicate === undefined) {
        if (underway.length > 0) report('ends with products on their way')
        break
      }
    }
  }
  return found
}
