/** @file Corrupt, malicious and unsupported tokenizer.json files. */
import { expect, test } from 'vitest'
import { BpeTokenizer, TokenizerError, trainBpe } from '../index.ts'

// biome-ignore lint/suspicious/noExplicitAny: the tests modify files of any shape
type Json = Record<string, any>

const good = JSON.stringify(
  trainBpe(['the cat sat on the mat'], { vocabSize: 270, minFrequency: 1, specialTokens: ['<s>'] }),
)

function load(change: (json: Json) => void): BpeTokenizer {
  const json = JSON.parse(good)
  change(json)
  return BpeTokenizer.fromJSON(json)
}

test.each<[string, (json: Json) => void, string]>([
  ['no model', json => delete json.model, 'model: is missing'],
  ['another type of model', json => (json.model.type = 'Unigram'), 'model.type: "Unigram" is not supported'],
  [
    'a vocabulary that is an array',
    json => (json.model.vocab = ['a']),
    'model.vocab: expected an object, got an array of 1',
  ],
  ['a string id', json => (json.model.vocab.a = '1'), 'model.vocab["a"]: expected an id'],
  ['a negative id', json => (json.model.vocab.a = -1), 'expected an id from 0'],
  ['a huge id', json => (json.model.vocab.a = 1e9), 'expected an id from 0'],
  ['a duplicate id', json => (json.model.vocab.zz = 5), 'have the same id 5'],
  ['merges that are a string', json => (json.model.merges = 'a b'), 'model.merges: expected an array, got "a b"'],
  ['a merge of three tokens', json => (json.model.merges[0] = 'a b c'), 'expected two tokens with one space between'],
  [
    'a list of three tokens as a merge',
    json => json.model.merges[0].push('c'),
    'model.merges[0]: expected two tokens, got 3',
  ],
  ['a merge of a number', json => (json.model.merges[0] = [1, 2]), 'model.merges[0][0]: expected a string, got 1'],
  [
    'a merge of an unknown token',
    json => (json.model.merges[2] = ['qq', 'a']),
    'model.merges[2]: "qq" is not in the vocabulary',
  ],
  ['a merge into an unknown token', json => (json.model.merges[2] = ['q', 'q']), '"qq" is not in the vocabulary'],
  ['dropout', json => (json.model.dropout = 0.1), 'model.dropout: 0.1 is not supported'],
  ['byte fallback', json => (json.model.byte_fallback = true), 'model.byte_fallback'],
  ['a word suffix', json => (json.model.end_of_word_suffix = '</w>'), 'model.end_of_word_suffix'],
  ['truncation', json => (json.truncation = { max_length: 5 }), 'a truncation policy is not supported'],
  [
    'an unknown normalizer',
    json => (json.normalizer = { type: 'Lowercase' }),
    'normalizer.type: "Lowercase" is not supported',
  ],
  ['no pre-tokenizer', json => (json.pre_tokenizer = null), 'only byte-level vocabularies'],
  [
    'an unknown step',
    json => (json.pre_tokenizer.pretokenizers[0] = { type: 'UnicodeScripts' }),
    'pre_tokenizer.pretokenizers[0].type: "UnicodeScripts"',
  ],
  [
    'an unknown behaviour',
    json => (json.pre_tokenizer.pretokenizers[0].behavior = 'Eaten'),
    '"Eaten" is not a behaviour',
  ],
  ['a broken pattern', json => (json.pre_tokenizer.pretokenizers[0].pattern.Regex = '(a'), 'unclosed group'],
  [
    'an unknown post-processor',
    json => (json.post_processor = { type: 'BertProcessing' }),
    'post_processor.type: "BertProcessing"',
  ],
  [
    'a template with an unknown token',
    json =>
      (json.post_processor = {
        type: 'TemplateProcessing',
        single: [{ SpecialToken: { id: '<x>', type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
        special_tokens: {},
      }),
    '"<x>", which is not a token',
  ],
  ['an unknown decoder', json => (json.decoder = { type: 'WordPiece' }), 'decoder.type: "WordPiece"'],
  [
    'an added token with the id of another token',
    json => json.added_tokens.push({ id: 9, content: '<new>' }),
    'have the same id 9',
  ],
  [
    'an added token with two ids',
    json => json.added_tokens.push({ id: 400, content: '<s>' }),
    '"<s>" has the ids 0 and 400',
  ],
  ['an empty added token', json => json.added_tokens.push({ id: 400, content: '' }), 'is empty'],
])('rejects %s', (_, change, message) => {
  expect(() => load(change)).toThrow(TokenizerError)
  expect(() => load(change)).toThrow(message)
})

test('rejects text that is not JSON', () => {
  expect(() => BpeTokenizer.fromJSON(good.slice(0, -20))).toThrow('not JSON')
  // Some editors write a byte order mark.
  expect(BpeTokenizer.fromJSON(`\uFEFF${good}`).toJSON()).toEqual(BpeTokenizer.fromJSON(good).toJSON())
  expect(() => BpeTokenizer.fromJSON('[]')).toThrow('expected an object')
})

test.each(['normalizer', 'pre_tokenizer', 'post_processor', 'decoder'])(
  'a %s that is nested too deeply is rejected',
  name => {
    let deep: unknown = null
    for (let i = 0; i < 100_000; i++) deep = { type: 'Sequence', pretokenizers: [deep] }
    expect(() => load(json => (json[name] = deep))).toThrow('nests deeper than 64 levels')
    const round: unknown[] = []
    round.push(round, round)
    expect(() => load(json => (json[name] = round))).toThrow('nests deeper than 64 levels')
  },
)

test('an added token of thousands of characters is rejected', () => {
  const huge = { id: 1000, content: 'x'.repeat(1025), special: true }
  expect(() => load(json => json.added_tokens.push(huge))).toThrow(
    'added_tokens[1].content: a token of 1025 characters is not supported',
  )
})

test('a pattern that takes too long throws', () => {
  const tokenizer = load(json => {
    json.pre_tokenizer.pretokenizers[0].pattern.Regex = '(?=\\s*b)c'
  })
  expect(() => tokenizer.encode(`${' '.repeat(200_000)}b`)).toThrow('takes more than')
})

test('adds the special tokens of a template', () => {
  const text = { Sequence: { id: 'A', type_id: 0 } }
  const special = { SpecialToken: { id: '<s>', type_id: 0 } }
  const withTemplate = (single: Json[], special_tokens?: Json) =>
    load(json => (json.post_processor = { type: 'TemplateProcessing', single, special_tokens }))
  const tokenizer = withTemplate([special, text, special], { '<s>': { id: '<s>', ids: [0], tokens: ['<s>'] } })
  const a = tokenizer.tokenToId('a')
  expect([...tokenizer.encode('a')]).toEqual([0, a, 0])
  expect([...tokenizer.encode('a', { addSpecialTokens: false })]).toEqual([a])
  // A name may stand for several tokens. Without an entry, it is that of an added token.
  expect([...withTemplate([text, special], { '<s>': { ids: [5, 6] } }).encode('a')]).toEqual([a, 5, 6])
  expect([...withTemplate([text, special]).encode('a')]).toEqual([a, 0])
  expect(() => withTemplate([text, text])).toThrow(/single\[1\]: a template that does not contain the text once/)
})

test('only the start of the input is the first segment, even if a later segment is the same text', () => {
  const tokenizer = load(json => {
    json.normalizer = { type: 'NFC' }
    json.pre_tokenizer.pretokenizers[0] = { type: 'Metaspace', replacement: '_', prepend_scheme: 'first', split: false }
  })
  expect(tokenizer.decode(tokenizer.encode('cat<s>cat<s>cat'))).toBe('_cat<s>cat<s>cat')
})

test('applies the flags of added tokens', () => {
  const flags = (changed: Json) => (json: Json) =>
    json.added_tokens.push({ id: 300, content: 'tag', special: false, normalized: false, ...changed })
  const ids = (changed: Json, text: string) => {
    const tokenizer = load(flags(changed))
    return Array.from(tokenizer.encode(text), id => tokenizer.idToToken(id))
  }
  expect(ids({}, 'a tag tags')).toEqual(['a', 'Ġ', 'tag', 'Ġ', 'tag', 's'])
  expect(ids({ single_word: true }, 'a tag x')).toContain('tag')
  expect(ids({ single_word: true }, 'a tags')).not.toContain('tag')
  expect(ids({ lstrip: true, rstrip: true }, 'a  tag  b')).toEqual(['a', 'tag', 'b'])
})

test('a token can be named __proto__', () => {
  const json = JSON.parse(good.replace('"vocab":{', '"vocab":{"__proto__":400,'))
  const tokenizer = BpeTokenizer.fromJSON(json)
  expect(tokenizer.tokenToId('__proto__')).toBe(400)
  expect(BpeTokenizer.fromJSON(JSON.stringify(tokenizer)).tokenToId('__proto__')).toBe(400)
})
