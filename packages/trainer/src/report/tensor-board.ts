/** @file Writes a run as event files for TensorBoard. */
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

/** Maximum number of bytes to buffer while the disk cannot be written. */
const patienceBytes = 1 << 24

/** Number of files that this process has created, to make names unique within a second. */
let files = 0

/**
 * Returns a listener for `onEvent` that writes `events.out.tfevents.*` files, which `tensorboard --logdir runs` shows. They
 * contain:
 *
 * - for each step, `train/nll`, `train/lr` and so on, and what the model logs (`model/maxVio`);
 * - for each evaluation, `validation/bitsPerByte`, `/loss`, `/reward` and `/preferred`, the same for each of several held-out
 *   streams (`validation/web/bitsPerByte`), and for EMA weights (`ema/bitsPerByte`);
 * - for each layer with experts, `experts/layers.3/maxVio` over the steps since the last `loads` event, `stepMaxVio` of single
 *   steps, dead experts, the share of dropped tokens, and the range of the bias;
 * - numbers that listeners log;
 * - the run's settings, as text and hyperparameters.
 *
 * A resumed run starts another file, which makes TensorBoard discard the steps that are repeated. Of several ranks,
 * only rank 0 writes. If the files cannot be written, a notice is emitted and training continues.
 *
 * @param folder Default: the folder of the run (`out`)
 * @throws MoeError E_CONFIG when the run starts, if there is neither
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
        fix: 'set out, or pass a folder: tensorBoard(folder)',
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
        reporter?.notify(`TensorBoard files are not written: ${(error as Error).message}`)
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
      if (!patient) reporter?.notify(`TensorBoard files are no longer written: ${reason}`)
      else if (!failing)
        reporter?.notify(`TensorBoard files cannot be written; records are buffered and training continues: ${reason}`)
      failing = true
    }
  }
}

function recordsOf(event: TrainEvent): Buffer[] {
  const wallTime = Date.now() / 1000
  switch (event.type) {
    case 'start': {
      const { settings, fromStep: step, parameters, backend, device } = event
      // TensorBoard discards earlier records from this step on. At 0, everything is kept.
      const session = step === 0 ? 0 : step + 1
      const shownSettings = { backend, device, parameters, ...settings }
      return [
        eventRecord({ wallTime, fileVersion: 'brain.Event:2' }),
        eventRecord({ wallTime, step: session, sessionStart: true }),
        eventRecord({
          wallTime,
          step,
          values: [text('settings', table(shownSettings)), hyperparameters(shownSettings, wallTime)],
        }),
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

/** Settings as a Markdown table. */
function table(settings: Readonly<Record<string, unknown>>): string {
  const cell = (value: unknown) => String(value).replaceAll('|', '\\|')
  const rows = Object.entries(settings).map(([name, value]) => `| ${cell(name)} | ${cell(value)} |`)
  return ['| setting | value |', '| --- | --- |', ...rows].join('\n')
}
