/** @file Rollouts: prompts for which the model samples texts, and their rewards. */
import { checkOptions, MoeError, type OptionNames } from '@moe/core'
import { type Conversation, type ConversationTemplate, checkTemplate } from '../data/conversations.ts'
import { holdOut } from '../data/corpus.ts'
import { canScore, type ScoringModel } from './packed-texts.ts'

/**
 * A prompt in one of three forms. Additional members, such as a reference answer, are passed to the reward function.
 */
export type Prompt =
  | { readonly messages: Conversation }
  | { readonly text: string }
  | { readonly tokens: ArrayLike<number> }

/** A sampled text, as passed to the reward function. */
export interface Sample<P extends Prompt = Prompt> {
  /** The prompt. */
  readonly prompt: P
  /** The text without special tokens; empty if `train` has no tokenizer. */
  readonly text: string
  /** The ids, including the end token if there is one. */
  readonly tokens: readonly number[]
  /** `'stop'` if the text ended by itself, `'length'` if it was cut off at `maxTokens`. */
  readonly finishReason: 'stop' | 'length'
}

/** The second argument of a reward function. */
export interface RewardOptions {
  /** Aborted when the run stops or fails. The result of the reward function is then ignored. */
  readonly signal: AbortSignal
}

/**
 * A reward function: returns any finite number, higher for better texts. It may be asynchronous, and is called as soon
 * as a text is complete, while others are still being sampled.
 */
export type Reward<P extends Prompt = Prompt> = (sample: Sample<P>, options: RewardOptions) => number | Promise<number>

/** Options of `rollouts`. */
export interface RolloutOptions<P extends Prompt = Prompt> {
  /** The reward function. */
  readonly reward: Reward<P>
  /** Renders prompts that are `messages`, as in fine-tuning. Saved with the model in every checkpoint. */
  readonly template?: ConversationTemplate | undefined
  /** Prompts per step on this rank. Default 8. */
  readonly groups?: number | undefined
  /** Texts to sample per prompt, whose rewards are compared. Default 8. */
  readonly groupSize?: number | undefined
  /** Maximum number of tokens per text, including the end token. Default 128. */
  readonly maxTokens?: number | undefined
  /** Steps that learn from the same texts. Default 1. */
  readonly updates?: number | undefined
  /**
   * ε of the clipped ratio, which takes effect from the second of `updates` on. Two numbers are ε below and above 1
   * (DAPO, arXiv 2503.14476, uses 0.2 and 0.28). Default 0.2.
   */
  readonly clip?: number | readonly [below: number, above: number] | undefined
  /**
   * Keeps the policy near a reference model, for example the one before training: `weight` is the factor β of the KL
   * divergence. The reference may be an `ExpertParallel`. Default: no KL term.
   */
  readonly kl?: { readonly weight: number; readonly reference: ScoringModel } | undefined
  /**
   * What is weighted equally: every token of a step (`'token'`, as in DAPO), or every text (`'text'`, as in
   * DeepSeekMath). With `'text'`, the tokens of a long bad text count less than those of a short one, so bad texts tend
   * to grow longer (arXiv 2503.20783). Default `'token'`.
   */
  readonly average?: 'token' | 'text' | undefined
  /** Maximum number of texts to sample at the same time on this rank. Default 64. */
  readonly maxTexts?: number | undefined
  /**
   * Held-out prompts: a fraction in [0, 1), drawn by `seed`, or the prompts themselves. An evaluation samples one text
   * for each. Default 0.
   */
  readonly validation?: number | Iterable<P> | undefined
  /** Seed of the draw of held-out prompts. Default 0. */
  readonly seed?: number | undefined
}

const names: OptionNames<RolloutOptions> = {
  reward: true,
  template: true,
  groups: true,
  groupSize: true,
  maxTokens: true,
  updates: true,
  clip: true,
  kl: true,
  average: true,
  maxTexts: true,
  validation: true,
  seed: true,
}

/** Training and held-out prompts, with their settings. Created by `rollouts`. */
export interface Rollouts<P extends Prompt = Prompt>
  extends Required<Omit<RolloutOptions<P>, 'reward' | 'template' | 'kl' | 'validation' | 'seed'>> {
  /** Prompts to train on. */
  readonly training: readonly P[]
  /** Held-out prompts; may be empty. */
  readonly validation: readonly P[]
  /** The reward function. */
  reward(sample: Sample<P>, options: RewardOptions): number | Promise<number>
  /** Renders prompts that are `messages`. */
  readonly template?: ConversationTemplate | undefined
  /** Keeps the policy near a reference model. */
  readonly kl?: RolloutOptions['kl']
}

const refused = (op: string, problem: string, fix: string) => new MoeError({ code: 'E_DATA', op, problem, fix })

/**
 * Returns data for `train` that the model samples itself: for each prompt a group of texts. Texts with a higher reward
 * than the rest of their group become more likely, and the others less likely (GRPO; DeepSeek-V3 report, 5.2.2). Texts
 * are sampled at temperature 1 from all tokens, as the policy ratio requires. The model must be a `SamplingModel`.
 *
 * @throws MoeError E_DATA for an invalid prompt, E_CONFIG for invalid options
 */
export function rollouts<P extends Prompt>(prompts: Iterable<P>, options: RolloutOptions<P>): Rollouts<P> {
  checkOptions<RolloutOptions>('rollouts', options as unknown as RolloutOptions, names)
  const { validation = 0, seed = 0, ...given } = options
  const settings = {
    groups: 8,
    groupSize: 8,
    maxTokens: 128,
    updates: 1,
    clip: 0.2,
    average: 'token',
    maxTexts: 64,
    ...Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined)),
  } as Omit<Rollouts<P>, 'training' | 'validation'>
  checkSettings(settings as unknown as Rollouts)
  const checked = (all: Iterable<P>, what: string) =>
    listed('rollouts', all, what).map((prompt, i) => checkPrompt('rollouts', prompt, `${what} ${i}`, settings.template))
  const training = checked(prompts, 'prompt')
  const parts =
    typeof validation === 'number'
      ? holdOut('rollouts', training, validation, seed)
      : { training, validation: checked(validation, 'held-out prompt') }
  if (parts.training.length === 0)
    throw refused('rollouts', 'there are no prompts', 'pass at least one prompt to train on')
  return { ...settings, ...parts }
}

/** @throws MoeError E_DATA unless `all` is a list */
export function listed<T>(op: string, all: Iterable<T>, what: string): T[] {
  if (typeof all === 'object' && all !== null && Symbol.iterator in all) return Array.from(all)
  throw refused(op, `the ${what}s are ${typeof all === 'string' ? 'a single string' : all}`, 'pass a list')
}

function checkSettings(settings: Rollouts): void {
  const { reward, template, clip, kl, average } = settings
  const problems: string[] = []
  if (typeof reward !== 'function') problems.push(`reward is ${reward}, expected a function of a sample`)
  for (const name of ['groups', 'maxTokens', 'updates', 'maxTexts'] as const) {
    const value = settings[name]
    if (!Number.isSafeInteger(value) || value < 1)
      problems.push(`${name} is ${value}, expected an integer of at least 1`)
  }
  const { groupSize } = settings
  if (!Number.isSafeInteger(groupSize) || groupSize < 2)
    problems.push(`groupSize is ${groupSize}, expected an integer of at least 2, to compare texts with each other`)
  const bounds = typeof clip === 'number' ? [clip, clip] : clip
  if (!Array.isArray(bounds) || bounds.length !== 2 || !bounds.every(bound => bound > 0))
    problems.push(`clip is ${JSON.stringify(clip)}, expected a positive number, or two: below and above 1`)
  if (average !== 'token' && average !== 'text') problems.push(`average is ${average}, expected 'token' or 'text'`)
  if (kl !== undefined && !(kl?.weight > 0 && Number.isFinite(kl.weight) && canScore(kl.reference)))
    problems.push('kl is invalid, expected { weight, reference }: a positive number and a model')
  if (problems.length > 0) {
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'rollouts',
      problem: problems.length === 1 ? problems[0] : `\n${problems.map(line => `  ${line}`).join('\n')}\n`,
      fix: 'change these options',
      details: { problems },
    })
  }
  if (template !== undefined) checkTemplate('rollouts', template)
}

/** @throws MoeError E_DATA */
export function checkPrompt<P extends Prompt>(
  op: string,
  given: P,
  what: string,
  template: ConversationTemplate | undefined,
): P {
  const prompt: { messages?: unknown; text?: unknown; tokens?: { length?: unknown } | null } | null = given
  const form = 'pass { messages }, { text } or { tokens }, plus whatever the reward function needs'
  if (typeof prompt !== 'object' || prompt === null) throw refused(op, `${what} is ${JSON.stringify(given)}`, form)
  const { messages, text, tokens } = prompt
  if ([messages, text, tokens].filter(part => part !== undefined).length !== 1)
    throw refused(op, `${what} has none or several of messages, text and tokens`, form)
  if (messages !== undefined) {
    const turns = Array.isArray(messages) ? messages : []
    const are = turns.every(turn => typeof turn?.role === 'string' && typeof turn.content === 'string')
    if (turns.length === 0 || !are) throw refused(op, `${what} has no valid messages`, 'pass [{ role, content }, …]')
    if (template === undefined)
      throw refused(op, `${what} consists of messages, but no template is given`, 'pass { template }')
  }
  if (text !== undefined && typeof text !== 'string') throw refused(op, `the text of ${what} is not a string`, form)
  if (text === '' || tokens === null || (tokens !== undefined && !(Number(tokens.length) > 0)))
    throw refused(op, `${what} is empty`, 'pass at least one token')
  return given
}
