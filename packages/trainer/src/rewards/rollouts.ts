/** @file Data that the model makes itself: prompts, what is made of them, and what that is worth. */
import { checkOptions, MoeError, type OptionNames } from '@moe/core'
import { type Conversation, type ConversationTemplate, checkTemplate } from '../data/conversations.ts'
import { holdOut } from '../data/corpus.ts'
import type { TrainableModel } from '../model.ts'

/** What a text is made for, in one of three forms. Whatever else it has goes to the reward: an answer to compare with. */
export type Prompt =
  | { readonly messages: Conversation }
  | { readonly text: string }
  | { readonly tokens: ArrayLike<number> }

/** A text that the model has made, as a reward sees it. */
export interface Sample<P extends Prompt = Prompt> {
  /** What it was made for. */
  readonly prompt: P
  /** Without special tokens; empty where `train` has no tokenizer. */
  readonly text: string
  /** With the token that ended it, where one did. */
  readonly tokens: readonly number[]
  /** Whether it ended by itself, or was cut off at `maxTokens`. */
  readonly finishReason: 'stop' | 'length'
}

/** What a reward is given beside the sample. */
export interface RewardOptions {
  /** Is aborted when the run stops, or cannot go on: nobody waits for the reward then. */
  readonly signal: AbortSignal
}

/** What a text is worth: any finite number, more for better ones. It may take its time: each text is asked about as soon as it is there, while others are made. */
export type Reward<P extends Prompt = Prompt> = (sample: Sample<P>, options: RewardOptions) => number | Promise<number>

/** How texts are made, and what is learned from them. */
export interface RolloutOptions<P extends Prompt = Prompt> {
  /** What a text is worth. */
  readonly reward: Reward<P>
  /** Writes prompts that are `messages`, as in fine-tuning; stored beside the model in every checkpoint. */
  readonly template?: ConversationTemplate
  /** Prompts of a step on this rank. Default 8. */
  readonly groups?: number
  /** Texts that are made for each of them; their rewards are compared with each other. Default 8. */
  readonly groupSize?: number
  /** Most tokens of a text, the one that ends it included. Default 128. */
  readonly maxTokens?: number
  /** Steps that learn from the same texts. Default 1. */
  readonly updates?: number
  /** ε of the clipped ratio, which matters from the second of `updates` on; two numbers are those below and above 1 (DAPO, arXiv 2503.14476, has 0.2 and 0.28). Default 0.2. */
  readonly clip?: number | readonly [below: number, above: number]
  /** Keeps the policy near another model, such as the one that it began as: β of `weight` for the divergence from it. Default: nothing does. */
  readonly kl?: { readonly weight: number; readonly reference: TrainableModel }
  /**
   * What counts alike: every token of a step (`'token'`, as in DAPO), or every text whatever its length (`'text'`, as in DeepSeekMath), where the tokens of a long bad text count less than those of a short one, so that bad
   * texts grow longer (arXiv 2503.20783). Default `'token'`.
   */
  readonly average?: 'token' | 'text'
  /** Most texts that are made at the same time on this rank. Default 64. */
  readonly maxTexts?: number
  /** Held-out prompts, each of which a measurement makes one text for: a fraction in [0, 1), drawn by `seed`, or the prompts themselves. Default 0. */
  readonly validation?: number | Iterable<P>
  /** Names the draw of held-out prompts. Default 0. */
  readonly seed?: number
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

/** Prompts to learn from, prompts that are only measured on, and how. Made by `rollouts`. */
export interface Rollouts<P extends Prompt = Prompt>
  extends Required<Omit<RolloutOptions<P>, 'reward' | 'template' | 'kl' | 'validation' | 'seed'>> {
  /** Prompts to learn from. */
  readonly training: readonly P[]
  /** Prompts that are measured on; may be empty. */
  readonly validation: readonly P[]
  /** What a text is worth. */
  reward(sample: Sample<P>, options: RewardOptions): number | Promise<number>
  /** Writes prompts that are `messages`. */
  readonly template?: ConversationTemplate | undefined
  /** What keeps the policy near another model. */
  readonly kl?: RolloutOptions['kl']
}

const refused = (op: string, problem: string, fix: string) => new MoeError({ code: 'E_DATA', op, problem, fix })

/**
 * Data for `train` that the model makes itself: for each prompt a group of texts, of which those with more reward than the others become likelier, and those with less the reverse (GRPO; DeepSeek-V3 report,
 * 5.2.2). Texts are drawn at temperature 1 from all tokens, as the ratio of the policy to the one that made them wants it. The model samples and tells how likely tokens are: see `SamplingModel`.
 * @throws MoeError E_DATA for what is no prompt; E_CONFIG for options that cannot be
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
  if (parts.training.length === 0) throw refused('rollouts', 'there are no prompts', 'pass at least one to learn from')
  return { ...settings, ...parts }
}

/** @throws MoeError E_DATA for what is no list */
export function listed<T>(op: string, all: Iterable<T>, what: string): T[] {
  if (typeof all === 'object' && all !== null && Symbol.iterator in all) return Array.from(all)
  throw refused(op, `the ${what}s are ${typeof all === 'string' ? 'one text' : all}`, 'pass a list of them')
}

function checkSettings(settings: Rollouts): void {
  const { reward, template, clip, kl, average } = settings
  const problems: string[] = []
  if (typeof reward !== 'function') problems.push(`reward is ${reward}, needs a function of a sample`)
  for (const name of ['groups', 'maxTokens', 'updates', 'maxTexts'] as const) {
    const value = settings[name]
    if (!Number.isSafeInteger(value) || value < 1) problems.push(`${name} is ${value}, needs a whole number from 1`)
  }
  const { groupSize } = settings
  if (!Number.isSafeInteger(groupSize) || groupSize < 2)
    problems.push(`groupSize is ${groupSize}, needs a whole number from 2: a text alone is neither better nor worse`)
  const bounds = typeof clip === 'number' ? [clip, clip] : clip
  if (!Array.isArray(bounds) || bounds.length !== 2 || !bounds.every(bound => bound > 0))
    problems.push(`clip is ${JSON.stringify(clip)}, needs a positive number, or one below and one above 1`)
  if (average !== 'token' && average !== 'text') problems.push(`average is ${average}, needs 'token' or 'text'`)
  if (kl !== undefined && !(kl?.weight > 0 && Number.isFinite(kl.weight) && typeof kl.reference?.loss === 'function'))
    problems.push('kl needs { weight, reference }: a positive number and a model')
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
  const form = 'it is { messages }, { text } or { tokens }, and whatever the reward needs beside'
  if (typeof prompt !== 'object' || prompt === null) throw refused(op, `${what} is ${JSON.stringify(given)}`, form)
  const { messages, text, tokens } = prompt
  if ([messages, text, tokens].filter(part => part !== undefined).length !== 1)
    throw refused(op, `${what} has none, or several, of messages, text and tokens`, form)
  if (messages !== undefined) {
    const turns = Array.isArray(messages) ? messages : []
    const are = turns.every(turn => typeof turn?.role === 'string' && typeof turn.content === 'string')
    if (turns.length === 0 || !are) throw refused(op, `${what} has no messages`, 'they are [{ role, content }, …]')
    if (template === undefined) throw refused(op, `${what} is messages, and there is no template`, 'pass { template }')
  }
  if (text !== undefined && typeof text !== 'string') throw refused(op, `the text of ${what} is no text`, form)
  if (text === '' || tokens === null || (tokens !== undefined && !(Number(tokens.length) > 0)))
    throw refused(op, `${what} is empty`, 'pass at least one token')
  return given
}
