/** @file The command's output: progress, and a table of results. */
import type { TaskResult } from './evaluate-task.ts'

/** Formats the progress: `piqa: 12%, 3 min left`. Leaves out the time during the first second. */
export function progressLine(name: string, done: number, seconds: number): string {
  const left = done > 0 && seconds > 1 ? `, ${duration((seconds * (1 - done)) / done)} left` : ''
  return `${name}: ${Math.floor(100 * done)}%${left}`
}

function duration(seconds: number): string {
  if (seconds < 90) return `${Math.ceil(seconds)} s`
  return seconds < 5400 ? `${Math.ceil(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`
}

/** Formats results as a table, with one line for each metric of each task. */
export function resultTable(results: readonly TaskResult[]): string {
  const rows = results.flatMap(({ task, metrics, items, shots, seconds }) =>
    Object.entries(metrics).map(([name, { value, stderr }]) => [
      task,
      name,
      value.toFixed(4),
      stderr === null ? '' : `± ${stderr.toFixed(4)}`,
      `${items}`,
      `${shots}`,
      (items / seconds).toFixed(1),
    ]),
  )
  const all = [['task', 'metric', 'value', '', 'items', 'shots', 'items/s'], ...rows]
  const widths = all[0].map((_, i) => Math.max(...all.map(row => row[i].length)))
  const isText = (i: number) => i < 2
  const line = (row: readonly string[]) =>
    row
      .map((cell, i) => (isText(i) ? cell.padEnd(widths[i]) : cell.padStart(widths[i])))
      .join('  ')
      .trimEnd()
  return `${all.map(line).join('\n')}\n`
}
