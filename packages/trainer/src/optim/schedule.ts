/** @file Learning-rate schedules: pure functions of the step, so that a resumed run needs no state for them. */
import { checkOptions, MoeError, shown } from '@moe/core'

/** What the peak learning rate is multiplied by at a step (counted from 0). */
export type Schedule = (step: number) => number

/** What a schedule gives at a step. @throws MoeError E_CONFIG for what is no number from 0: nothing could be learned with it, or the weights would be lost */
export function scheduled(schedule: Schedule, step: number): number {
  const factor = schedule(step)
  if (Number.isFinite(factor) && factor >= 0) return factor
  throw new MoeError({
    code: 'E_CONFIG',
    op: 'train',
    problem: `schedule(${step}) is ${shown(factor)}`,
    fix: 'give a number from 0 for every step, which lr is multiplied by',
  })
}

/** Length and end of a schedule with warm-up. */
export interface CosineOptions {
  /** Steps of the whole run. */
  readonly steps: number
  /** Steps of linear warm-up from 0 at the start. Default: a tenth of the run, at most 100. */
  readonly warmup?: number
  /** Multiplier that the last step reaches. Default 0.1. */
  readonly floor?: number
}

/** Linear warm-up, then half a cosine down to `floor` (Loshchilov & Hutter 2017). */
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

/** Length of the decay, too. */
export interface StableDecayOptions extends CosineOptions {
  /** Steps of the final decay. Default: a fifth of the run. */
  readonly decay?: number
}

/**
 * Linear warm-up, a constant stretch, then a decay to `floor` that is linear in the square root (Hägele et al. 2024, 1
 * - sqrt).
 */
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

/** Linear warm-up over `warmup` steps, then no change. */
export function warmupConstant(options: { readonly warmup: number }): Schedule {
  checkOptions('warmupConstant', options, { warmup: true })
  const { warmup } = options
  checkSchedule('warmupConstant', { warmup }, 0)
  return step => (step < warmup ? (step + 1) / warmup : 1)
}

/** A stretch of a schedule: `steps` long, at one value; or on its way to one, which its last step reaches. */
export type Stretch =
  | { readonly steps: number; readonly at: number }
  | {
      readonly steps: number
      /** Default: where the stretch before has ended. */
      readonly from?: number
      readonly to: number
      /** `'cosine'` is half of one. Default `'linear'`. */
      readonly shape?: 'linear' | 'cosine'
    }

/**
 * A schedule of stretches, one behind the other; behind the last one it stays where that ended. For learning rates, and for whatever else is a function of the
 * step: micro-batches (`accumulate`), weights of losses, the speed of biases.
 * @param options.steps how long all stretches are together: their own lengths are shares then, such as tokens. Default: they are steps
 * @throws MoeError E_CONFIG
 */
export function piecewise(stretches: readonly Stretch[], options: { readonly steps?: number } = {}): Schedule {
  checkOptions('piecewise', options, { steps: true })
  checkStretches(stretches, options.steps)
  const total = stretches.reduce((sum, { steps }) => sum + steps, 0)
  const scale = options.steps === undefined ? 1 : options.steps / total
  let shares = 0
  let before = 0
  const parts = stretches.map(stretch => {
    const first = Math.round(shares * scale)
    shares += stretch.steps
    const level = 'at' in stretch
    const from = level ? stretch.at : (stretch.from ?? before)
    before = level ? stretch.at : stretch.to
    const shape = (!level && stretch.shape) || 'linear'
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

function checkStretches(stretches: readonly Stretch[], steps: number | undefined): void {
  const problems: string[] = []
  const isLength = (value: unknown) =>
    steps === undefined
      ? Number.isSafeInteger(value) && (value as number) >= 0
      : Number.isFinite(value) && (value as number) >= 0
  if (!Array.isArray(stretches) || stretches.length === 0) problems.push(`the stretches are ${shown(stretches)}`)
  else {
    stretches.forEach((stretch: Stretch, i) => {
      if ('at' in stretch) checkOptions(`piecewise stretch ${i}`, stretch, { steps: true, at: true })
      else checkOptions(`piecewise stretch ${i}`, stretch, { steps: true, from: true, to: true, shape: true })
      const { steps: length, ...values } = stretch
      if (!isLength(length)) problems.push(`steps of stretch ${i} is ${shown(length)}`)
      const ends =
        'at' in values ? { at: values.at } : { to: values.to, ...(values.from !== undefined && { from: values.from }) }
      for (const [name, value] of Object.entries(ends))
        if (!Number.isFinite(value)) problems.push(`${name} of stretch ${i} is ${shown(value)}`)
      if ('shape' in values && !['linear', 'cosine', undefined].includes(values.shape))
        problems.push(`shape of stretch ${i} is ${shown(values.shape)}`)
    })
    if (!('at' in stretches[0]) && stretches[0].from === undefined) problems.push('from of stretch 0 is missing')
    if (stretches.every(({ steps }) => steps === 0)) problems.push('all stretches are empty')
  }
  if (steps !== undefined && (!Number.isSafeInteger(steps) || steps < 1)) problems.push(`steps is ${shown(steps)}`)
  if (problems.length === 0) return
  throw new MoeError({
    code: 'E_CONFIG',
    op: 'piecewise',
    problem: problems.join(', '),
    fix: "pass [{ steps: 100, from: 0, to: 1 }, { steps: 900, to: 0.1, shape: 'cosine' }] or such; steps are whole numbers from 0, and shares where { steps } is given",
  })
}

const defaultWarmup = (steps: number) => Math.min(100, Math.round(steps / 10))

function checkSchedule(op: string, counts: Readonly<Record<string, number>>, floor: number): void {
  const wrong = Object.entries(counts).filter(([, count]) => !Number.isSafeInteger(count) || count < 0)
  const problems = wrong.map(([name, count]) => `${name} is ${count}`)
  if (!(floor >= 0 && floor <= 1)) problems.push(`floor is ${floor}`)
  const { steps, warmup = 0, decay = 0 } = counts
  if (warmup + decay > steps)
    problems.push(`warm-up of ${warmup} and decay of ${decay} are more than the ${steps} steps`)
  if (problems.length === 0) return
  throw new MoeError({
    code: 'E_CONFIG',
    op,
    problem: problems.join(', '),
    fix: 'steps are whole numbers from 0, floor lies between 0 and 1',
  })
}
