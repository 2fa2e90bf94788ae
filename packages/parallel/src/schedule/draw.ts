/** @file Draws a simulated schedule as text, with one line per rank and time from left to right. */
import { checkOptions } from '@moe/core'
import { type Action, partsOf } from './schedule.ts'
import type { Simulation } from './simulate.ts'

/**
 * Draws a simulation as text, with one line per rank. The width of an action is its duration. Each starts with its kind and micro-batch: `F` forward, `B` backward, `I` and `W` its
 * parts for input and weights, `F3B0` an overlapped pair. `'` after the micro-batch marks the stages of a rank other than its lowest one. Dots are bubble.
 * @param options.columns characters per unit of time. Default: as many as the shortest action needs for its label
 */
export function drawSchedule(simulation: Simulation, options: { columns?: number } = {}): string {
  checkOptions('drawSchedule', options, { columns: true })
  const { ranks, makespan } = simulation
  const lines = ranks.map(({ timeline }) => {
    const lowest = Math.min(...timeline.flatMap(({ action }) => partsOf(action)).map(({ stage }) => stage))
    return timeline.map(timed => ({ ...timed, label: labelOf(timed.action, lowest) }))
  })
  const needed = lines
    .flat()
    .flatMap(({ label, start, end }) => (end > start ? [(label.length + 1) / (end - start)] : []))
  const columns = options.columns ?? Math.ceil(Math.max(1, ...needed))
  const at = (time: number) => Math.round(time * columns)
  return lines
    .map((line, rank) => {
      const text = new Array<string>(at(makespan)).fill('.')
      for (const { label, start, end } of line) {
        const width = at(end) - at(start)
        const cell = width > 1 ? `${label.slice(0, width - 1).padEnd(width - 1, '-')}|` : label.slice(0, width)
        text.splice(at(start), width, ...cell)
      }
      return `${String(rank).padStart(String(ranks.length - 1).length)} ${text.join('')}`
    })
    .join('\n')
}

function labelOf(action: Action, lowest: number): string {
  const letters = { forward: 'F', backward: 'B', backwardInput: 'I', backwardWeight: 'W' }
  return partsOf(action)
    .map(({ kind, stage, microBatch }) => `${letters[kind]}${microBatch}${stage === lowest ? '' : "'"}`)
    .join('')
}
