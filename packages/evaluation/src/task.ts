/** @file The definition of a task: how items become prompts, and which answers are correct. */

/** An item of a task: one JSON object of its file. */
export type Item = Readonly<Record<string, unknown>>

/**
 * How to read a value from an item: a field name (`question`, or `choices.text` for a nested field), a Jinja template (`Question: {{question}}`), or a function. A
 * template that consists of one expression, such as `{{ [sol1, sol2] }}`, returns the expression's value.
 */
export type Field<T> = string | ((item: Item) => T)

/** How to read a list of texts from an item, or a list that is the same for all items. */
export type ListField = Field<readonly string[]> | readonly string[]

/** Properties of tasks with prompts. */
export interface TaskTexts {
  /** The task's name in results. */
  readonly name: string
  /** The prompt, without the delimiter before the answer. */
  readonly context: Field<string>
  /** The text between prompt and answer. Default: a space. */
  readonly delimiter?: string
  /** A text before the examples and the prompt. */
  readonly description?: Field<string>
  /** The number of examples, with their answers, before each item; `evaluateTask` can override it. Default: 0. */
  readonly shots?: number
  /**
   * How examples are chosen: drawn for `each` item, drawn `once` for all items (much faster, because the model reads their common part once), or the `first` ones, if their order is part of
   * the task. Default: `each`.
   */
  readonly draw?: ExampleDraw
  /** The text after each example. Default: an empty line. */
  readonly exampleDelimiter?: string
  /** The item's group, such as its subject. Each group has its own results and its own examples. Default: no groups. */
  readonly group?: Field<string>
}

/** How examples are chosen: see `TaskTexts.draw`. */
export type ExampleDraw = 'each' | 'once' | 'first'

/** A multiple-choice task: the most likely choice is the model's answer. Metrics: `acc`, `acc_norm` (log-probabilities divided by characters), `acc_bytes` (divided by bytes). */
export interface ChoiceTask extends Omit<TaskTexts, 'context'> {
  /** The kind of task. */
  readonly kind: 'choice'
  /** The prompt; or a list with one context for each choice, followed by the same text, as in WinoGrande. */
  readonly context: Field<string | readonly string[]>
  /** The choices; with a list of contexts, the one text that follows each of them. */
  readonly choices: ListField | Field<string>
  /** The correct choice: its number from 0, its label or its text. */
  readonly answer: Field<string | number>
  /** The labels by which `answer` refers to the choices. */
  readonly labels?: ListField
}

/** A continuation task, such as predicting the last word in LAMBADA. Metrics: `acc` (whether greedy decoding gives exactly the answer) and `perplexity` of the answer. */
export interface ContinuationTask extends TaskTexts {
  /** The kind of task. */
  readonly kind: 'continuation'
  /** The expected continuation. */
  readonly answer: Field<string>
}

/** A generation task: the model generates an answer, which is compared with the correct one. */
export interface GenerationTask extends TaskTexts {
  /** The kind of task. */
  readonly kind: 'generation'
  /** The correct answer, or several alternatives. Examples use the first one. */
  readonly answer: Field<string | readonly string[]>
  /** Texts that end an answer, besides the model's end tokens. Default: `exampleDelimiter`. */
  readonly stop?: readonly string[]
  /** The maximum number of tokens of an answer. Default: 256. */
  readonly maxTokens?: number
  /** How to compare, by metric name. Default: `exact_match`, which compares the whole text. */
  readonly matches?: Readonly<Record<string, Match | ((text: string, item: Item) => boolean | number)>>
}

/** How to compare a generated text with an answer. Surrounding white space is always ignored. */
export interface Match {
  /** A regular expression that extracts the answer from the text: its first group that matched, or the whole match if it has no groups. A text that does not match is wrong. */
  readonly extract?: string
  /** Which of several matches of `extract` to use. Default: `first`. */
  readonly pick?: 'first' | 'last'
  /** Regular expressions whose matches are removed from both texts, one after the other. */
  readonly ignore?: readonly string[]
  /** Whether to ignore case. Default: false. */
  readonly ignoreCase?: boolean
  /** Whether to ignore ASCII punctuation. Default: false. */
  readonly ignorePunctuation?: boolean
}

/** A language-modelling task on whole texts. Metrics: `word_perplexity`, `byte_perplexity` and `bits_per_byte`. */
export interface TextTask {
  /** The kind of task. */
  readonly kind: 'text'
  /** The task's name in results. */
  readonly name: string
  /** The text. */
  readonly text: Field<string>
  /** The item's group. Each group has its own results. Default: no groups. */
  readonly group?: Field<string>
}

/** A task on which a model can be evaluated. */
export type Task = ChoiceTask | ContinuationTask | GenerationTask | TextTask
