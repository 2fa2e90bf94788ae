/** @file The state of a run, as read from its folder. */
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { isLocked } from '../checkpoints/folder-lock.ts'
import { type Fields, fieldsOf, isFields, isNumber, isStep } from './json-fields.ts'
import { type LoggedCurve, LoggedNumbers } from './logged-numbers.ts'
import { RunSeries, type SeriesPatch } from './run-series.ts'
import { TailedFile } from './tailed-file.ts'
import { WatchedLoads } from './watched-loads.ts'
import { type StepLine, WatchedLog } from './watched-log.ts'

/** An evaluation on held-out data. */
export interface ValidationPoint {
  /** Steps done. */
  readonly step: number
  /** Nats per token. */
  readonly loss: number | null
  /** Bits per byte; null if the data does not record its bytes. */
  readonly bitsPerByte: number | null
  /** Mean reward of the sampled texts, in a run that learns from rewards. */
  readonly reward?: number
  /** Share of held-out pairs whose chosen text is preferred, in a run that learns from preferences. */
  readonly preferred?: number
  /** The same numbers for the EMA weights, if the run keeps them. */
  readonly ema?: Omit<ValidationPoint, 'step' | 'ema' | 'final'>
  /** Whether this is the final evaluation, which uses more of the data. */
  readonly final: boolean
}

/**
 * Status of a run. `silent`: its process is on another machine and has not written for minutes. `killed`: its process
 * ended without reporting an end or failure.
 */
export type RunStatus = 'training' | 'finished' | 'interrupted' | 'time' | 'failed' | 'killed' | 'silent' | 'unknown'

/** The state of a run, as read from its folder. */
export interface RunState {
  /** Path relative to the watched folder. */
  readonly name: string
  /** Status of the run. */
  readonly status: RunStatus
  /** Steps done. */
  readonly step: number
  /** Steps of the whole run, if known. */
  readonly steps: number | null
  /** Positions per second of recent steps; null before the first step. */
  readonly tokensPerSecond: number | null
  /** Estimated seconds of training left, excluding evaluation and saving. */
  readonly secondsLeft: number | null
  /** Layers with expert loads, and the steps of the first and last line of `loads.jsonl`; null without experts. */
  readonly loads: { readonly first: number; readonly last: number; readonly layers: readonly string[] } | null
  /** Time when its files last changed, in milliseconds since 1970. */
  readonly changed: number
  /** Model and machine, from the `start` event. */
  readonly about: Readonly<Record<string, unknown>>
  /** Settings that determine its numbers: steps, batch size, learning rate, optimizer, data. */
  readonly settings: Readonly<Record<string, unknown>>
  /** Evaluations on held-out data, oldest first. */
  readonly validation: readonly ValidationPoint[]
  /** Numbers that listeners logged, and those of each source of held-out data (`validation/web/bitsPerByte`). */
  readonly logged: Readonly<Record<string, LoggedCurve>>
  /** Notices of the run, oldest first. */
  readonly notices: readonly string[]
  /** Why the run failed, or why its files cannot be read. */
  readonly problem: string | null
  /** Number of lines that could not be parsed. */
  readonly badLines: number
}

const quietMs = 5 * 60_000
/** Maximum number of evaluations to keep. When there are more, every second one is dropped. */
const most = 2000
const ends: ReadonlySet<unknown> = new Set(['finished', 'interrupted', 'time'])

export class WatchedRun {
  readonly name: string
  readonly folder: string
  readonly metrics: WatchedLog
  readonly events: TailedFile
  readonly loads: WatchedLoads
  series: RunSeries
  readonly #points: number | undefined
  #step = 0
  /** Positions trained on. */
  #tokens = 0
  #speed = 0
  #lines = 0
  #start: Fields = {}
  #status: RunStatus = 'unknown'
  /** Status according to the last event that reported one. */
  #reportedStatus: RunStatus | undefined
  #validation: ValidationPoint[] = []
  readonly #logged = new LoggedNumbers()
  #notices: string[] = []
  #error: string | undefined

  constructor(name: string, folder: string, points?: number) {
    this.name = name
    this.folder = folder
    this.#points = points
    this.metrics = new WatchedLog(join(folder, 'metrics.jsonl'))
    this.events = new TailedFile(join(folder, 'events.jsonl'))
    this.loads = new WatchedLoads(folder)
    this.series = new RunSeries(points)
  }

  /** Reads what was added. @returns whether there is more to read */
  async refresh(): Promise<boolean> {
    const more = await this.metrics.refresh(
      line => this.#metricsLine(line),
      () => this.#forgetMetrics(),
    )
    const moreLoads = await this.loads.refresh()
    const moreEvents = await this.events.read(
      text => this.#eventLine(text),
      () => this.#forgetEvents(),
    )
    if (this.events.changed === 0) await this.#readSummary()
    this.#status = this.#statusNow()
    return more || moreLoads || moreEvents
  }

  /**
   * Reads the metrics of steps from `from` to `to` again, as at most `most` points, which cover fewer lines each than
   * those of the whole run.
   */
  async seriesBetween(from: number, to: number, most: number): Promise<SeriesPatch> {
    const empty = () => new RunSeries(Math.max(1, Math.floor(most / 2)))
    let series = empty()
    await this.metrics.between(
      from,
      to,
      line => series.push(line.step, line),
      () => {
        series = empty()
      },
    )
    return series.patch()
  }

  get state(): RunState {
    const { steps, settings, type, time, ...about } = this.#start
    const left = isNumber(steps) && this.#tokens > 0 && this.#speed > 0 && this.#status === 'training'
    return {
      name: this.name,
      status: this.#status,
      step: this.#step,
      steps: isNumber(steps) ? steps : null,
      tokensPerSecond: this.#speed > 0 ? this.#speed : null,
      secondsLeft: left ? Math.max(0, ((steps - this.#step) * this.#tokens) / this.#step / this.#speed) : null,
      loads: this.loads.span,
      changed: Math.max(this.metrics.file.changed, this.events.changed),
      about: { ...about, began: time },
      settings: isFields(settings) ? settings : {},
      validation: this.#validation,
      logged: this.#logged.curves,
      notices: this.#notices,
      problem: this.#error ?? this.metrics.file.problem ?? this.events.problem ?? null,
      badLines: this.metrics.badLines,
    }
  }

  #metricsLine(line: StepLine): void {
    const { step } = line
    this.series.push(step, line)
    this.#step = step
    this.#tokens = isNumber(line['tokens']) ? line['tokens'] : 0
    const speed = line['tokensPerSecond']
    // The first steps fill caches and would distort the estimate for long.
    if (isNumber(speed)) this.#speed = this.#lines++ < 2 ? speed : 0.9 * this.#speed + 0.1 * speed
  }

  #forgetMetrics(): void {
    this.series = new RunSeries(this.#points)
    this.#step = 0
    this.#tokens = 0
    this.#speed = 0
    this.#lines = 0
  }

  #eventLine(text: string): void {
    const event = fieldsOf(text)
    switch (event?.['type']) {
      case 'start': {
        const { fromStep } = event
        this.#start = event
        this.#reportedStatus = undefined
        this.#error = undefined
        // Evaluations after the step of the resume will be repeated.
        if (isNumber(fromStep)) {
          this.#validation = this.#validation.filter(({ step }) => step <= fromStep)
          this.#logged.cutBack(fromStep)
        }
        break
      }
      case 'evaluation':
        this.#measured(event)
        break
      case 'log':
        if (isStep(event['step']) && isFields(event['values'])) this.#logged.push(event['step'], event['values'])
        break
      case 'notice':
        if (typeof event['message'] === 'string') this.#notices = [...this.#notices.slice(-19), event['message']]
        break
      case 'end':
        this.#ended(event['result'])
        break
      case 'fail':
        this.#reportedStatus = 'failed'
        this.#error = isFields(event['error']) ? String(event['error']['message']) : String(event['error'])
        break
    }
  }

  #measured({ step, final, ema, ...measured }: Fields): void {
    if (!isStep(step)) return
    for (const [source, numbers] of Object.entries(isFields(measured['sources']) ? measured['sources'] : {})) {
      if (!isFields(numbers)) continue
      const { loss, bitsPerByte } = numbers
      this.#logged.push(step, {
        [`validation/${source}/loss`]: loss,
        [`validation/${source}/bitsPerByte`]: bitsPerByte,
      })
    }
    const averaged = isFields(ema) && { ema: measurement(ema) }
    const point = { step, ...measurement(measured), ...averaged, final: final === true }
    // A run that is resumed after its last step evaluates once more.
    const all = [...this.#validation.filter(other => other.step !== step), point].sort((a, b) => a.step - b.step)
    // From the end, so that the latest one stays.
    this.#validation = all.length <= most ? all : all.filter((_, i) => (all.length - i) % 2 === 1)
  }

  #ended(result: unknown): void {
    const stopped = isFields(result) ? result['stopped'] : undefined
    this.#reportedStatus = ends.has(stopped) ? (stopped as RunStatus) : 'finished'
  }

  #forgetEvents(): void {
    this.#start = {}
    this.#reportedStatus = undefined
    this.#validation = []
    this.#logged.clear()
    this.#notices = []
    this.#error = undefined
  }

  /** Reads the result in a folder without `events.jsonl`. */
  async #readSummary(): Promise<void> {
    const summary = fieldsOf(await readFile(join(this.folder, 'summary.json'), 'utf8').catch(() => ''))
    if (summary === undefined) return
    const { steps, validation, ema, backend, device, precision, parameters } = summary
    this.#forgetEvents()
    this.#start = { backend, device, precision, parameters, steps }
    if (isFields(validation)) this.#measured({ ...validation, ema, step: steps, final: true })
    this.#ended(summary)
  }

  #statusNow(): RunStatus {
    if (this.#reportedStatus !== undefined) return this.#reportedStatus
    const taken = isLocked(this.folder)
    if (taken === true) return 'training'
    const quiet = Date.now() - Math.max(this.metrics.file.changed, this.events.changed) > quietMs
    if (taken === undefined) return quiet ? 'silent' : 'training'
    return this.events.changed > 0 ? 'killed' : 'unknown'
  }
}

const measurement = ({ loss, bitsPerByte, reward, preferred }: Fields) => {
  return {
    loss: numberOr(loss),
    bitsPerByte: numberOr(bitsPerByte),
    ...(isNumber(reward) && { reward }),
    ...(isNumber(preferred) && { preferred }),
  }
}

const numberOr = (value: unknown) => (isNumber(value) ? value : null)
