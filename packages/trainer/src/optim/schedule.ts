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
