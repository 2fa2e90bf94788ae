/** @file Learning rate schedules: pure functions of the step, so that a resumed run needs no state for them. */
import { checkOptions, MoeError, shown } from '@moe/core'

/** Returns the multiplier of the peak learning rate at a step (counted from 0). */
export type Schedule = (step: number) => number

/** The multiplier of a schedule at a step. @throws MoeError E_CONFIG unless it is a finite number of at least 0 */
export function scheduled(schedule: Schedule, step: number): number {
  const factor = schedule(step)
  if (Number.isFinite(factor) && factor >= 0) return factor
  throw new MoeError({
    code: 'E_CONFIG',
    op: 'train',
    problem: `schedule(${step}) is ${shown(factor)}`,
    fix: 'return a finite number of at least 0 for every step; lr is multiplied by it',
  })
}

/** Options of a schedule with warm-up. */
export interface CosineOptions {
  /** Number of steps of the whole run. */
  readonly steps: number
  /** Steps of linear warm-up from 0. Default: a tenth of the run, at most 100. */
  readonly warmup?: number | undefined
  /** Multiplier at the last step. Default 0.1 (`warmupStableDecay`: 0). */
  readonly floor?: number | undefined
}

/** Returns a schedule with linear warm-up, then a cosine decay to `floor` (Loshchilov & Hutter 2017). */
export function warmupCosine(options: CosineOptions): Schedule {
  checkOptions('warmupCosine', options, { steps: true, warmup: true, floor: true })
  const { steps, warmup = defaultWarmup(steps), floor = 0.1 } = options
  checkSchedule('warmupCosine', { steps, warmup }, floor)
  const down = Math.max(1, steps - warmup)
  return step => {
    if (step < warmup) return (step + 1) / warmup
    const progress = Math.min(1, (step + 1 - warmup) / down)
    return floor + (1 - floor) * 0.5 * (1 + Math.cos(Math.PI * progress))
  }
}

/** Options of `warmupStableDecay`. */
export interface StableDecayOptions extends CosineOptions {
  /** Steps of the final decay. Default: a fifth of the run. */
  readonly decay?: number | undefined
}

/** Returns a schedule with linear warm-up, a constant phase, then a 1 - sqrt decay to `floor` (Hägele et al. 2024). */
export function warmupStableDecay(options: StableDecayOptions): Schedule {
  checkOptions('warmupStableDecay', options, { steps: true, warmup: true, decay: true, floor: true })
  const { steps, warmup = defaultWarmup(steps), decay = Math.round(steps / 5), floor = 0 } = options
  checkSchedule('warmupStableDecay', { steps, warmup, decay }, floor)
  return step => {
    if (step < warmup) return (step + 1) / warmup
    const progress = decay === 0 ? 0 : (step + 1 - (steps - decay)) / decay
    return progress <= 0 ? 1 : floor + (1 - floor) * (1 - Math.sqrt(Math.min(1, progress)))
  }
}

/** Returns a schedule with linear warm-up over `warmup` steps that is constant afterwards. */
export function warmupConstant(options: { readonly warmup: number }): Schedule {
  checkOptions('warmupConstant', options, { warmup: true })
  const { warmup } = options
  checkSchedule('warmupConstant', { warmup }, 0)
  return step => (step < warmup ? (step + 1) / warmup : 1)
}

/**
 * A segment of a schedule, `steps` long: either constant (`at`), or moving to a value that its last step reaches
 * (`to`).
 */
export type ScheduleSegment =
  | { readonly steps: number; readonly at: number }
  | {
      readonly steps: number
      /** Start value. Default: the end of the previous segment. */
      readonly from?: number
      readonly to: number
      /** `'cosine'` is half a cosine wave. Default `'linear'`. */
      readonly shape?: 'linear' | 'cosine'
    }

/**
 * Returns a schedule that consists of consecutive segments. After the last one, it stays at that segment's end. Use it
 * for learning rates and for any other function of the step: micro-batches (`accumulate`), loss weights, the bias
 * update speed.
 *
 * @param options.steps total length of all segments in steps; the segments' own lengths are then proportions, for
 *   example numbers of tokens. Default: the segments' lengths are steps
 * @throws MoeError E_CONFIG
 */
export function piecewise(segments: readonly ScheduleSegment[], options: { readonly steps?: number } = {}): Schedule {
  checkOptions('piecewise', options, { steps: true })
  checkSegments(segments, options.steps)
  const total = segments.reduce((sum, { steps }) => sum + steps, 0)
  const scale = options.steps === undefined ? 1 : options.steps / total
  let shares = 0
  let before = 0
  const parts = segments.map(segment => {
    const first = Math.round(shares * scale)
    shares += segment.steps
    const level = 'at' in segment
    const from = level ? segment.at : (segment.from ?? before)
    before = level ? segment.at : segment.to
    const shape = (!level && segment.shape) || 'linear'
    return { first, end: Math.round(shares * scale), from, to: before, shape }
  })
  return step => {
    const part = parts.find(({ end }) => step < end)
    if (part === undefined) return before
    const { first, end, from, to, shape } = part
    const progress = (step + 1 - first) / (end - first)
    if (progress === 1) return to
    return from + (to - from) * (shape === 'linear' ? progress : 0.5 * (1 - Math.cos(Math.PI * progress)))
  }
}

function checkSegments(segments: readonly ScheduleSegment[], steps: number | undefined): void {
  const problems: string[] = []
  const isLength = (value: unknown) =>
    steps === undefined
      ? Number.isSafeInteger(value) && (value as number) >= 0
      : Number.isFinite(value) && (value as number) >= 0
  if (!Array.isArray(segments) || segments.length === 0) problems.push(`the segments are ${shown(segments)}`)
  else {
    segments.forEach((segment: ScheduleSegment, i) => {
      if ('at' in segment) checkOptions(`piecewise segment ${i}`, segment, { steps: true, at: true })
      else checkOptions(`piecewise segment ${i}`, segment, { steps: true, from: true, to: true, shape: true })
      const { steps: length, ...values } = segment
      if (!isLength(length)) problems.push(`steps of segment ${i} is ${shown(length)}`)
      const ends =
        'at' in values ? { at: values.at } : { to: values.to, ...(values.from !== undefined && { from: values.from }) }
      for (const [name, value] of Object.entries(ends))
        if (!Number.isFinite(value)) problems.push(`${name} of segment ${i} is ${shown(value)}`)
      if ('shape' in values && !['linear', 'cosine', undefined].includes(values.shape))
        problems.push(`shape of segment ${i} is ${shown(values.shape)}`)
    })
    if (!('at' in segments[0]) && segments[0].from === undefined) problems.push('from of segment 0 is missing')
    if (segments.every(({ steps }) => steps === 0)) problems.push('all segments are empty')
  }
  if (steps !== undefined && (!Number.isSafeInteger(steps) || steps < 1)) problems.push(`steps is ${shown(steps)}`)
  if (problems.length === 0) return
  throw new MoeError({
    code: 'E_CONFIG',
    op: 'piecewise',
    problem: problems.join(', '),
    fix: "pass segments such as [{ steps: 100, from: 0, to: 1 }, { steps: 900, to: 0.1, shape: 'cosine' }]; their steps are integers of at least 0, or proportions if { steps } is given",
  })
}

const defaultWarmup = (steps: number) => Math.min(100, Math.round(steps / 10))

function checkSchedule(op: string, counts: Readonly<Record<string, number>>, floor: number): void {
  const wrong = Object.entries(counts).filter(([, count]) => !Number.isSafeInteger(count) || count < 0)
  const problems = wrong.map(([name, count]) => `${name} is ${count}`)
  if (!(floor >= 0 && floor <= 1)) problems.push(`floor is ${floor}`)
  const { steps, warmup = 0, decay = 0 } = counts
  if (warmup + decay > steps) problems.push(`warmup of ${warmup} and decay of ${decay} exceed the ${steps} steps`)
  if (problems.length === 0) return
  throw new MoeError({
    code: 'E_CONFIG',
    op,
    problem: problems.join(', '),
    fix: 'pass integers of at least 0 for steps, and a floor between 0 and 1',
  })
}
