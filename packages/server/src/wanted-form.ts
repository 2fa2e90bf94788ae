/** @file What a chat wants of the form of its answer: JSON, or calls of tools. */
import { z } from 'zod'
import { ApiError } from './errors.ts'
import type { Form } from './grammar-host.ts'
import { supportedSchema } from './json-schema.ts'
import type { CallReader, TemplateTools, ToolCall } from './tool-calls.ts'

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

export interface WantedForm {
  /** Given to the template. */
  readonly tools?: readonly object[]
  /** Stands behind the prompt: the answer goes on with it. */
  readonly prefix: string
  /** What the answer is held to, and by which field. */
  readonly form?: { readonly form: Form; readonly param: string }
  /** Undefined: there are no calls in the answer. */
  readonly calls?: CallReader
}

/** @throws ApiError 400 for what cannot be */
export function wantedForm(given: z.output<typeof fields>, template: TemplateTools): WantedForm {
  const { tools, tool_choice: choice = 'auto' } = given
  const isForced = choice === 'required' || (typeof choice === 'object' && choice !== null)
  if (isForced && !tools?.length) throw new ApiError(400, 'tool_choice goes with tools', { param: 'tool_choice' })
  const asked = wantedFormat(given.response_format)
  if (!tools?.length || choice === 'none') return { prefix: '', form: asked }
  if (asked) {
    const message = "response_format goes without tools, or with tool_choice: 'none'"
    throw new ApiError(400, message, { param: 'response_format' })
  }
  if (!template.isTold) {
    const message =
      "this model's chat template does not tell of tools: describe them in a message, or start the server with a template that does"
    throw new ApiError(400, message, { param: 'tools', code: 'unsupported_parameter' })
  }
  const most = given.parallel_tool_calls === false ? 1 : Infinity
  const { begin, opening, between, parse } = template.format
  if (!isForced) return { tools, prefix: '', calls: { begin, read: text => parse(text).slice(0, most) } }
  const named = typeof choice === 'object' ? choice?.function.name : undefined
  const callable = tools.filter(({ function: { name } }) => named === undefined || name === named)
  if (callable.length === 0) {
    throw new ApiError(400, `tool_choice: there is no tool ${JSON.stringify(named)}`, { param: 'tool_choice' })
  }
  const all = callable.map(({ function: { name, parameters } }, i) => {
    const schema = supportedSchema(parameters ?? { type: 'object', properties: {} }, `tools[${i}].function.parameters`)
    return { name, head: name + between, schema }
  })
  const [only, ...others] = all
  // What is certain the model need not write.
  const form = others.length === 0 ? [[only.schema]] : all.map(({ head, schema }) => [head, schema])
  const prefix = others.length === 0 ? opening + only.head : opening
  const read = (text: string): ToolCall[] => {
    if (others.length === 0) return [{ name: only.name, arguments: text }]
    const called = all.find(({ head }) => text.startsWith(head))
    return called ? [{ name: called.name, arguments: text.slice(called.head.length) }] : []
  }
  return { tools, prefix, form: { form, param: 'tools' }, calls: { begin: '', read } }
}

function wantedFormat(format: z.output<typeof fields>['response_format']): WantedForm['form'] {
  if (format == null || format.type === 'text') return undefined
  const param = format.type === 'json_object' ? 'response_format' : 'response_format.json_schema.schema'
  const schema = format.type === 'json_object' ? { type: 'object' } : format.json_schema.schema
  return { form: [[supportedSchema(schema, param)]], param }
}
