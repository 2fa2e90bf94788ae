/** @file What a task is: how items of a file become texts, and what is right. */

/** What one line of a task's file says, by the names of its fields. */
export type Item = Readonly<Record<string, unknown>>

/**
 * Something of an item: the name of a field (`question`, or `choices.text` for one within another), a Jinja template (`Question: {{question}}`), or a function. A
 * template that is one expression, such as `{{ [sol1, sol2] }}`, gives its value.
 */
export type Field<T> = string | ((item: Item) => T)

/** A list of texts of an item, or the same one for all. */
export type ListField = Field<readonly string[]> | readonly string[]

/** What all kinds of tasks have. */
export interface TaskTexts {
  /** Of results. */
  readonly name: string
  /** What the model is asked: the text in front of the answer, without the space between. */
  readonly context: Field<string>
  /** Between a context and its answer. Default a space. */
  readonly delimiter?: string
  /** Stands in front of everything, a Jinja template. */
  readonly description?: Field<string>
  /** Examples with their answers in front of each item, unless `evaluateTask` is told otherwise. Default 0. */
  readonly shots?: number
  /**
   * Which ones: drawn for `each` item, drawn `once` for all (what they share is read once, which is much faster), or the `first` ones, where their order is a part of the
   * task. Default `each`.
   */
  readonly draw?: ExampleDraw
  /** Behind each example. Default an empty line. */
  readonly exampleDelimiter?: string
  /** What tells parts of the task apart, such as subjects: each has results of its own, and examples of its own. */
  readonly group?: Field<string>
}

/** How examples are chosen. */
export type ExampleDraw = 'each' | 'once' | 'first'

/** Which of several answers the model finds likeliest. */
export interface ChoiceTask extends Omit<TaskTexts, 'context'> {
  /** Tells the kinds apart. */
  readonly kind: 'choice'
  /** What the model is asked; or, as WinoGrande has it, a list, one for each choice, that all go on with the same `choices`. */
  readonly context: Field<string | readonly string[]>
  /** The answers to choose from. With a list of contexts, the one text that they go on with. */
  readonly choices: ListField | Field<string>
  /** Which one is right: its number from 0, its label or its text. */
  readonly answer: Field<string | number>
  /** What the choices are called in `answer`. */
  readonly labels?: ListField
}

/** Whether the model goes on with exactly this, as LAMBADA asks for the last word of a text, and how likely it finds it. */
export interface ContinuationTask extends TaskTexts {
  /** Tells the kinds apart. */
  readonly kind: 'continuation'
  /** What it is to go on with. */
  readonly answer: Field<string>
}

/** Whether an answer that the model writes is right. */
export interface GenerationTask extends TaskTexts {
  /** Tells the kinds apart. */
  readonly kind: 'generation'
  /** The right answer, or several of which each is. Examples have the first. */
  readonly answer: Field<string | readonly string[]>
  /** Texts that end an answer, besides the model's end tokens. Default an empty line. */
  readonly stop?: readonly string[]
  /** Most tokens of an answer. Default 256. */
  readonly maxTokens?: number
  /** Ways to tell whether it is right, by the names of the results. Default `exact_match`: the text is the same. */
  readonly matches?: Readonly<Record<string, Match | ((text: string, item: Item) => boolean | number)>>
}

/** When a text that the model wrote is an answer. White space around both counts for nothing. */
export interface Match {
  /** A regular expression; what its first group that has matched says, or all of it, is compared. A text that it does not match is wrong. */
  readonly extract?: string
  /** Which of several matches. Default `first`. */
  readonly pick?: 'first' | 'last'
  /** Regular expressions whose matches are taken out of both, one after the other. */
  readonly ignore?: readonly string[]
  /** Whether upper and lower case are the same. Default false. */
  readonly ignoreCase?: boolean
  /** Whether ASCII punctuation is left out of both. Default false. */
  readonly ignorePunctuation?: boolean
}

/** How well the model predicts whole texts: perplexities, and bits per byte. */
export interface TextTask {
  /** Tells the kinds apart. */
  readonly kind: 'text'
  /** Of results. */
  readonly name: string
  /** The text. */
  readonly text: Field<string>
  /** What tells parts of the task apart: each has results of its own. */
  readonly group?: Field<string>
}

/** Something that a model can be judged by. */
export type Task = ChoiceTask | ContinuationTask | GenerationTask | TextTask
