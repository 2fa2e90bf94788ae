/** @file Calls of tools as models write them, and as OpenAI's API has them. */
import type { ChatTemplate } from '@moe/tokenizer-bpe/data'
import type { TextPart } from './text-parts.ts'

export interface ToolCall {
  readonly name: string
  /** JSON, as far as the model writes it. */
  readonly arguments: string
}

/** How a model writes calls. */
export interface ToolFormat {
  /** Begins a text's calls, which end it. */
  readonly begin: string
  /** From there to the name of the first. */
  readonly opening: string
  /** Between name and arguments. */
  readonly between: string
  /** The calls of a text from `begin` on; empty where there are none that can be read. */
  parse(text: string): ToolCall[]
}

/** Of Hermes, Qwen, and `plainChatTemplate`. */
const plain: ToolFormat = {
  begin: '<tool_call>',
  opening: '<tool_call>\n{"name": "',
  between: '", "arguments": ',
  parse(text) {
    try {
      return Array.from(text.matchAll(/<tool_call>([\s\S]*?)(<\/tool_call>|$)/g), ([, json]) => {
        const { name, arguments: given = {} } = JSON.parse(json)
        if (typeof name !== 'string') throw new TypeError('there is no name')
        return { name, arguments: typeof given === 'string' ? given : JSON.stringify(given) }
      })
    } catch {
      return []
    }
  },
}

const deepseek = (between: string, call: RegExp): ToolFormat => ({
  begin: '<｜tool▁calls▁begin｜>',
  opening: `<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>${between.includes('json') ? 'function<｜tool▁sep｜>' : ''}`,
  between,
  parse: text => Array.from(text.matchAll(call), ([, name, json]) => ({ name, arguments: json })),
})

/** Of DeepSeek-V3 and R1, and of V3.1. */
const formats = {
  v3: deepseek(
    '\n```json\n',
    /<｜tool▁call▁begin｜>function<｜tool▁sep｜>([^\n]*)\n```json\n([\s\S]*?)\n?(?:```)?(?:<｜tool▁call▁end｜>|$)/g,
  ),
  v31: deepseek('<｜tool▁sep｜>', /<｜tool▁call▁begin｜>([\s\S]*?)<｜tool▁sep｜>([\s\S]*?)(?:<｜tool▁call▁end｜>|$)/g),
}

/** What a template does with tools. */
export interface TemplateTools {
  readonly format: ToolFormat
  /** Whether it tells the model of `tools`, and whether it writes calls and their results. */
  readonly isTold: boolean
  readonly writesCalls: boolean
  /** Whether it wants arguments as a value, and not as JSON. */
  readonly parsed: boolean
}

export function toolsOf(template: ChatTemplate | undefined): TemplateTools {
  const source = template?.toJSON()?.chat_template
  // One that is made of a function has no source, and knows what it does.
  const has = (pattern: RegExp) => typeof source !== 'string' || pattern.test(source)
  const text = String(source)
  const format = !text.includes(formats.v3.begin) ? plain : text.includes('```json') ? formats.v3 : formats.v31
  return {
    format,
    isTold: has(/\btools\b/),
    writesCalls: has(/\btool_calls\b/),
    parsed: typeof source === 'string' && /arguments(['"]\])?\s*\|\s*tojson/.test(text),
  }
}

/** Reads the calls out of a text. */
export interface CallReader {
  /** From here on nothing is told until the text has ended. */
  readonly begin: string
  read(text: string): ToolCall[]
}

/** The parts of a text with its calls behind it; a text from `begin` on in which there are none is told as it is. */
export async function* withCalls(
  parts: AsyncIterable<TextPart>,
  { begin, read }: CallReader,
): AsyncGenerator<TextPart> {
  let held = ''
  let isBegun = false
  for await (const { text, tokens } of parts) {
    held += text
    const at: number = isBegun ? 0 : held.indexOf(begin)
    const safe = at >= 0 ? at : held.length - beginning(held, begin)
    isBegun ||= at >= 0
    if (safe > 0 || tokens?.length) yield { text: held.slice(0, safe), tokens }
    held = held.slice(safe)
  }
  const calls = isBegun ? read(held) : []
  if (calls.length > 0) yield { text: '', tokens: null, calls }
  else if (held !== '') yield { text: held, tokens: null }
}

/** Length of the end of a text that may become `begin`. */
function beginning(text: string, begin: string): number {
  for (let n = Math.min(begin.length - 1, text.length); n > 0; n--) if (text.endsWith(begin.slice(0, n))) return n
  return 0
}
