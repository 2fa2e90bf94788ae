/** @file Preference data: pairs of a better and a worse text. */
import { checkOptions, MoeError, type OptionNames } from '@moe/core'
import { type ConversationTemplate, checkTemplate } from '../data/conversations.ts'
import { holdOut } from '../data/corpus.ts'
import { canScore, type ScoringModel } from './packed-texts.ts'
import { checkPrompt, listed, type Prompt } from './rollouts.ts'

/**
 * A prompt with two completions. For `messages`, they are the assistant's answers, and for `text`, continuations, both
 * without an end token. For `tokens`, they are ids including the end token.
 */
export type Preference = Prompt & {
  /** The better completion. */
  readonly chosen: string | ArrayLike<number>
  /** The worse completion. */
  readonly rejected: string | ArrayLike<number>
}

/** Options of `preferences`. */
export interface PreferenceOptions {
  /**
   * The model before training, for example a second copy of it, or an `ExpertParallel` of a second copy. Preferences are
   * measured relative to it.
   */
  readonly reference: ScoringModel
  /** Renders prompts that are `messages`, and their answers. Saved with the model in every checkpoint. */
  readonly template?: ConversationTemplate | undefined
  /** Pairs per step on this rank. Default 16. */
  readonly pairs?: number | undefined
  /** β: higher values keep the model closer to the reference. Default 0.1. */
  readonly beta?: number | undefined
  /** Held-out pairs: a fraction in [0, 1), drawn by `seed`, or the pairs themselves. Default 0. */
  readonly validation?: number | Iterable<Preference> | undefined
  /** Seed of the draw of held-out pairs. Default 0. */
  readonly seed?: number | undefined
}

const names: OptionNames<PreferenceOptions> = {
  reference: true,
  template: true,
  pairs: true,
  beta: true,
  validation: true,
  seed: true,
}

/** Training and held-out pairs, with their settings. Created by `preferences`. */
export interface Preferences {
  /** Pairs to train on. */
  readonly training: readonly Preference[]
  /** Held-out pairs; may be empty. */
  readonly validation: readonly Preference[]
  /** The model that preferences are measured relative to. */
  readonly reference: ScoringModel
  /** Renders prompts that are `messages`. */
  readonly template?: ConversationTemplate | undefined
  /** Pairs per step on this rank. */
  readonly pairs: number
  /** β. */
  readonly beta: number
}

/**
 * Returns preference data for `train`, which learns from it by direct preference optimization (Rafailov et al. 2023,
 * arXiv 2305.18290), without sampling texts and without a reward function.
 *
 * @throws MoeError E_DATA for an invalid pair, E_CONFIG for invalid options
 */
export function preferences(all: Iterable<Preference>, options: PreferenceOptions): Preferences {
  checkOptions('preferences', options, names)
  const { reference, template, pairs = 16, beta = 0.1, validation = 0, seed = 0 } = options
  const problems = [
    ...(canScore(reference) ? [] : [`reference is ${reference}, expected a model`]),
    ...(Number.isSafeInteger(pairs) && pairs > 0 ? [] : [`pairs is ${pairs}, expected an integer of at least 1`]),
    ...(beta > 0 && Number.isFinite(beta) ? [] : [`beta is ${beta}, expected a positive number`]),
  ]
  if (problems.length > 0) {
    const details = { problems }
    const fix = 'change these options'
    throw new MoeError({ code: 'E_CONFIG', op: 'preferences', problem: problems.join('; '), fix, details })
  }
  if (template !== undefined) checkTemplate('preferences', template)
  const checked = (given: Iterable<Preference>, what: string) =>
    listed('preferences', given, what).map((pair, i) => checkPair(pair, `${what} ${i}`, template))
  const training = checked(all, 'pair')
  const parts =
    typeof validation === 'number'
      ? holdOut('preferences', training, validation, seed)
      : { training, validation: checked(validation, 'held-out pair') }
  if (parts.training.length === 0) throw refused('there are no pairs', 'pass at least one pair to train on')
  return { ...parts, reference, template, pairs, beta }
}

const refused = (problem: string, fix: string) => new MoeError({ code: 'E_DATA', op: 'preferences', problem, fix })

function checkPair(given: Preference, what: string, template: ConversationTemplate | undefined): Preference {
  const pair = checkPrompt('preferences', given, what, template)
  for (const name of ['chosen', 'rejected'] as const) {
    const text: unknown = pair[name]
    const ids = typeof text === 'object' && Number((text as ArrayLike<number> | null)?.length) > 0
    if ('tokens' in pair ? ids : typeof text === 'string' && text !== '') continue
    const fix = 'pass lists of ids for a prompt of tokens, and strings for messages and text'
    throw refused(`${name} of ${what} is ${JSON.stringify(text)}`, fix)
  }
  return pair
}
