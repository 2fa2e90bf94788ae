/** @file A run as files that TensorBoard reads. */
import { mkdirSync } from 'node:fs'
import { hostname } from 'node:os'
import { join } from 'node:path'
import { pathOf } from '@moe/checkpoint'
import { isMoeError, MoeError } from '@moe/core'
import type { Evaluation } from '../evaluate.ts'
import type { LayerLoads, TrainEvent, TrainReporter } from '../events.ts'
import { maxVio } from './loads-log.ts'
import { LogFile } from './log-file.ts'
import { eventRecord, hyperparameters, scalar, text } from './tensor-board-records.ts'

/** Bytes that may wait for a disk that takes no more. */
const patienceBytes = 1 << 24

/** Files that this process has begun: their names differ within a second, too. */
let files = 0

/**
 * A listener for `onEvent` that writes `events.out.tfevents.*`: scalars of every step (`train/nll`, `train/lr`, ..., and what the model logs, as `model/maxVio`),
 * of measurements (`validation/bitsPerByte`, `validation/loss`, `validation/reward`, `validation/preferred`; `validation/web/bitsPerByte` of one of several held-out streams, `ema/bitsPerByte` and so on of averaged weights), of layers with experts when their loads are told (`experts/layers.3/maxVio`, over the steps since the last time, `stepMaxVio`, of single steps; dead experts, share of
 * dropped choices, range of the bias), of what listeners log, and the run's settings as text and hyperparameters. `tensorboard --logdir runs` shows all
 * runs in a folder side by side. A run that goes on begins another file, which tells TensorBoard to forget the steps that are taken again. Of several ranks
 * the first writes. Where the files cannot be written, a notice says so and training goes on.
 *
 * @param folder Default: that of the run (`out`).
 * @throws MoeError E_CONFIG when there is neither, as the run begins
 */
export function tensorBoard(folder?: string | URL): (event: TrainEvent, reporter?: TrainReporter) => void {
  const given = folder === undefined ? undefined : pathOf('tensorBoard', folder)
  let file: LogFile | undefined
  let failing = false

  const begin = (out: string | undefined) => {
    const into = given ?? out
    if (into === undefined) {
      throw new MoeError({
        code: 'E_CONFIG',
        op: 'tensorBoard',
        problem: 'there is no folder to write to',
        fix: 'give the run one (out), or pass one: tensorBoard(folder)',
      })
    }
    const seconds = String(Math.floor(Date.now() / 1000)).padStart(10, '0')
    file = new LogFile(join(into, `events.out.tfevents.${seconds}.${hostname()}.${process.pid}.${files++}`))
    failing = false
    return into
  }

  return (event, reporter) => {
    if (event.type === 'start' && event.rank === 0) {
      const into = begin(event.out)
      try {
        mkdirSync(into, { recursive: true })
      } catch (error) {
        file = undefined
        reporter?.notify(`nothing is written for TensorBoard: ${(error as Error).message}`)
      }
    }
    if (file === undefined || event.type === 'notice') return
    try {
      for (const record of recordsOf(event)) file.append(record)
      if (event.type !== 'step') file.flush()
      if (file.waitingBytes === 0) failing = false
    } catch (error) {
      const reason = isMoeError(error) ? error.problem : `${error}`
      const patient = file.waitingBytes < patienceBytes
      if (!patient) file = undefined
      if (!patient) reporter?.notify(`nothing is written for TensorBoard from here on: ${reason}`)
      else if (!failing) reporter?.notify(`what is for TensorBoard waits and training goes on: ${reason}`)
      failing = true
    }
  }
}

function recordsOf(event: TrainEvent): Buffer[] {
  const wallTime = Date.now() / 1000
  switch (event.type) {
    case 'start': {
      const { settings, fromStep: step, parameters, backend, device } = event
      // What a step is told again with counts for the last time; at 0 everything does.
      const session = step === 0 ? 0 : step + 1
      const told = { backend, device, parameters, ...settings }
      return [
        eventRecord({ wallTime, fileVersion: 'brain.Event:2' }),
        eventRecord({ wallTime, step: session, sessionStart: true }),
        eventRecord({ wallTime, step, values: [text('settings', table(told)), hyperparameters(told, wallTime)] }),
      ]
    }
    case 'step': {
      const { step, loss, nll, lr, gradNorm, tokensPerSecond, metrics } = event
      return [
        eventRecord({
          wallTime,
          step,
          values: [...scalars('train', { loss, nll, lr, gradNorm, tokensPerSecond }), ...scalars('model', metrics)],
        }),
      ]
    }
    case 'loads': {
      const { step, layers } = event
      const values = layers.flatMap(layer => scalars(`experts/${layer.name}`, balanceOf(layer)))
      return [eventRecord({ wallTime, step, values })]
    }
    case 'log':
      return [eventRecord({ wallTime, step: event.step, values: scalars(undefined, event.values) })]
    case 'evaluation': {
      const measured = ({ loss, bitsPerByte, reward = Number.NaN, preferred = Number.NaN }: Evaluation) => {
        return { loss, bitsPerByte, reward, preferred }
      }
      const { step, ema } = event
      const averaged = ema ? scalars('ema', measured(ema)) : []
      const bySource = Object.entries(event.sources ?? {}).flatMap(([name, { loss, bitsPerByte }]) =>
        scalars(`validation/${name}`, { loss, bitsPerByte }),
      )
      const values = [...scalars('validation', measured(event)), ...bySource, ...averaged]
      return [eventRecord({ wallTime, step, values })]
    }
    default:
      return []
  }
}

function balanceOf({ load, stepMaxVio, dropped, bias }: LayerLoads): Record<string, number> {
  const choices = load.reduce((sum, count) => sum + count, 0)
  return {
    maxVio: maxVio(load),
    stepMaxVio,
    deadExperts: load.filter(count => count === 0).length,
    ...(dropped !== undefined && { dropped: dropped / choices }),
    ...(bias && { leastBias: Math.min(...bias), largestBias: Math.max(...bias) }),
  }
}

function scalars(group: string | undefined, numbers: Readonly<Record<string, number>>): Buffer[] {
  return Object.entries(numbers).flatMap(([name, value]) =>
    Number.isNaN(value) ? [] : [scalar(group === undefined ? name : `${group}/${name}`, value)],
  )
}

/** As Markdown. */
function table(settings: Readonly<Record<string, unknown>>): string {
  const cell = (value: unknown) => String(value).replaceAll('|', '\\|')
  const rows = Object.entries(settings).map(([name, value]) => `| ${cell(name)} | ${cell(value)} |`)
  return ['| setting | value |', '| --- | --- |', ...rows].join('\n')
}
