/** @file A run as its folder shows it, whoever writes there. */
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { isLocked } from '../checkpoints/folder-lock.ts'
import { type Fields, fieldsOf, isFields, isNumber, isStep } from './json-fields.ts'
import { type LoggedCurve, LoggedNumbers } from './logged-numbers.ts'
import { RunSeries, type SeriesPatch } from './run-series.ts'
import { TailedFile } from './tailed-file.ts'
import { WatchedLoads } from './watched-loads.ts'
import { type StepLine, WatchedLog } from './watched-log.ts'

/** A measurement of held-out data. */
export interface HeldOutPoint {
  /** Steps done. */
  readonly step: number
  /** Nats per token. */
  readonly loss: number | null
  /** Null where the data does not know its bytes. */
  readonly bitsPerByte: number | null
  /** Mean of the texts that were made, in a run that learns from rewards. */
  readonly reward?: number
  /** The same numbers of the averaged weights, in a run that keeps them. */
  readonly ema?: Omit<HeldOutPoint, 'step' | 'ema' | 'final'>
  /** On all of the data. */
  readonly final: boolean
}

/** `silent`: its process is on another machine and has not written for minutes. `killed`: it ended without a word. */
export type RunStatus = 'training' | 'finished' | 'interrupted' | 'time' | 'failed' | 'killed' | 'silent' | 'unknown'

/** A run as its folder shows it. */
export interface RunState {
  /** Path below the folder that is watched. */
  readonly name: string
  /** What has become of it. */
  readonly status: RunStatus
  /** Steps done, and of the whole run where that is known. */
  readonly step: number
  /** Steps of the whole run, where that is known. */
  readonly steps: number | null
  /** Positions per second of the latest step; null before there is one. */
  readonly tokensPerSecond: number | null
  /** Of training, without measurements and saving. */
  readonly secondsLeft: number | null
  /** Layers whose experts' loads are known, and the steps of the first and the last line of `loads.jsonl`. */
  readonly loads: { readonly first: number; readonly last: number; readonly layers: readonly string[] } | null
  /** When its files were last written to, in milliseconds since 1970. */
  readonly changed: number
  /** Model and machine: what the run told at its start. */
  readonly about: Readonly<Record<string, unknown>>
  /** What decides its numbers: steps, batch, learning rate, optimizer, data. */
  readonly settings: Readonly<Record<string, unknown>>
  /** Measurements of held-out data, oldest first. */
  readonly heldOut: readonly HeldOutPoint[]
  /** Numbers that listeners logged, and those of each source of held-out data (`validation/web/bitsPerByte`). */
  readonly logged: Readonly<Record<string, LoggedCurve>>
  /** What the user should know, oldest first. */
  readonly notices: readonly string[]
  /** Why it failed, or why its files cannot be read. */
  readonly problem: string | null
  /** Lines that are no lines of a log. */
  readonly badLines: number
}

const quietMs = 5 * 60_000
/** More of a kind are not kept of a run. */
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
  /** What the last event but notices and measurements said. */
  #told: RunStatus | undefined
  #heldOut: HeldOutPoint[] = []
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

  /** Reads what was added. @returns whether there is more to read at once */
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

  /** The numbers of steps from `from` to `to`, read again: at most `most` points, which are of fewer lines each than those of the whole run. */
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
      heldOut: this.#heldOut,
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
    // The first steps warm up caches and would spoil the estimate for long.
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
        this.#told = undefined
        this.#error = undefined
        // What is measured again counts.
        if (isNumber(fromStep)) {
          this.#heldOut = this.#heldOut.filter(({ step }) => step <= fromStep)
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
        this.#told = 'failed'
        this.#error = isFields(event['error']) ? String(event['error']['message']) : String(event['error'])
        break
    }
  }

  #measured({ step, final, ema, ...measured }: Fields): void {
    if (!isStep(step) || this.#heldOut.length >= most) return
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
    // A run that goes on after its last step measures once more.
    this.#heldOut = [...this.#heldOut.filter(other => other.step !== step), point].sort((a, b) => a.step - b.step)
  }

  #ended(result: unknown): void {
    const stopped = isFields(result) ? result['stopped'] : undefined
    this.#told = ends.has(stopped) ? (stopped as RunStatus) : 'finished'
  }

  #forgetEvents(): void {
    this.#start = {}
    this.#told = undefined
    this.#heldOut = []
    this.#logged.clear()
    this.#notices = []
    this.#error = undefined
  }

  /** Of a folder without `events.jsonl`, the result. */
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
    if (this.#told !== undefined) return this.#told
    const taken = isLocked(this.folder)
    if (taken === true) return 'training'
    const quiet = Date.now() - Math.max(this.metrics.file.changed, this.events.changed) > quietMs
    if (taken === undefined) return quiet ? 'silent' : 'training'
    return this.events.changed > 0 ? 'killed' : 'unknown'
  }
}

const measurement = ({ loss, bitsPerByte, reward }: Fields) => {
  return { loss: numberOr(loss), bitsPerByte: numberOr(bitsPerByte), ...(isNumber(reward) && { reward }) }
}

const numberOr = (value: unknown) => (isNumber(value) ? value : null)
