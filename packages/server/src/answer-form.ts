/** @file Converts `response_format`, `tools` and `tool_choice` of a chat to a constraint on its answer. */
import { z } from 'zod'
import { Effort } from './automaton.ts'
import { ApiError } from './errors.ts'
import type { CallForm, Form, FormPart } from './grammar-host.ts'
import { type SupportedSchema, supportedSchema } from './json-schema.ts'
import type { Thinking } from './reasoning.ts'
import { list, MAX_TOOLS } from './request-fields.ts'
import type { TemplateTraits } from './template-traits.ts'
import type { CallReader } from './tool-calls.ts'
import type { ToolCall, ToolFormat } from './tool-format.ts'

const tool = z.looseObject({
  type: z.literal('function', { error: 'expected function, the only supported type of tools' }),
  function: z.looseObject({
    name: z.string().regex(/^[\w-]{1,64}$/, 'expected up to 64 letters, digits, _ and -'),
    description: z.string().nullish(),
    parameters: z.looseObject({}).nullish(),
    strict: z.boolean().nullish(),
  }),
})

const format = z.discriminatedUnion(
  'type',
  [
    z.looseObject({ type: z.literal('text') }),
    z.looseObject({ type: z.literal('json_object') }),
    z.looseObject({
      type: z.literal('json_schema'),
      json_schema: z.looseObject({ name: z.string(), schema: z.looseObject({}) }),
    }),
  ],
  { error: 'expected text, json_object or json_schema' },
)

const namedTool = z.looseObject({ type: z.literal('function'), function: z.looseObject({ name: z.string() }) })

const allowedTools = z.looseObject({
  type: z.literal('allowed_tools'),
  allowed_tools: z.looseObject({ mode: z.enum(['auto', 'required']), tools: list(namedTool, MAX_TOOLS, 1) }),
})

export const formFields = {
  response_format: format.nullish(),
  tools: list(tool, MAX_TOOLS).nullish(),
  tool_choice: z
    .union([z.enum(['none', 'auto', 'required']), namedTool, allowedTools], {
      error:
        "expected none, auto, required, { type: 'function', function: { name } } or { type: 'allowed_tools', allowed_tools: { mode, tools } }",
    })
    .nullish(),
  parallel_tool_calls: z.boolean().nullish(),
}

const fields = z.object(formFields)

type FormFields = z.output<typeof fields>
type Tool = z.output<typeof tool>

export interface AnswerForm {
  /** Appended to the prompt; the answer continues it. */
  readonly prefix: string
  /** The form that the answer must have, and the request field that requires it. */
  readonly form?: { readonly form: Form; readonly param: string }
  /** How to extract tool calls from the answer. Undefined: it contains none. */
  readonly calls?: CallReader
}

/**
 * The tools to describe to the model: those that it may call.
 * @throws ApiError 400 if the chat template does not support tools, or an allowed tool does not exist
 */
export function promptedTools(
  { tools, tool_choice: choice }: FormFields,
  { describesTools, supportsCalls, format }: TemplateTraits,
): FormFields['tools'] & object {
  if (isForced(choice) && !tools?.length)
    throw new ApiError(400, 'tool_choice requires tools', { param: 'tool_choice' })
  if (!tools?.length || choice === 'none') return []
  if (describesTools || (supportsCalls && format.describeTools)) return allowedOf(tools, choice)
  const message =
    "this model's chat template does not support tools: describe them in a message, or start the server with a template that supports them"
  throw new ApiError(400, message, { param: 'tools', code: 'unsupported_parameter' })
}

function allowedOf(tools: FormFields['tools'] & object, choice: FormFields['tool_choice']) {
  if (typeof choice !== 'object' || choice?.type !== 'allowed_tools') return tools
  const allowed = new Set(choice.allowed_tools.tools.map(({ function: { name } }) => name))
  const unknown = [...allowed].find(name => !tools.some(tool => tool.function.name === name))
  if (unknown !== undefined) throw noSuchTool(unknown)
  return tools.filter(tool => allowed.has(tool.function.name))
}

const noSuchTool = (name: string) =>
  new ApiError(400, `tool_choice: no tool is named ${JSON.stringify(name)}`, { param: 'tool_choice' })

/**
 * The form of the answer, and how to extract tool calls from it.
 * @param tools the tools that are described to the model
 * @param thinking whether the answer starts with reasoning
 * @param number number of tool calls so far in the conversation
 * @throws ApiError 400 if a schema is unsupported or the chosen tool does not exist
 */
export function answerForm(
  given: FormFields,
  { format }: TemplateTraits,
  tools: FormFields['tools'] & object,
  thinking: Thinking,
  number: number,
): AnswerForm {
  const reasoning = thinking === 'none' ? [] : [{ thinking }]
  const effort = new Effort()
  const required = schemaOfFormat(given.response_format, effort)
  const json = required && { form: [[...reasoning, required.schema]], param: required.param }
  if (tools.length === 0) return { prefix: '', form: json }
  const isString = (name: string, argument: string) => {
    const own = tools.find(tool => tool.function.name === name)?.function.parameters?.properties
    return [(own as Record<string, { type?: unknown }> | undefined)?.[argument]?.type].flat().includes('string')
  }
  const maxCalls = given.parallel_tool_calls === false ? 1 : Infinity
  const parse = (text: string) => format.parse(text, isString).slice(0, maxCalls)
  // Arguments that are not JSON cannot be constrained.
  const isStrict = format.isJson && tools.some(tool => tool.function.strict)
  if (isForced(given.tool_choice)) return forcedCall(given, format, tools, thinking, number, parse, effort)
  const calls = { begin: format.begin, onlyAtStart: json !== undefined, read: parse }
  if (!isStrict) {
    const anyCalls = [...reasoning, format.begin, { anything: true as const }]
    return { prefix: '', form: json && { ...json, form: [...json.form, anyCalls] }, calls }
  }
  const schemas = tools.map(tool => (tool.function.strict ? argumentsOf(tool, given, effort) : anyObject))
  if (json) {
    // Grammars cannot have alternatives of which one is JSON and one is any number of calls, so it is one call.
    const oneOf = tools.map((tool, i) => [...reasoning, headOf(format, tool, number), schemas[i], format.end])
    return { prefix: '', form: { ...json, form: [...json.form, ...oneOf] }, calls }
  }
  const marked = { marker: format.callBegin, calls: tools.map((tool, i) => callForm(format, tool, schemas[i])) }
  return { prefix: '', form: { form: [[...reasoning, marked]], param: 'tools' }, calls }
}

/** The schema of the arguments of a tool. @throws ApiError 400 if it is unsupported */
function argumentsOf(tool: Tool, { tools }: FormFields, effort: Effort): SupportedSchema {
  // Clients expect an object, also of a schema without a type.
  const schema = { type: 'object', ...(tool.function.parameters ?? { properties: {} }) }
  return supportedSchema(schema, `tools[${tools?.indexOf(tool)}].function.parameters`, effort)
}

const anyObject = supportedSchema({ type: 'object' }, 'tools')
const callNumber = supportedSchema({ type: 'integer', minimum: 0 }, 'tools')

/** The text of the first call before its arguments. */
const headOf = ({ opening, separator }: ToolFormat, tool: Tool, number: number): string =>
  opening + tool.function.name + separator.join(String(number))

/** A call, which may be preceded by others. */
function callForm({ opening, callBegin, separator, end }: ToolFormat, tool: Tool, schema: SupportedSchema): CallForm {
  const [first, ...further] = separator
  const begin = opening.slice(opening.indexOf(callBegin)) + tool.function.name + first
  return { begin, content: [...further.flatMap((part): FormPart[] => [callNumber, part]), schema], end }
}

function isForced(choice: FormFields['tool_choice']): boolean {
  if (typeof choice !== 'object' || choice === null) return choice === 'required'
  return choice.type === 'function' || choice.allowed_tools.mode === 'required'
}

/** Forces one call with a valid name and, if the format writes them as JSON, valid arguments. */
function forcedCall(
  given: FormFields,
  format: ToolFormat,
  tools: FormFields['tools'] & object,
  thinking: Thinking,
  number: number,
  parse: (text: string) => ToolCall[],
  effort: Effort,
): AnswerForm {
  const { tool_choice: choice } = given
  const named = typeof choice === 'object' && choice?.type === 'function' ? choice.function.name : undefined
  const callable = tools.filter(({ function: { name } }) => named === undefined || name === named)
  if (named !== undefined && callable.length === 0) throw noSuchTool(named)
  const all = callable.map(tool => ({
    name: tool.function.name,
    head: headOf(format, tool, number),
    rest: format.isJson ? argumentsOf(tool, given, effort) : { anything: true as const },
  }))
  // Text that is already determined goes into the prompt instead of being generated.
  const prefix = thinking !== 'none' ? '' : all.length === 1 ? all[0].head : format.opening
  const reasoning = thinking === 'none' ? [] : [{ thinking }]
  const form = all.map(({ head, rest }) => [...reasoning, head.slice(prefix.length), rest].filter(part => part !== ''))
  const read = (text: string): ToolCall[] => {
    const whole = prefix + text
    if (!format.isJson) return parse(whole)
    const called = all.find(({ head }) => whole.startsWith(head))
    if (called === undefined) return []
    return [{ name: called.name, arguments: whole.slice(called.head.length), id: format.id?.(called.name, number) }]
  }
  return { prefix, form: { form, param: 'tools' }, calls: { begin: '', onlyAtStart: true, read } }
}

function schemaOfFormat(format: FormFields['response_format'], effort: Effort) {
  if (format == null || format.type === 'text') return undefined
  const param = format.type === 'json_object' ? 'response_format' : 'response_format.json_schema.schema'
  const schema = format.type === 'json_object' ? { type: 'object' } : format.json_schema.schema
  return { schema: supportedSchema(schema, param, effort), param }
}
