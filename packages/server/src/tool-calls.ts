/** @file Calls of tools as models write them, and as OpenAI's API has them. */
import type { TextPart } from './text-parts.ts'

export interface ToolCall {
  readonly name: string
  /** JSON, as far as the model writes it. */
  readonly arguments: string
  /** Where models give one. */
  readonly id?: string
}

/** How a model writes calls. */
export interface ToolFormat {
  /** Begins a text's calls, which end it. */
  readonly begin: string
  /** From there to the name of the first. */
  readonly opening: string
  /** From the name to the arguments; calls are counted within a conversation. */
  between(number: number): string
  /** What models call the call, where they do. */
  id?(name: string, number: number): string
  /** Whether arguments are written as JSON. */
  readonly isJson: boolean
  /** All marks that calls are written with. */
  readonly marks: string
  /**
   * The calls of a text from `begin` on; empty where there are none that can be read.
   * @param isText whether an argument of a tool is a text, where that is not told by how it is written
   */
  parse(text: string, isText: (tool: string, argument: string) => boolean): ToolCall[]
  /** Tells of tools in a message, for models whose template does not. */
  tell?(tools: readonly object[]): string
}

/** Of Hermes, Qwen, and `plainChatTemplate`. */
const plain: ToolFormat = {
  begin: '<tool_call>',
  opening: '<tool_call>\n{"name": "',
  between: () => '", "arguments": ',
  isJson: true,
  marks: '<tool_call></tool_call>',
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

function deepseek(kind: string, between: string, end: string, call: RegExp): ToolFormat {
  const opening = `<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>${kind}`
  return {
    begin: '<｜tool▁calls▁begin｜>',
    opening,
    between: () => between,
    isJson: true,
    marks: '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜><｜tool▁sep｜><｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    parse: text => Array.from(text.matchAll(call), ([, name, json]) => ({ name, arguments: json })),
    // As https://huggingface.co/deepseek-ai/DeepSeek-V3.1 has it.
    tell: tools =>
      [
        '## Tools\nYou have access to the following tools:\n',
        ...tools.map(tool => {
          const { name, description = '', parameters = {} } = (tool as { function: Record<string, unknown> }).function
          return `### ${name}\nDescription: ${description}\n\nParameters: ${JSON.stringify(parameters)}\n`
        }),
        'IMPORTANT: ALWAYS adhere to this exact format for tool use:',
        `${opening}tool_call_name${between}tool_call_arguments${end}{additional_tool_calls}<｜tool▁calls▁end｜>\n`,
        'Where:',
        '- `tool_call_name` must be an exact match to one of the available tools',
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema",
        '- For multiple tool calls, chain them directly without separators or spaces',
      ].join('\n'),
  }
}

/** Of DeepSeek-V3 and R1. */
const deepseekV3 = deepseek(
  'function<｜tool▁sep｜>',
  '\n```json\n',
  '\n```<｜tool▁call▁end｜>',
  /<｜tool▁call▁begin｜>function<｜tool▁sep｜>([^\n]*)\n```json\n([\s\S]*?)\n?(?:```)?(?:<｜tool▁call▁end｜>|$)/g,
)

const deepseekV31 = deepseek(
  '',
  '<｜tool▁sep｜>',
  '<｜tool▁call▁end｜>',
  /<｜tool▁call▁begin｜>([\s\S]*?)<｜tool▁sep｜>([\s\S]*?)(?:<｜tool▁call▁end｜>|$)/g,
)

const kimi: ToolFormat = {
  begin: '<|tool_calls_section_begin|>',
  opening: '<|tool_calls_section_begin|><|tool_call_begin|>functions.',
  between: number => `:${number}<|tool_call_argument_begin|>`,
  id: (name, number) => `functions.${name}:${number}`,
  isJson: true,
  marks:
    '<|tool_calls_section_begin|><|tool_call_begin|><|tool_call_argument_begin|><|tool_call_end|><|tool_calls_section_end|>',
  parse: text =>
    Array.from(
      text.matchAll(
        /<\|tool_call_begin\|>\s*((?:functions\.)?([\w-]+):\d+)\s*<\|tool_call_argument_begin\|>\s*([\s\S]*?)\s*(?:<\|tool_call_end\|>|$)/g,
      ),
      ([, id, name, json]) => ({ id, name, arguments: json }),
    ),
}

/** Of GLM from 4.5 on; 4.7 leaves out line feeds. */
const glm: ToolFormat = {
  begin: '<tool_call>',
  opening: '<tool_call>',
  between: () => '',
  isJson: false,
  marks: '<tool_call></tool_call><arg_key></arg_key><arg_value></arg_value>',
  parse(text, isText) {
    const all = Array.from(
      text.matchAll(/<tool_call>([\s\S]*?)(?:<\/tool_call>|$)/g),
      ([, call]): Partial<ToolCall> & { arguments: string } => {
        const [, name] = /^\s*([\w-]+)\s*(?:<arg_key>|$)/.exec(call) ?? []
        const pairs = call.matchAll(/<arg_key>([\s\S]*?)<\/arg_key>\s*<arg_value>([\s\S]*?)<\/arg_value>/g)
        const values = Array.from(pairs, ([, key, value]) => [key, isText(name, key) ? value : jsonOrText(value)])
        return { name, arguments: JSON.stringify(Object.fromEntries(values)) }
      },
    )
    return all.every((call): call is ToolCall => call.name !== undefined) ? all : []
  },
}

function jsonOrText(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    return text
  }
}

/** Of a template's text. */
export function toolFormatOf(source: string): ToolFormat {
  if (source.includes(kimi.begin) || source.includes('tool_declare')) return kimi
  if (source.includes('<arg_key>')) return glm
  if (!source.includes(deepseekV3.begin)) return plain
  return source.includes('```json') ? deepseekV3 : deepseekV31
}

/** Reads the calls out of a text. */
export interface CallReader {
  /** From here on nothing is told until the text has ended. */
  readonly begin: string
  /** Whether that is the beginning of the text or nowhere. */
  readonly atOnce: boolean
  read(text: string): ToolCall[]
}

/** The parts of a text with its calls behind it; a text from `begin` on in which there are none is told as it is. */
export async function* withCalls(
  parts: AsyncIterable<TextPart>,
  { begin, atOnce, read }: CallReader,
): AsyncGenerator<TextPart> {
  let held = ''
  let isBegun = false
  let isOver = false
  for await (const part of parts) {
    held += part.text
    isOver ||= atOnce && !isBegun && held !== '' && !held.startsWith(begin) && !begin.startsWith(held)
    const at: number = isBegun ? 0 : isOver ? -1 : held.indexOf(begin)
    const safe = at >= 0 ? at : isOver ? held.length : held.length - beginning(held, begin)
    isBegun ||= at >= 0
    if (safe > 0 || part.tokens?.length || part.reasoning) yield { ...part, text: held.slice(0, safe) }
    held = held.slice(safe)
  }
  const calls = isBegun ? read(held) : []
  if (calls.length > 0) yield { text: '', tokens: null, calls }
  else if (held !== '') yield { text: held, tokens: null }
}

/** Length of the end of a text that may become this one. */
export function beginning(text: string, of: string): number {
  for (let n = Math.min(of.length - 1, text.length); n > 0; n--) if (text.endsWith(of.slice(0, n))) return n
  return 0
}
