/** @file A text of a continuous batch: its tokens, and what its reader has not read yet. */
import type { PagedSequence } from '@moe/attention-mla'
import { Random } from '@moe/core'
import { DraftMemory } from './drafter.ts'
import type { GenerationStats, TextReport, TurnOptions } from './generation.ts'
import type { TokenLogProb } from './log-probs.ts'
import { nextTokens } from './next-tokens.ts'
import { Occurrences } from './process-logits.ts'
import type { Scores, Scoring } from './sampling.ts'

/** A generated token. */
export interface Made {
  readonly token: number
  readonly likely: TokenLogProb | undefined
}

/** A text of the batch. */
export class BatchText {
  /** The prompt and the generated tokens. */
  readonly tokens: number[]
  readonly options: TurnOptions & Scoring
  readonly report: TextReport
  /** Length of the prompt. */
  readonly prompt: number
  readonly ends: ReadonlySet<number | string>
  readonly occurrences: Occurrences
  readonly random: Random
  /** Maximum number of tokens to generate. */
  readonly most: number
  /** Null while the text waits; it has no pages then. */
  sequence: PagedSequence | null = null
  /** Tokens that the MTP modules draft after the last one. */
  drafts: readonly number[] = []
  readonly memory = new DraftMemory()
  /** Generated tokens that have not been read yet. */
  readonly ready: Made[] = []
  made = 0
  /** Log-probability of the token that ended the text. */
  end: TokenLogProb | undefined
  /** Set when the text has ended, or `failure` if it failed. */
  finished: GenerationStats['finishReason'] = null
  failure: { readonly error: unknown } | null = null
  #wake: (() => void) | null = null

  constructor(
    tokens: number[],
    options: TurnOptions & Scoring,
    report: TextReport,
    { ends, most }: { readonly ends: readonly number[]; readonly most: number },
  ) {
    this.tokens = tokens
    this.prompt = tokens.length
    this.most = most
    this.options = options
    this.report = report
    this.ends = new Set<number | string>([...ends, ...(options.stop ?? [])])
    this.occurrences = new Occurrences(tokens, options)
    this.random = new Random(options.seed ?? 0)
  }

  /** Number of tokens that are not in the cache. */
  get pending(): number {
    return this.tokens.length - (this.sequence?.length ?? 0)
  }

  /** The tokens whose cache entries may come from other texts. Log-probabilities require a token to be computed. */
  get shareable(): readonly number[] {
    const { length } = this.report.promptLogProbs
    return length > 0 && length < this.prompt ? this.tokens.slice(0, length) : this.tokens
  }

  /** Notifies the reader of new tokens, the end, a failure or an abort. */
  wake = (): void => {
    this.#wake?.()
    this.#wake = null
  }

  changed(): Promise<void> {
    return new Promise(resolve => {
      this.#wake = resolve
    })
  }

  fail(error: unknown): void {
    this.failure = { error }
    this.wake()
  }
}

/** Returns the next tokens of a text. If its constraint throws, only this text fails; it still needs a token until the pass ends. */
export async function chosenTokens(text: BatchText, scores: readonly Scores[]): Promise<number[]> {
  const { options, random, occurrences, ends, drafts, report } = text
  try {
    return await nextTokens(scores, drafts, { options, random, occurrences, ends, stats: report.stats })
  } catch (error) {
    text.fail(error)
    return [0]
  }
}
