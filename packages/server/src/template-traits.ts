/** @file Detects from the source of a chat template how it handles tools and reasoning. */
import type { ChatTemplate } from '@moe/tokenizer-bpe/data'
import { THINK_END, THINK_START } from './reasoning.ts'
import { type ToolFormat, toolFormatOf } from './tool-format.ts'

export interface TemplateTraits {
  /** The format in which the model writes tool calls. */
  readonly format: ToolFormat
  /** Whether the template describes `tools` to the model. */
  readonly describesTools: boolean
  /** Whether the template supports messages with tool calls and their results. */
  readonly supportsCalls: boolean
  /** Whether the template expects the arguments of a call as an object instead of JSON text. */
  readonly parsesArguments: boolean
  /** Whether the template mentions reasoning. */
  readonly hasReasoning: boolean
  /** Whether the template reads `reasoning_effort`. */
  readonly readsEffort: boolean
}

export function traitsOf(template: ChatTemplate | undefined): TemplateTraits {
  const source = template?.toJSON()?.chat_template
  // A template created from a function has no source and is assumed to support everything.
  const has = (pattern: RegExp) => typeof source !== 'string' || pattern.test(source)
  const text = String(source)
  return {
    format: toolFormatOf(text),
    describesTools: has(/\btools\b/),
    supportsCalls: has(/\btool_calls\b/),
    parsesArguments:
      /arguments(['"]\])?\s*\|\s*tojson|arg\w*\.items\(\)|arg\w*\s*\|\s*items/.test(text) &&
      !/arguments(['"]\])? is string/.test(text),
    hasReasoning: text.includes(THINK_END),
    readsEffort: has(/\breasoning_effort\b/),
  }
}

/** The control tokens that a constrained answer may contain, concatenated. */
export const controlTokensOf = ({ format, hasReasoning }: TemplateTraits): string =>
  format.controlTokens + (hasReasoning ? THINK_START + THINK_END : '')
