/** @file Pairs of texts, one of which is preferred: data for `train`. */
import { checkOptions, MoeError, type OptionNames } from '@moe/core'
import { type ConversationTemplate, checkTemplate } from '../data/conversations.ts'
import { holdOut } from '../data/corpus.ts'
import type { TrainableModel } from '../model.ts'
import { checkPrompt, listed, type Prompt } from './rollouts.ts'

/** A prompt with two texts behind it. Beside `messages` they are what the assistant says, beside `text` how it goes on, both without the token that ends them; beside `tokens` they are ids, that token included. */
export type Preference = Prompt & {
  /** The better one. */
  readonly chosen: string | ArrayLike<number>
  /** The worse one. */
  readonly rejected: string | ArrayLike<number>
}

/** What is learned from pairs. */
export interface PreferenceOptions {
  /** Where the model begins, such as a second copy of it: what it finds likely is what preferences are measured from. */
  readonly reference: TrainableModel
  /** Writes prompts that are `messages` and the answers behind them; stored beside the model in every checkpoint. */
  readonly template?: ConversationTemplate
  /** Pairs of a step on this rank. Default 16. */
  readonly pairs?: number
  /** β: how near to the reference it stays, more for nearer. Default 0.1. */
  readonly beta?: number
  /** Held-out pairs: a fraction in [0, 1), drawn by `seed`, or the pairs themselves. Default 0. */
  readonly validation?: number | Iterable<Preference>
  /** Names the draw of held-out pairs. Default 0. */
  readonly seed?: number
}

const names: OptionNames<PreferenceOptions> = {
  reference: true,
  template: true,
  pairs: true,
  beta: true,
  validation: true,
  seed: true,
}

/** Pairs to learn from, pairs that are only measured on, and how. Made by `preferences`. */
export interface Preferences {
  /** Pairs to learn from. */
  readonly training: readonly Preference[]
  /** Pairs that are measured on; may be empty. */
  readonly validation: readonly Preference[]
  /** What preferences are measured from. */
  readonly reference: TrainableModel
  /** Writes prompts that are `messages`. */
  readonly template?: ConversationTemplate | undefined
  /** Pairs of a step on this rank. */
  readonly pairs: number
  /** β. */
  readonly beta: number
}

/**
 * Data for `train` of which it learns which of two texts is better (direct preference optimization; Rafailov et al. 2023, arXiv 2305.18290): no text is made, and no reward is asked for.
 * @throws MoeError E_DATA for what is no pair; E_CONFIG for options that cannot be
 */
export function preferences(all: Iterable<Preference>, options: PreferenceOptions): Preferences {
  checkOptions('preferences', options, names)
  const { reference, template, pairs = 16, beta = 0.1, validation = 0, seed = 0 } = options
  const problems = [
    ...(typeof reference?.loss === 'function' ? [] : [`reference is ${reference}, needs a model`]),
    ...(Number.isSafeInteger(pairs) && pairs > 0 ? [] : [`pairs is ${pairs}, needs a whole number from 1`]),
    ...(beta > 0 && Number.isFinite(beta) ? [] : [`beta is ${beta}, needs a positive number`]),
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
  if (parts.training.length === 0) throw refused('there are no pairs', 'pass at least one to learn from')
  return { ...parts, reference, template, pairs, beta }
}

const refused = (problem: string, fix: string) => new MoeError({ code: 'E_DATA', op: 'preferences', problem, fix })

function checkPair(given: Preference, what: string, template: ConversationTemplate | undefined): Preference {
  const pair = checkPrompt('preferences', given, what, template)
  for (const name of ['chosen', 'rejected'] as const) {
    const text: unknown = pair[name]
    const ids = typeof text === 'object' && Number((text as ArrayLike<number> | null)?.length) > 0
    if ('tokens' in pair ? ids : typeof text === 'string' && text !== '') continue
    const fix = "'tokens' in a pair go with lists of ids, messages and text with texts"
    throw refused(`${name} of ${what} is ${JSON.stringify(text)}`, fix)
  }
  return pair
}
