/** @file What benchmarks share: medians, tables, the machine, results as JSON, the Python of peers. */
import { spawnSync } from 'node:child_process'
import { existsSync, writeFileSync } from 'node:fs'
import { cpus, loadavg, totalmem } from 'node:os'
import { fileURLToPath } from 'node:url'

export const root = fileURLToPath(new URL('../..', import.meta.url))

const python = `${root}.venv-reference/bin/python`

/** The interpreter with PyTorch, or nothing, which is said. */
export function findPython(wanted: boolean): string | undefined {
  if (!wanted) return undefined
  if (existsSync(python)) return python
  console.error('no .venv-reference: PyTorch is left out (tools/reference/setup.sh makes one)')
  return undefined
}

/** Runs a program to its end: the JSON of the last line that it prints. */
export function lastJson<T>(label: string, command: string, args: readonly string[]): T {
  const { status, stdout, error } = spawnSync(command, args, {
    cwd: root,
    stdio: ['ignore', 'pipe', 'inherit'],
    encoding: 'utf8',
    maxBuffer: 2 ** 24,
  })
  if (error) throw error
  if (status !== 0) throw new Error(`${label} ended with code ${status}`)
  return JSON.parse(stdout.trim().split('\n').at(-1) ?? '') as T
}

export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b)
  const middle = sorted.length >> 1
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2
}

/** Milliseconds of all ops, or kernels, whose name the pattern finds. */
export function millisecondsOf(ops: Readonly<Record<string, number>>, pattern: RegExp): number {
  return Object.entries(ops).reduce((sum, [op, milliseconds]) => sum + (pattern.test(op) ? milliseconds : 0), 0)
}

/** Prints rows under their heads, the first `left` columns flush left. */
export function printTable(heads: readonly string[], rows: readonly (readonly string[])[], left = 1): void {
  const widths = heads.map((head, i) => Math.max(head.length, ...rows.map(row => row[i].length)))
  for (const row of [heads, ...rows]) {
    const cells = row.map((cell, i) => (i < left ? cell.padEnd(widths[i]) : cell.padStart(widths[i])))
    console.log(cells.join('  ').trimEnd())
  }
}

/** Writes results with the machine that they are from. */
export function writeResults(file: string | undefined, results: object): void {
  if (file === undefined) return
  const cpu = cpus()[0]?.model ?? 'unknown'
  const machine = { cpu, cores: cpus().length, memoryBytes: totalmem(), load: loadavg()[0], node: process.version }
  writeFileSync(file, `${JSON.stringify({ machine, ...results }, null, 2)}\n`)
}
