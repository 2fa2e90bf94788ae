/**
 * @file Renders chat templates with limited work: templates come with downloaded models, and a malicious one may never
 * end.
 */

/** The part of @huggingface/jinja that is used here. Its own types require a bundler. */
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

/**
 * How the work of a node depends on its operands: `lookup` not at all, `pass` on their size, `search` on the product of
 * their sizes.
 */
type Work = 'lookup' | 'search' | 'pass'

/** Number of steps that every template may take. Templates take some hundreds per message. */
const STEPS = 200_000
/** Additional steps for each character of the conversation. */
const STEPS_PER_CHARACTER = 100
/** Steps that a list item counts for, since loops run for each. */
const STEPS_PER_ITEM = 10
/** Maximum product of the lengths of two texts in a search or replacement. */
const MAX_SEARCH = 2 ** 27

/** Thrown when rendering exceeds the limit. */
export class TooManySteps extends Error {}

/**
 * Returns a function that renders a template.
 * @throws TooManySteps (the returned function), and errors of @huggingface/jinja for an invalid template
 */
export function boundedRender(jinja: Jinja, source: string): (variables: Record<string, unknown>) => string {
  const template = new jinja.Template(source)

  /** Counts evaluated nodes and the size of their operands: characters of texts and items of lists. */
  class BoundedInterpreter extends jinja.Interpreter {
    left: number
    /** The kind of node that is being evaluated, and the size of its operands so far. */
    #current: { readonly work: Work; size: number } = { work: 'pass', size: 0 }

    constructor(environment: Environment, steps: number) {
      super(environment)
      this.left = steps
    }

    spend(steps: number): void {
      this.left -= steps
      if (!(this.left >= 0)) throw new TooManySteps()
    }

    override evaluate(node: Node | undefined, environment: Environment) {
      const outer = this.#current
      const own = { work: workOf(node), size: 0 }
      this.#current = own
      try {
        const value = super.evaluate(node, environment)
        // The operand of a method is its object.
        const size = typeof value.value === 'function' ? own.size : sizeOf(value.value)
        this.spend(outer.work === 'lookup' ? 1 : 1 + size)
        if (outer.work === 'search') {
          const search = outer.size * size
          this.spend(search > MAX_SEARCH ? Number.POSITIVE_INFINITY : search / 100)
        }
        outer.size += size
        return value
      } finally {
        this.#current = outer
      }
    }
  }

  return variables => {
    const environment = new jinja.Environment()
    const size = JSON.stringify(variables)?.length ?? 0
    const interpreter = new BoundedInterpreter(environment, STEPS + STEPS_PER_CHARACTER * size)
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

/** The constants that jinja's own `render` defines. */
const constants = { true: true, True: true, false: false, False: false, none: null, None: null }

function raise(message: string): never {
  throw new Error(message)
}

const strftime = (jinja: Jinja) => (format: string) =>
  new jinja.Template('{{ strftime_now(format) }}').render({ format })

/** Returns the work of a node. */
function workOf({ type, operator, filter }: Partial<Node> = {}): Work {
  switch (type) {
    // `messages[0]` and `messages | length` do not read all messages.
    case 'MemberExpression':
      return 'lookup'
    case 'FilterExpression':
      return filter?.value === 'length' ? 'lookup' : 'search'
    // At worst, a text is searched for, or inserted, at every position of another.
    case 'CallExpression':
      return 'search'
    default:
      return operator?.value === 'in' || operator?.value === 'not in' ? 'search' : 'pass'
  }
}

/** Returns the size of an operand in steps. */
function sizeOf(value: unknown): number {
  if (typeof value === 'string') return value.length
  if (Array.isArray(value)) return value.length * STEPS_PER_ITEM
  return value instanceof Map ? value.size * STEPS_PER_ITEM : 0
}
