/** @file Rendering of a chat template with a limit to its work: templates come with downloaded models, and can be made to loop for ever. */

/** What is used here of @huggingface/jinja, whose own types need a bundler. */
export interface Jinja {
  readonly Template: new (source: string) => { readonly parsed: Node; render(variables: object): string }
  readonly Environment: new () => Environment
  readonly Interpreter: new (environment: Environment) => Interpreter
}

interface Environment {
  set(name: string, value: unknown): unknown
}

interface Interpreter {
  evaluate(node: Node | undefined, environment: Environment): { readonly value: unknown }
  run(program: Node): { readonly value: unknown }
}

interface Node {
  readonly type: string
  readonly operator?: { readonly value?: unknown }
  readonly filter?: { readonly value?: unknown }
}

type Work = 'lookup' | 'search' | 'pass'

/** Steps that every template may take, and more for each character of the conversation. A template takes some hundreds a message. */
const STEPS = 200_000
const STEPS_PER_CHARACTER = 100
/** Of an item of a list: what a loop makes for each. */
const STEPS_PER_ITEM = 10
/** Largest product of the lengths of two texts, one of which is looked for in the other, or put into it. */
const LARGEST_SEARCH = 2 ** 27

/** What `render` throws at the limit. */
export class TooManySteps extends Error {}

/** A function that renders a template, or throws TooManySteps. */
export function boundedRender(jinja: Jinja, source: string): (variables: Record<string, unknown>) => string {
  const template = new jinja.Template(source)

  /** Counts the nodes that it evaluates, and what they work on: characters of texts and items of lists, before the work is done. */
  class Bounded extends jinja.Interpreter {
    left: number
    /** The node that is being evaluated, and what its operands come to so far. */
    #within: { readonly work: Work; size: number } = { work: 'pass', size: 0 }

    constructor(environment: Environment, steps: number) {
      super(environment)
      this.left = steps
    }

    spend(steps: number): void {
      this.left -= steps
      if (!(this.left >= 0)) throw new TooManySteps()
    }

    override evaluate(node: Node | undefined, environment: Environment) {
      const outer = this.#within
      const own = { work: workOf(node), size: 0 }
      this.#within = own
      try {
        const value = super.evaluate(node, environment)
        // A method works on the object that it is of.
        const size = typeof value.value === 'function' ? own.size : sizeOf(value.value)
        this.spend(outer.work === 'lookup' ? 1 : 1 + size)
        if (outer.work === 'search') {
          const search = outer.size * size
          this.spend(search > LARGEST_SEARCH ? Number.POSITIVE_INFINITY : search / 100)
        }
        outer.size += size
        return value
      } finally {
        this.#within = outer
      }
    }
  }

  return variables => {
    const environment = new jinja.Environment()
    const size = JSON.stringify(variables)?.length ?? 0
    const interpreter = new Bounded(environment, STEPS + STEPS_PER_CHARACTER * size)
    const range = (start: number, stop?: number, step = 1): number[] => {
      const [from, to] = stop === undefined ? [0, start] : [start, stop]
      if (step === 0) throw new Error('range() step must not be zero')
      const length = Math.max(0, Math.ceil((to - from) / step))
      interpreter.spend(length * STEPS_PER_ITEM)
      return Array.from({ length }, (_, i) => from + i * step)
    }
    const globals = { ...constants, raise_exception: raise, range, strftime_now: strftime(jinja) }
    for (const [name, value] of Object.entries({ ...globals, ...variables })) environment.set(name, value)
    return String(interpreter.run(template.parsed).value)
  }
}

/** What jinja's own `render` gives every template. */
const constants = { true: true, True: true, false: false, False: false, none: null, None: null }

function raise(message: string): never {
  throw new Error(message)
}

const strftime = (jinja: Jinja) => (format: string) =>
  new jinja.Template('{{ strftime_now(format) }}').render({ format })

/** What a node does with its operands. */
function workOf({ type, operator, filter }: Partial<Node> = {}): Work {
  switch (type) {
    // `messages[0]` and `messages | length` do not look at all messages.
    case 'MemberExpression':
      return 'lookup'
    case 'FilterExpression':
      return filter?.value === 'length' ? 'lookup' : 'search'
    // At worst one text is looked for at every place of another, or put there.
    case 'CallExpression':
      return 'search'
    default:
      return operator?.value === 'in' || operator?.value === 'not in' ? 'search' : 'pass'
  }
}

function sizeOf(value: unknown): number {
  if (typeof value === 'string') return value.length
  if (Array.isArray(value)) return value.length * STEPS_PER_ITEM
  return value instanceof Map ? value.size * STEPS_PER_ITEM : 0
}
