/**
 * @file Prints the `pre_tokenizer` configurations of the fixtures as JSON; run by
 * tools/reference/tokenizer_fixtures.py.
 */
import { registerAll } from '../src/all-features.ts'
import { feature } from '../src/features.ts'
import { preTokenizerJson, preTokenizerNames } from '../src/pre-tokenizers.ts'

const byteLevel = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: false }
const steps = (...pretokenizers: object[]) => ({ type: 'Sequence', pretokenizers: [...pretokenizers, byteLevel] })
const split = (pattern: object, behavior: string, invert = false) => ({ type: 'Split', pattern, behavior, invert })

const configs: Record<string, unknown> = {}
registerAll()
for (const name of preTokenizerNames()) configs[name] = preTokenizerJson(feature(name).patterns, feature(name).digits)
for (const behavior of ['Removed', 'Isolated', 'MergedWithPrevious', 'MergedWithNext', 'Contiguous']) {
  configs[`split ${behavior}`] = steps(split({ Regex: '[aeiou\\s]' }, behavior))
  configs[`split ${behavior} inverted`] = steps(split({ Regex: '\\p{L}+' }, behavior, true))
  configs[`split ${behavior} nothing inverted`] = steps(split({ Regex: 'a*' }, behavior, true))
  configs[`split ${behavior} literal`] = steps(split({ String: ' ' }, behavior))
  configs[`punctuation ${behavior}`] = steps({ type: 'Punctuation', behavior })
}
configs['zero width'] = steps(split({ Regex: '(?=(?:\\d{3})+(?!\\d))' }, 'Isolated'))
configs['look behind'] = steps(split({ Regex: '(?<=[a-z])(?=[A-Z])|(?<!\\d)\\.' }, 'Isolated'))
configs['lazy and atomic'] = steps(split({ Regex: '(?>a+|b)c?|".*?"|\\w+?\\b' }, 'Isolated'))
configs['case folding'] = steps(split({ Regex: "(?i:'s|ÉTÉ|ǆ)|(?i)[k-m]+" }, 'Isolated'))
configs['class algebra'] = steps(split({ Regex: '[\\p{L}&&[^\\p{Lu}aeiou]]+|[[:digit:]\\x{41}-\\x{46}]+' }, 'Isolated'))
configs['scripts'] = steps(split({ Regex: '\\p{Han}+|\\p{Hiragana}+|\\p{Katakana}+' }, 'Isolated'))
configs['anchors'] = steps(split({ Regex: '^\\s+|\\s+$|\\A.|\\R|.\\z' }, 'Isolated'))
configs['digits'] = steps({ type: 'Digits', individual_digits: false })
configs['single digits'] = steps({ type: 'Digits', individual_digits: true })
configs['whitespace'] = steps({ type: 'Whitespace' })
configs['whitespace split'] = steps({ type: 'WhitespaceSplit' })
configs['metaspace'] = steps({ type: 'Metaspace', replacement: '▁', prepend_scheme: 'always', split: true })
configs['metaspace first'] = steps({ type: 'Metaspace', replacement: '▁', prepend_scheme: 'first', split: true })
configs['metaspace first, its start removed'] = steps(split({ Regex: '^\\W+' }, 'Removed'), {
  type: 'Metaspace',
  replacement: '▁',
  prepend_scheme: 'first',
  split: true,
})
configs['metaspace never'] = steps({ type: 'Metaspace', replacement: '▁', prepend_scheme: 'never', split: false })
configs['prefix space'] = { type: 'ByteLevel', add_prefix_space: true, trim_offsets: true, use_regex: true }
configs['digits in gpt2'] = {
  type: 'Sequence',
  pretokenizers: [
    { type: 'Digits', individual_digits: true },
    { ...byteLevel, use_regex: true },
  ],
}

process.stdout.write(JSON.stringify(configs))
