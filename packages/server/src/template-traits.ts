/** @file What a chat template does with tools and reasoning, as its text says. */
import type { ChatTemplate } from '@moe/tokenizer-bpe/data'
import { THINK, THOUGHT } from './reasoning.ts'
import { type ToolFormat, toolFormatOf } from './tool-calls.ts'

export interface TemplateTraits {
  /** How its model writes calls. */
  readonly format: ToolFormat
  /** Whether it tells the model of `tools`, and whether it writes calls and their results. */
  readonly isTold: boolean
  readonly writesCalls: boolean
  /** Whether it wants arguments as a value, and not as JSON. */
  readonly parsed: boolean
  /** Whether it knows of reasoning. */
  readonly thinks: boolean
}

export function traitsOf(template: ChatTemplate | undefined): TemplateTraits {
  const source = template?.toJSON()?.chat_template
  // One that is made of a function has no source, and knows what it does.
  const has = (pattern: RegExp) => typeof source !== 'string' || pattern.test(source)
  const text = String(source)
  return {
    format: toolFormatOf(text),
    isTold: has(/\btools\b/),
    writesCalls: has(/\btool_calls\b/),
    parsed:
      /arguments(['"]\])?\s*\|\s*tojson|arg\w*\.items\(\)|arg\w*\s*\|\s*items/.test(text) &&
      !/arguments(['"]\])? is string/.test(text),
    thinks: text.includes(THOUGHT),
  }
}

/** Text of the control tokens that an answer of a form may have in it. */
export const marksOf = ({ format, thinks }: TemplateTraits): string => format.marks + (thinks ? THINK + THOUGHT : '')
