// Compares with llama.cpp, if it is installed: npm install --prefix bench/peers/llama-cpp
import { execFile } from 'node:child_process'
import { existsSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { promisify } from 'node:util'
import type { GgufEncoding } from '@moe/checkpoint'
import { setDefaultBackend, tensor } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import type { PreTokenizerName } from '@moe/tokenizer-bpe'
import { afterAll, describe, expect, test } from 'vitest'
import type { DeepSeekConfigInput } from '../index.ts'
import { exportGguf } from './export-gguf.ts'
import { cases } from './test-cases.ts'
import { modelOf, tokenizerWith } from './test-model.ts'

setDefaultBackend(referenceBackend())

const peer = resolve(import.meta.dirname, '../../../../bench/peers/llama-cpp')
const folder = await mkdtemp(join(tmpdir(), 'moe-llama-cpp-'))
afterAll(() => rm(folder, { recursive: true }))
const ids = Array.from({ length: 48 }, (_, i) => (7 + 31 * i) % 280)

/** Runs a script in the folder of llama.cpp on a file, and returns its output. */
async function ask<T>(script: string, path: string, question: unknown): Promise<T> {
  const args = [join(peer, script), path, JSON.stringify(question)]
  const { stdout } = await promisify(execFile)(process.execPath, args, { maxBuffer: 2 ** 28 })
  return JSON.parse(stdout)
}

// Reason to skip: llama.cpp is not installed here.
describe.skipIf(!existsSync(join(peer, 'node_modules/node-llama-cpp')))('llama.cpp', () => {
  /** The root mean square difference between the logits of llama.cpp and ours, relative to that of the logits. */
  async function difference(config: DeepSeekConfigInput, type: GgufEncoding): Promise<number> {
    const model = modelOf(config)
    const path = join(folder, 'model.gguf')
    await exportGguf(model, path, { type, tokenizer: tokenizerWith('deepseek-v3') })
    using ours = model.infer(() => model.forward(tensor(Int32Array.from(ids), [1, ids.length])))
    const values = (await ours.values()) as Float32Array
    model.dispose()
    const expected = await ask<number[][]>('logits.mjs', path, ids)
    expect(expected).toHaveLength(ids.length)
    const square = (sum: number, x: number) => sum + x * x
    const error = expected.flat().map((x, i) => x - values[i])
    return Math.sqrt(error.reduce(square, 0) / values.reduce(square, 0))
  }

  test.each(Object.entries(cases))('computes the same logits: %s', async (_, config) => {
    expect(await difference(config, 'f32')).toBeLessThan(2e-6)
  })

  // Without experts, because a changed choice of experts would change logits beyond the precision.
  test.each<[GgufEncoding, number]>([
    ['f16', 3e-3],
    ['bf16', 2e-2],
    ['q8_0', 6e-2],
    ['q4_0', 0.6],
  ])('computes nearly the same logits from %s', async (type, bound) => {
    const config = { ...cases['V3 without experts'], v_head_dim: 32, initializer_range: 0.08 }
    expect(await difference(config, type)).toBeLessThan(bound)
  })

  test.each<PreTokenizerName>(['deepseek-v3', 'deepseek-llm', 'gpt2', 'cl100k', 'o200k', 'qwen2'])(
    'tokenizes texts to the same ids: %s',
    async name => {
      const tokenizer = tokenizerWith(name)
      const model = modelOf(cases.llama)
      const path = join(folder, `${name}.gguf`)
      await exportGguf(model, path, { type: 'f32', tokenizer })
      model.dispose()
      const texts = [
        'The people of our nature<|end|>, 12345 times; 3.14!',
        "  It's  the\n\n  better   angels'\tof...",
        'Größe, naïve déjà-vu, Привет мир, 我们在这里 123 天, こんにちは🐳👩‍🚀',
      ]
      const answers = await ask<Array<{ ids: number[]; decoded: string }>>('tokenize.mjs', path, texts)
      expect(answers).toEqual(texts.map(text => ({ ids: [...tokenizer.encode(text)], decoded: text })))
    },
  )
})
