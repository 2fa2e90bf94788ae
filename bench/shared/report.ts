/** @file Shared by benchmarks: medians, tables, the machine, results as JSON, and the Python environment of peers. */
import { spawnSync } from 'node:child_process'
import { existsSync, writeFileSync } from 'node:fs'
import { cpus, loadavg, totalmem } from 'node:os'
import { fileURLToPath } from 'node:url'

export const root = fileURLToPath(new URL('../..', import.meta.url))

const python = `${root}.venv-reference/bin/python`

/** Path of a Python with PyTorch; if there is none, prints that and returns undefined. */
export function findPython(wanted: boolean): string | undefined {
  if (!wanted) return undefined
  if (existsSync(python)) return python
  console.error('PyTorch is skipped, because there is no .venv-reference; create it with tools/reference/setup.sh')
  return undefined
}

/** Runs a program to its end and parses the last line that it prints as JSON. */
export function lastJson<T>(label: string, command: string, args: readonly string[]): T {
  const { status, stdout, error } = spawnSync(command, args, {
    cwd: root,
    stdio: ['ignore', 'pipe', 'inherit'],
    encoding: 'utf8',
    maxBuffer: 2 ** 24,
  })
  if (error) throw error
  if (status !== 0) throw new Error(`${label} exited with code ${status}`)
  return JSON.parse(stdout.trim().split('\n').at(-1) ?? '') as T
}

export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b)
  const middle = sorted.length >> 1
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2
}

/** Total milliseconds of the ops, or kernels, whose name matches. */
export function millisecondsOf(ops: Readonly<Record<string, number>>, pattern: RegExp): number {
  return Object.entries(ops).reduce((sum, [op, milliseconds]) => sum + (pattern.test(op) ? milliseconds : 0), 0)
}

/** Prints a table; the first `left` columns are left-aligned. */
export function printTable(heads: readonly string[], rows: readonly (readonly string[])[], left = 1): void {
  const widths = heads.map((head, i) => Math.max(head.length, ...rows.map(row => row[i].length)))
  for (const row of [heads, ...rows]) {
    const cells = row.map((cell, i) => (i < left ? cell.padEnd(widths[i]) : cell.padStart(widths[i])))
    console.log(cells.join('  ').trimEnd())
  }
}

/** Writes the results and a description of the machine as JSON. */
export function writeResults(file: string | undefined, results: object): void {
  if (file === undefined) return
  const cpu = cpus()[0]?.model ?? 'unknown'
  const machine = { cpu, cores: cpus().length, memoryBytes: totalmem(), load: loadavg()[0], node: process.version }
  writeFileSync(file, `${JSON.stringify({ machine, ...results }, null, 2)}\n`)
}
