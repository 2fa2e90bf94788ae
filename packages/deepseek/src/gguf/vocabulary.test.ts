import type { PreTokenizerName } from '@moe/tokenizer-bpe'
import { describe, expect, test } from 'vitest'
import { parseConfig } from '../index.ts'
import { cases } from './test-cases.ts'
import { tokenizerWith } from './test-model.ts'
import { vocabularyOf } from './vocabulary.ts'

const config = parseConfig(cases.v3)
const tokenizer = tokenizerWith('deepseek-v3')
const json = tokenizer.toJSON() as Record<string, unknown>
const values = (files: Parameters<typeof vocabularyOf>[1], of = config) =>
  Object.fromEntries(
    Object.entries(vocabularyOf(of, files).metadata).map(([key, { value }]) => [key.replace('tokenizer.', ''), value]),
  )

describe('a vocabulary', () => {
  test('contains all tokens with their types, merges and special ids', () => {
    const found = values({ tokenizer: json })
    const tokens = found['ggml.tokens'] as string[]
    const types = found['ggml.token_type'] as Int32Array
    expect(tokens.length).toBe(320)
    expect(tokens.slice(0, tokenizer.vocabSize)).toEqual(
      Array.from({ length: tokenizer.vocabSize }, (_, id) => tokenizer.idToToken(id)),
    )
    expect(tokens[319]).toBe('[PAD319]')
    expect([types[0], types[1], types[2], types[319]]).toEqual([3, 3, 1, 5])
    expect(found['ggml.merges']).toHaveLength(tokenizer.mergeCount)
    expect(found).toMatchObject({
      'ggml.model': 'gpt2',
      'ggml.bos_token_id': 1,
      'ggml.eos_token_id': 0,
      'ggml.add_bos_token': false,
    })
    for (const merge of found['ggml.merges'] as string[]) expect(merge).toMatch(/^[^ ]+ [^ ]+$/)
  })

  test('contains the tokens that end turns, whether a begin token is added, and the chat template', () => {
    const template = {
      type: 'TemplateProcessing',
      single: [{ SpecialToken: { id: '<|begin|>', type_id: 0 } }],
      pair: [],
    }
    const found = values(
      {
        tokenizer: { ...json, post_processor: { type: 'Sequence', processors: [{ type: 'ByteLevel' }, template] } },
        tokenizerConfig: {
          chat_template: [
            { name: 'tools', template: 'b' },
            { name: 'default', template: 'a' },
          ],
        },
      },
      parseConfig({ ...cases.v3, eos_token_id: [0, 7, 9] }),
    )
    const ids = { 'ggml.eos_token_id': 0, 'ggml.eot_token_id': 7, 'ggml.eom_token_id': 9 }
    expect(found).toMatchObject({ ...ids, 'ggml.add_bos_token': true, chat_template: 'a' })
    const settings = { add_bos_token: false, add_eos_token: true, chat_template: 'a' }
    expect(
      values({ tokenizer: { ...json, post_processor: template }, tokenizerConfig: settings, chatTemplate: 'c' }),
    ).toMatchObject({ 'ggml.add_bos_token': false, 'ggml.add_eos_token': true, chat_template: 'c' })
  })

  test.each<[PreTokenizerName, string]>([
    ['deepseek-v3', 'deepseek-v3'],
    ['deepseek-llm', 'deepseek-llm'],
    ['gpt2', 'gpt-2'],
    ['cl100k', 'dbrx'],
    ['o200k', 'gpt-4o'],
    ['qwen2', 'qwen2'],
  ])('with the pre-tokenizer %s has the name %s in llama.cpp', (name, nameInLlamaCpp) => {
    expect(values({ tokenizer: tokenizerWith(name).toJSON() })['ggml.pre']).toBe(nameInLlamaCpp)
  })

  test('of Llama 3, which ignores merges for pieces that are tokens, has the name llama-bpe', () => {
    const llama3 = tokenizerWith('cl100k').toJSON() as { model: object }
    const tokenizer = { ...llama3, model: { ...llama3.model, ignore_merges: true } }
    expect(values({ tokenizer })['ggml.pre']).toBe('llama-bpe')
  })

  test('may contain tokens with the names of object properties', () => {
    const tokenizer = { ...json, model: { vocab: JSON.parse('{"__proto__": 3, "constructor": 4}'), merges: [] } }
    expect((values({ tokenizer })['ggml.tokens'] as string[]).slice(3, 5)).toEqual(['__proto__', 'constructor'])
  })

  test('with an unknown pre-tokenizer requires its name in llama.cpp', () => {
    const other = { ...json, pre_tokenizer: { type: 'Whitespace' } }
    expect(() => values({ tokenizer: other })).toThrow(
      /no known equivalent of the pre_tokenizer .*; pass \{ preTokenizer \}/,
    )
    expect(values({ tokenizer: other, preTokenizer: 'bloom' })['ggml.pre']).toBe('bloom')
  })

  test('has notes on what is not exported', () => {
    const notes = (tokenizer: unknown, of = config) => vocabularyOf(of, { tokenizer }).notes.join('\n')
    expect(notes(json)).toBe('')
    expect(notes({ ...json, normalizer: { type: 'Sequence', normalizers: [] } })).toBe('')
    expect(notes({ ...json, normalizer: { type: 'NFC' } })).toMatch(/normalizer is not exported/)
    expect(notes(json, parseConfig({ ...cases.v3, eos_token_id: null }))).toMatch(/uses token 11/)
    expect(notes(json, parseConfig({ ...cases.v3, eos_token_id: [1, 2, 3, 4] }))).toMatch(/the first three/)
  })

  test.each<[string, unknown, RegExp]>([
    ['of another type', { ...json, model: { type: 'Unigram', vocab: [], merges: [] } }, /model.type.*byte-level BPE/],
    ['that is not an object', 'tokens', /at the top/],
    [
      'with invalid ids',
      { ...json, model: { vocab: { a: -1 }, merges: [] } },
      /model.vocab: must give each token an id/,
    ],
    ['with merges of three tokens', { ...json, model: { vocab: {}, merges: [['a', 'b', 'c']] } }, /model.merges.0/],
    [
      'larger than the model',
      { ...json, model: { vocab: { a: 320 }, merges: [] } },
      /the id 320, beyond the model's vocab_size of 320/,
    ],
  ])('%s is rejected', (_, tokenizer, message) => {
    expect(() => values({ tokenizer })).toThrow(message)
  })
})
