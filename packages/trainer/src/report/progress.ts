/**
 * @file Shows the progress of a run: one line that is redrawn on a terminal, plain lines from time to time elsewhere.
 */
import { checkOptions } from '@moe/core'
import type { Evaluation } from '../evaluate.ts'
import type { EvaluationEvent, StartEvent, StepEvent, TrainEvent } from '../events.ts'
import { isColorless, type ProgressStream, standardError } from '../host.ts'

/** Options of `progress`. */
export interface ProgressOptions {
  /** Stream to write to. Default: standard error, or the console in a browser. */
  readonly stream?: ProgressStream | undefined
  /** Steps between two lines if the stream is not a terminal. Default: a twentieth of the run. */
  readonly every?: number | undefined
  /** Whether to use colors. Default: on a terminal, unless NO_COLOR is set. */
  readonly color?: boolean | undefined
  /** Clock in milliseconds, for tests. */
  readonly now?: (() => number) | undefined
}

const redrawMs = 100
/** Time between two progress lines of an evaluation, if the stream is not a terminal. */
const patienceMs = 10_000
const barWidth = 24

const guarded = new WeakSet<ProgressStream>()

/** Keeps training if the terminal is closed, or the program that reads the pipe ends. */
function ignoreErrors(stream: ProgressStream): void {
  if (guarded.has(stream)) return
  guarded.add(stream)
  stream.on?.('error', () => undefined)
}

/** Returns a listener that shows progress. */
export function progress(options: ProgressOptions = {}): (event: TrainEvent) => void {
  checkOptions('progress', options, { stream: true, every: true, color: true, now: true })
  const { stream = standardError(), now = () => performance.now() } = options
  const terminal = stream.isTTY === true
  const color = options.color ?? (terminal && !isColorless())
  const paint = (code: number, text: string) => (color ? `\x1b[${code}m${text}\x1b[39m` : text)
  const bold = (text: string) => (color ? `\x1b[1m${text}\x1b[22m` : text)
  let start: StartEvent | undefined
  let speed = 0
  let drawn = false
  let drawnAt = Number.NEGATIVE_INFINITY
  let printedAt = Number.NEGATIVE_INFINITY
  let last: StepEvent | undefined

  const clear = () => {
    if (drawn) stream.write('\r\x1b[2K')
    drawn = false
  }
  const print = (text: string) => {
    clear()
    stream.write(`${text}\n`)
    printedAt = now()
  }
  const redraw = (steps: number, event: StepEvent) => {
    const width = stream.columns ?? 100
    const parts = fitting(stepParts(start, event, speed), width)
    const wide = parts.join('  ').length + barWidth + 2 < width
    const bar = wide ? `${paint(32, barOf(event.step / steps))}  ` : ''
    clear()
    stream.write(bar + parts.map((part, i) => (i === 1 ? bold(part) : part)).join('  '))
    drawn = true
    drawnAt = now()
  }

  return (event: TrainEvent) => {
    switch (event.type) {
      case 'start':
        ignoreErrors(stream)
        start = event
        print(startLine(event))
        if (event.sources) print(sourcesLine(event.sources))
        break
      case 'step': {
        const { steps = event.step, fromStep = 0 } = start ?? {}
        last = event
        // The first step fills caches and would distort the estimate for long.
        speed = event.step <= fromStep + 2 ? event.tokensPerSecond : 0.9 * speed + 0.1 * event.tokensPerSecond
        const every = options.every ?? Math.max(1, Math.round(steps / 20))
        if (terminal) {
          if (now() - drawnAt >= redrawMs || event.step === steps) redraw(steps, event)
        } else if (event.step % every === 0 || event.step === fromStep + 1 || event.step === steps) {
          print(stepParts(start, event, speed).join('  '))
        }
        break
      }
      case 'evaluating':
        if (terminal ? now() - drawnAt >= redrawMs : now() - printedAt >= patienceMs) {
          const text = `step ${event.step}: evaluating, ${Math.floor(100 * event.done)} %`
          clear()
          stream.write(terminal ? text : `${text}\n`)
          drawn = terminal
          drawnAt = now()
          printedAt = drawnAt
        }
        break
      case 'evaluation':
        print(evaluationLine(event, paint))
        if (terminal && last !== undefined && start !== undefined && !event.final) redraw(start.steps, last)
        break
      case 'checkpoint':
        if (!terminal) print(`saved ${event.path}`)
        break
      case 'notice':
        print(`${paint(33, 'note')} ${event.message}`)
        break
      case 'stop': {
        const what = event.reason === 'time' ? 'time limit reached' : 'interrupted'
        const where =
          event.checkpoint === undefined
            ? 'nothing was saved, because the run has no folder (out)'
            : `saved ${event.checkpoint}; run the same command with { resume: true } to continue`
        print(`${paint(33, what)} after step ${event.step} of ${event.steps}: ${where}`)
        break
      }
      case 'end':
        clear()
        break
      case 'fail':
        // Keeps the line, so that the error message starts below it.
        if (drawn) stream.write('\n')
        drawn = false
        break
    }
  }
}

/** As many parts as fit on a line: a wrapped line cannot be redrawn. */
function fitting(parts: readonly string[], width: number): string[] {
  let used = 0
  return parts.filter(part => {
    used += part.length + 2
    return used < width
  })
}

function startLine(event: StartEvent): string {
  const from = event.fromStep > 0 ? `, resuming after step ${event.fromStep}` : ''
  const epochs = event.epochs >= 9.95 ? event.epochs.toFixed(0) : event.epochs.toFixed(1)
  // Of the steps to come: those before may have had other batch sizes.
  const left = event.steps - event.fromStep
  const mean = event.tokens > 0 && left > 0 ? (event.tokens - event.fromTokens) / left : event.tokensPerStep
  const grows = mean !== event.tokensPerStep
  const steps =
    event.fromStep > 0 && left > 0 ? `steps ${event.fromStep + 1} to ${event.steps}` : `${event.steps} steps`
  const size = event.textsPerStep
    ? `${event.textsPerStep} texts`
    : `${grows ? 'on average ' : ''}${grouped(Math.round(mean))} tokens`
  return `${compact(event.parameters)} parameters on ${event.backend} (${event.device}, ${event.precision}); ${steps} of ${size}, ${epochs} epochs of ${compact(event.trainingTokens)}${from}`
}

function sourcesLine(sources: NonNullable<StartEvent['sources']>): string {
  const parts = Object.entries(sources).map(([name, { size, share, epochs }]) => {
    return `${name} ${(100 * share).toFixed(1)} % (${epochs.toFixed(epochs < 9.95 ? 2 : 0)} epochs of ${compact(size)})`
  })
  return `sources: ${parts.join(', ')}`
}

function stepParts(start: StartEvent | undefined, event: StepEvent, speed: number): string[] {
  const { steps = event.step, tokens: inAll = 0 } = start ?? {}
  const { maxVio, reward, preferred } = event.metrics
  const judged = reward === undefined ? preferred : reward
  const name = reward === undefined ? 'preferred' : 'reward'
  const tokensLeft = inAll > 0 ? inAll - event.tokens : ((steps - event.step) * event.tokens) / event.step
  const left = speed > 0 ? Math.max(0, tokensLeft) / speed : 0
  return [
    `step ${String(event.step).padStart(String(steps).length)}/${steps}`,
    judged === undefined ? `loss ${event.nll.toFixed(3)}` : `${name} ${judged.toFixed(3)}`,
    `${grouped(Math.round(speed))} tokens/s`,
    ...(maxVio === undefined ? [] : [`MaxVio ${maxVio.toFixed(2)}`]),
    `ETA ${clock(left)}`,
  ]
}

function evaluationLine(event: EvaluationEvent, paint: (code: number, text: string) => string): string {
  const measured = (of: Evaluation) => {
    const bytes = Number.isNaN(of.bitsPerByte) ? '' : `, ${paint(36, `${of.bitsPerByte.toFixed(3)} bits per byte`)}`
    const judged = (['reward', 'preferred'] as const).map(name => {
      const value = of[name]
      return value === undefined ? '' : `${name} ${paint(36, value.toFixed(3))}, `
    })
    const sources = Object.entries(of.sources ?? {}).map(([name, { loss, bitsPerByte }]) => {
      return `${name} ${Number.isNaN(bitsPerByte) ? loss.toFixed(3) : bitsPerByte.toFixed(3)}`
    })
    return `${judged.join('')}loss ${of.loss.toFixed(3)}${bytes}${sources.length > 0 ? ` (${sources.join(', ')})` : ''}`
  }
  const { step, tokens, seconds, ema } = event
  const averaged = ema ? `; EMA ${measured(ema)}` : ''
  const took = seconds + (ema?.seconds ?? 0)
  return `step ${step}: held-out ${measured(event)}${averaged} (${grouped(tokens)} tokens, ${took.toFixed(1)} s)`
}

function barOf(fraction: number): string {
  const filled = Math.round(fraction * barWidth)
  return '━'.repeat(filled) + '╌'.repeat(barWidth - filled)
}

const grouped = (value: number) => value.toLocaleString('en-US')

function compact(value: number): string {
  if (value >= 1e9) return `${(value / 1e9).toFixed(2)}B`
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)}M`
  return value >= 1e4 ? `${(value / 1e3).toFixed(0)}k` : grouped(value)
}

function clock(seconds: number): string {
  const whole = Math.round(seconds)
  const two = (value: number) => String(value).padStart(2, '0')
  const hours = Math.floor(whole / 3600)
  const minutes = Math.floor(whole / 60) % 60
  return hours > 0 ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`
}
