/** @file What a chat wants of the form of its answer: JSON, or calls of tools. */
import { z } from 'zod'
import { ApiError } from './errors.ts'
import type { Form } from './grammar-host.ts'
import { supportedSchema } from './json-schema.ts'
import type { Thinking } from './reasoning.ts'
import type { TemplateTraits } from './template-traits.ts'
import type { CallReader, ToolCall, ToolFormat } from './tool-calls.ts'

const tool = z.looseObject({
  type: z.literal('function', { error: 'expected function: there are no other tools' }),
  function: z.looseObject({
    name: z.string().regex(/^[\w-]{1,64}$/, 'expected up to 64 letters, digits, _ and -'),
    description: z.string().nullish(),
    parameters: z.looseObject({}).nullish(),
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

export const formFields = {
  response_format: format.nullish(),
  tools: z.array(tool).max(128).nullish(),
  tool_choice: z
    .union(
      [
        z.enum(['none', 'auto', 'required']),
        z.looseObject({ type: z.literal('function'), function: z.looseObject({ name: z.string() }) }),
      ],
      { error: "expected none, auto, required or { type: 'function', function: { name } }" },
    )
    .nullish(),
  parallel_tool_calls: z.boolean().nullish(),
}

const fields = z.object(formFields)

type FormFields = z.output<typeof fields>

export interface WantedForm {
  /** Stands behind the prompt: the answer goes on with it. */
  readonly prefix: string
  /** What the answer is held to, and by which field. */
  readonly form?: { readonly form: Form; readonly param: string }
  /** Undefined: there are no calls in the answer. */
  readonly calls?: CallReader
}

/**
 * The tools that the model is told of.
 * @throws ApiError 400 where it cannot be
 */
export function wantedTools(
  { tools, tool_choice: choice }: FormFields,
  { isTold, writesCalls, format }: TemplateTraits,
): FormFields['tools'] & object {
  if (isForced(choice) && !tools?.length)
    throw new ApiError(400, 'tool_choice goes with tools', { param: 'tool_choice' })
  if (!tools?.length || choice === 'none') return []
  if (isTold || (writesCalls && format.tell)) return tools
  const message =
    "this model's chat template does not tell of tools: describe them in a message, or start the server with a template that does"
  throw new ApiError(400, message, { param: 'tools', code: 'unsupported_parameter' })
}

/**
 * @param tools that the model is told of
 * @param thinking what the answer begins with
 * @param number of calls that were made before
 * @throws ApiError 400 for what cannot be
 */
export function wantedForm(
  given: FormFields,
  { format }: TemplateTraits,
  tools: FormFields['tools'] & object,
  thinking: Thinking,
  number: number,
): WantedForm {
  const reasoning = thinking === 'over' ? [] : [{ thinking }]
  const asked = wantedFormat(given.response_format)
  const json = asked && { form: [[...reasoning, asked.schema]], param: asked.param }
  if (tools.length === 0) return { prefix: '', form: json }
  const isText = (name: string, argument: string) => {
    const own = tools.find(tool => tool.function.name === name)?.function.parameters?.properties
    return [(own as Record<string, { type?: unknown }> | undefined)?.[argument]?.type].flat().includes('string')
  }
  const most = given.parallel_tool_calls === false ? 1 : Infinity
  const parse = (text: string) => format.parse(text, isText).slice(0, most)
  if (!isForced(given.tool_choice)) {
    const calls = [...reasoning, format.begin, { anything: true as const }]
    const form = json && { ...json, form: [...json.form, calls] }
    return { prefix: '', form, calls: { begin: format.begin, atOnce: json !== undefined, read: parse } }
  }
  return forcedCall(given.tool_choice, format, tools, thinking, number, parse)
}

const isForced = (choice: FormFields['tool_choice']) =>
  choice === 'required' || (typeof choice === 'object' && choice !== null)

/** One call, whose name and, where they are JSON, arguments are certain. */
function forcedCall(
  choice: FormFields['tool_choice'],
  format: ToolFormat,
  tools: FormFields['tools'] & object,
  thinking: Thinking,
  number: number,
  parse: (text: string) => ToolCall[],
): WantedForm {
  const named = typeof choice === 'object' ? choice?.function.name : undefined
  const callable = tools.filter(({ function: { name } }) => named === undefined || name === named)
  if (callable.length === 0) {
    throw new ApiError(400, `tool_choice: there is no tool ${JSON.stringify(named)}`, { param: 'tool_choice' })
  }
  const all = callable.map(({ function: { name, parameters } }, i) => {
    const param = `tools[${i}].function.parameters`
    const rest = format.isJson
      ? supportedSchema(parameters ?? { type: 'object', properties: {} }, param)
      : { anything: true as const }
    return { name, head: format.opening + name + format.between(number), rest }
  })
  // What is certain the model need not write.
  const prefix = thinking !== 'over' ? '' : all.length === 1 ? all[0].head : format.opening
  const reasoning = thinking === 'over' ? [] : [{ thinking }]
  const form = all.map(({ head, rest }) => [...reasoning, head.slice(prefix.length), rest].filter(part => part !== ''))
  const read = (text: string): ToolCall[] => {
    const whole = prefix + text
    if (!format.isJson) return parse(whole)
    const called = all.find(({ head }) => whole.startsWith(head))
    if (called === undefined) return []
    return [{ name: called.name, arguments: whole.slice(called.head.length), id: format.id?.(called.name, number) }]
  }
  return { prefix, form: { form, param: 'tools' }, calls: { begin: '', atOnce: true, read } }
}

function wantedFormat(format: FormFields['response_format']) {
  if (format == null || format.type === 'text') return undefined
  const param = format.type === 'json_object' ? 'response_format' : 'response_format.json_schema.schema'
  const schema = format.type === 'json_object' ? { type: 'object' } : format.json_schema.schema
  return { schema: supportedSchema(schema, param), param }
}
