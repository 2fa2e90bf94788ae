/** @file The formats in which models write tool calls. */
import { randomUUID } from 'node:crypto'

export interface ToolCall {
  readonly name: string
  /** The arguments as the model wrote them: usually, but not necessarily, valid JSON. */
  readonly arguments: string
  /** The id, in formats in which the model writes one. */
  readonly id?: string
}

/** A format in which models write tool calls. */
export interface ToolFormat {
  /** Marks the start of the calls, which extend to the end of the text. */
  readonly begin: string
  /** Marks the start of each call. */
  readonly callBegin: string
  /** The text from `begin` up to the name of the first call. From its `callBegin` on, it is also that of further calls. */
  readonly opening: string
  /** The text between name and arguments of a call. If there are several parts, the number of the call is between them, counted from 0 within a conversation. */
  readonly separator: readonly string[]
  /** The text after the arguments of a call. */
  readonly end: string
  /** The id of a call, in formats in which the model writes one. */
  id?(name: string, number: number): string
  /** Whether the arguments are JSON. */
  readonly isJson: boolean
  /** All control tokens of the format, concatenated. */
  readonly controlTokens: string
  /**
   * Parses a text that starts with `begin`, in time proportional to its length, since models may repeat a marker endlessly. Returns an empty list if it contains no valid calls.
   * @param isString whether an argument of a tool is a string; needed by formats that write strings without quotes
   */
  parse(text: string, isString: (tool: string, argument: string) => boolean): ToolCall[]
  /** Describes tools in a message, for models whose template does not. */
  describeTools?(tools: readonly object[]): string
}

/** The format of Hermes, Qwen and `plainChatTemplate`. */
const plain: ToolFormat = {
  begin: '<tool_call>',
  callBegin: '<tool_call>',
  opening: '<tool_call>\n{"name": "',
  separator: ['", "arguments": '],
  end: '}\n</tool_call>',
  isJson: true,
  controlTokens: '<tool_call></tool_call>',
  parse(text) {
    try {
      return Array.from(text.matchAll(/<tool_call>([\s\S]*?)(<\/tool_call>|$)/g), ([, json]) => {
        const { name, arguments: given = {} } = JSON.parse(json)
        if (typeof name !== 'string') throw new TypeError('missing name')
        return { name, arguments: typeof given === 'string' ? given : JSON.stringify(given) }
      })
    } catch {
      return []
    }
  },
}

function deepseek(kind: string, separator: string, end: string, call: RegExp): ToolFormat {
  const opening = `<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>${kind}`
  return {
    begin: '<｜tool▁calls▁begin｜>',
    callBegin: '<｜tool▁call▁begin｜>',
    opening,
    separator: [separator],
    end,
    isJson: true,
    controlTokens: '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜><｜tool▁sep｜><｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    parse: text => Array.from(text.matchAll(call), ([, name, json]) => ({ name, arguments: json })),
    // The text of https://huggingface.co/deepseek-ai/DeepSeek-V3.1.
    describeTools: tools =>
      [
        '## Tools\nYou have access to the following tools:\n',
        ...tools.map(tool => {
          const { name, description = '', parameters = {} } = (tool as { function: Record<string, unknown> }).function
          return `### ${name}\nDescription: ${description}\n\nParameters: ${JSON.stringify(parameters)}\n`
        }),
        'IMPORTANT: ALWAYS adhere to this exact format for tool use:',
        `${opening}tool_call_name${separator}tool_call_arguments${end}{additional_tool_calls}<｜tool▁calls▁end｜>\n`,
        'Where:',
        '- `tool_call_name` must be an exact match to one of the available tools',
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema",
        '- For multiple tool calls, chain them directly without separators or spaces',
      ].join('\n'),
  }
}

/** The format of DeepSeek-V3 and R1. */
const deepseekV3 = deepseek(
  'function<｜tool▁sep｜>',
  '\n```json\n',
  '\n```<｜tool▁call▁end｜>',
  /<｜tool▁call▁begin｜>function<｜tool▁sep｜>([^\n<]*)\n```json\n([\s\S]*?)\n?(?:```)?(?:<｜tool▁call▁end｜>|$)/g,
)

const deepseekV31 = deepseek(
  '',
  '<｜tool▁sep｜>',
  '<｜tool▁call▁end｜>',
  /<｜tool▁call▁begin｜>([^<]*)<｜tool▁sep｜>([\s\S]*?)(?:<｜tool▁call▁end｜>|$)/g,
)

const kimi: ToolFormat = {
  begin: '<|tool_calls_section_begin|>',
  callBegin: '<|tool_call_begin|>',
  opening: '<|tool_calls_section_begin|><|tool_call_begin|>functions.',
  separator: [':', '<|tool_call_argument_begin|>'],
  end: '<|tool_call_end|>',
  id: (name, number) => `functions.${name}:${number}`,
  isJson: true,
  controlTokens:
    '<|tool_calls_section_begin|><|tool_call_begin|><|tool_call_argument_begin|><|tool_call_end|><|tool_calls_section_end|>',
  parse: text =>
    Array.from(
      text.matchAll(
        /<\|tool_call_begin\|>\s*((?:functions\.)?([\w-]+):\d+)\s*<\|tool_call_argument_begin\|>([\s\S]*?)(?:<\|tool_call_end\|>|$)/g,
      ),
      ([, id, name, json]) => ({ id, name, arguments: json.trim() }),
    ),
}

/** Key and value of an argument. Neither contains another beginning, so that the time does not grow with the square of the number of those without an end. */
const argumentOfGlm =
  /<arg_key>((?:(?!<arg_key>)[\s\S])*?)<\/arg_key>\s*<arg_value>((?:(?!<arg_value>)[\s\S])*?)<\/arg_value>/g

/** The format of GLM 4.5 and later. GLM 4.7 omits the line feeds. */
const glm: ToolFormat = {
  begin: '<tool_call>',
  callBegin: '<tool_call>',
  opening: '<tool_call>',
  separator: [''],
  end: '</tool_call>',
  isJson: false,
  controlTokens: '<tool_call></tool_call><arg_key></arg_key><arg_value></arg_value>',
  parse(text, isString) {
    const all = Array.from(
      text.matchAll(/<tool_call>([\s\S]*?)(?:<\/tool_call>|$)/g),
      ([, call]): Partial<ToolCall> & { arguments: string } => {
        const [, name] = /^\s*([\w-]+)\s*(?:<arg_key>|$)/.exec(call) ?? []
        const pairs = call.matchAll(argumentOfGlm)
        const values = Array.from(pairs, ([, key, value]) => [key, isString(name, key) ? value : jsonOrText(value)])
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

/** Detects the format from the source of a chat template. */
export function toolFormatOf(source: string): ToolFormat {
  if (source.includes(kimi.begin) || source.includes('tool_declare')) return kimi
  if (source.includes('<arg_key>')) return glm
  if (!source.includes(deepseekV3.begin)) return plain
  return source.includes('```json') ? deepseekV3 : deepseekV31
}

/** Creates an id for a call without one. */
export const newCallId = (): string => `call_${randomUUID().replaceAll('-', '')}`
