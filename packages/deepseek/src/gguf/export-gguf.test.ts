import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { openCheckpoint, readF32, readGguf } from '@moe/checkpoint'
import { isMoeError, setDefaultBackend } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { afterAll, describe, expect, test } from 'vitest'
import { type DeepSeekConfigInput, parseConfig, presets } from '../index.ts'
import { architectureOf } from './architecture.ts'
import { exportGguf } from './export-gguf.ts'
import { cases } from './test-cases.ts'
import { modelOf, tokenizerWith } from './test-model.ts'

setDefaultBackend(referenceBackend())

const folder = await mkdtemp(join(tmpdir(), 'moe-export-'))
afterAll(() => rm(folder, { recursive: true }))
const tokenizer = tokenizerWith('deepseek-v3')

/** The metadata of an architecture as plain values, without its prefix. */
const keysOf = (config: DeepSeekConfigInput) =>
  Object.fromEntries(
    Object.entries(architectureOf(parseConfig(config)).metadata).map(([key, { value }]) => [
      key.replace(/^\w+\./, ''),
      value,
    ]),
  )

describe('metadata', () => {
  test('of DeepSeek-V3', () => {
    const { name, notes } = architectureOf(parseConfig(presets['deepseek-v3']))
    expect(name).toBe('deepseek2')
    expect(notes).toEqual(['the MTP modules are not exported'])
    expect(keysOf(presets['deepseek-v3'])).toEqual({
      block_count: 61,
      context_length: 163840,
      embedding_length: 7168,
      feed_forward_length: 18432,
      vocab_size: 129280,
      'attention.head_count': 128,
      'attention.head_count_kv': 1,
      'attention.layer_norm_rms_epsilon': 1e-6,
      'attention.key_length': 576,
      'attention.value_length': 512,
      'attention.key_length_mla': 192,
      'attention.value_length_mla': 128,
      'attention.kv_lora_rank': 512,
      'attention.q_lora_rank': 1536,
      leading_dense_block_count: 3,
      expert_count: 256,
      expert_used_count: 8,
      expert_shared_count: 1,
      expert_feed_forward_length: 2048,
      expert_weights_scale: 2.5,
      expert_weights_norm: true,
      expert_gating_func: 2,
      expert_group_count: 8,
      expert_group_used_count: 4,
      'rope.dimension_count': 64,
      'rope.freq_base': 10000,
      'rope.scaling.type': 'yarn',
      'rope.scaling.factor': 40,
      'rope.scaling.original_context_length': 4096,
      'rope.scaling.yarn_beta_fast': 32,
      'rope.scaling.yarn_beta_slow': 1,
      'rope.scaling.yarn_log_multiplier': expect.closeTo(0.1, 12),
    })
  })

  test.each([
    ['no temperatures', {}, 0.1 * Math.log(40) + 1, 1],
    ['two temperatures', { mscale: 1, mscale_all_dim: 0.5 }, 1.3688879 / 1.184444, 1.184444],
  ])('of YaRN with %s gives the amplitude and the scale of scores', (_, scales, amplitude, scale) => {
    const scaling = { type: 'yarn', factor: 40, original_max_position_embeddings: 4096 } as const
    const keys = keysOf({ ...presets['deepseek-v3'], rope_scaling: { ...scaling, ...scales } })
    expect(keys['rope.scaling.attn_factor']).toBeCloseTo(amplitude, 5)
    const multiplier = Number(keys['rope.scaling.yarn_log_multiplier'])
    expect(amplitude * (1 + multiplier * Math.log(40))).toBeCloseTo(scale, 5)
  })

  test('of V2-Lite has softmax scores, but no query rank and groups', () => {
    const keys = keysOf(presets['deepseek-v2-lite'])
    expect(keys).toMatchObject({ expert_gating_func: 1, expert_weights_norm: false, expert_shared_count: 2 })
    expect(keys['rope.scaling.yarn_log_multiplier']).toBeCloseTo(0.0707, 12)
    for (const key of ['attention.q_lora_rank', 'expert_group_count', 'rope.scaling.attn_factor']) {
      expect(keys).not.toHaveProperty([key])
    }
  })

  test('of GLM-4.7-Flash equals that of its published files', () => {
    const { name, notes } = architectureOf(parseConfig(presets['glm-4.7-flash']))
    expect(name).toBe('deepseek2')
    expect(notes.join()).toMatch(/rms_norm_eps = 0.00001 instead of 1e-6,the MTP modules/)
    expect(keysOf(presets['glm-4.7-flash'])).toMatchObject({
      block_count: 47,
      context_length: 202752,
      'attention.head_count': 20,
      'attention.head_count_kv': 1,
      'attention.key_length': 576,
      'attention.value_length': 512,
      'attention.key_length_mla': 256,
      'attention.value_length_mla': 256,
      'attention.kv_lora_rank': 512,
      'attention.q_lora_rank': 768,
      leading_dense_block_count: 1,
      expert_count: 64,
      expert_used_count: 4,
      expert_shared_count: 1,
      expert_feed_forward_length: 1536,
      expert_weights_scale: 1.8,
      expert_weights_norm: true,
      expert_gating_func: 2,
      'rope.dimension_count': 64,
      'rope.freq_base': 1e6,
    })
  })

  test('of Youtu-LLM-2B has only dense layers', () => {
    const keys = keysOf(presets['youtu-llm-2b'])
    expect(keys).toMatchObject({
      leading_dense_block_count: 32,
      expert_feed_forward_length: 6144,
      expert_shared_count: 0,
    })
    expect(keys).not.toHaveProperty('expert_count')
  })

  test('of DeepSeek LLM 67B', () => {
    expect(architectureOf(parseConfig(presets['deepseek-llm-67b'])).name).toBe('llama')
    expect(keysOf(presets['deepseek-llm-67b'])).toEqual({
      block_count: 95,
      context_length: 4096,
      embedding_length: 8192,
      feed_forward_length: 22016,
      vocab_size: 102400,
      'attention.head_count': 64,
      'attention.head_count_kv': 8,
      'attention.key_length': 128,
      'attention.value_length': 128,
      'attention.layer_norm_rms_epsilon': 1e-6,
      'rope.dimension_count': 128,
      'rope.freq_base': 10000,
    })
  })

  test('has notes on differences of llama.cpp', () => {
    const notes = (config: DeepSeekConfigInput) => architectureOf(parseConfig(config)).notes.join('\n')
    expect(notes(presets['deepseek-v2'])).toMatch(/by its best two, V2 by its best one/)
    expect(notes(presets['moonlight-16b-a3b'])).toMatch(/rms_norm_eps = 0.00001 instead of 1e-6/)
    expect(notes(presets['deepseek-v2-lite'])).toBe('')
  })

  test.each<[DeepSeekConfigInput, RegExp]>([
    [{ ...cases.v3, num_hidden_layers: 27 }, /llama.cpp loads models of 27 layers as V2-Lite/],
    [{ ...cases.v3, n_group: 16, topk_group: 8 }, /scores a group by two experts/],
    [{ ...cases.v3, rope_scaling: { type: 'yarn', factor: 0.5 } }, /factor above 1/],
  ])('rejects models that llama.cpp cannot load (%#)', (config, message) => {
    expect(() => architectureOf(parseConfig(config))).toThrow(message)
  })
})

describe('tensors', () => {
  test('exported from a folder equal those exported from memory', async () => {
    const model = modelOf(cases.v3)
    const saved = join(folder, 'saved')
    await model.save(saved)
    await tokenizer.save(join(saved, 'tokenizer.json'))
    const done: number[] = []
    const options = { type: 'q8_0', name: 'tiny' } as const
    const fromFolder = await exportGguf(saved, join(folder, 'a.gguf'), {
      ...options,
      onProgress: p => done.push(p.bytes),
    })
    const fromMemory = await exportGguf(model, join(folder, 'b.gguf'), { ...options, tokenizer })
    model.dispose()
    expect(fromFolder).toEqual({ ...fromMemory, path: join(folder, 'a.gguf') })
    const [a, b] = await Promise.all([readFile(join(folder, 'a.gguf')), readFile(join(folder, 'b.gguf'))])
    expect(Buffer.compare(a, b)).toBe(0)
    expect(a.length).toBe(fromFolder.bytes)
    expect(done.length).toBeGreaterThan(fromFolder.tensors)
    expect(done).toEqual(done.toSorted((x, y) => x - y))
  })

  test('have the layout that llama.cpp reads', async () => {
    const model = modelOf(cases.v3)
    const saved = join(folder, 'layout')
    await model.save(saved)
    model.dispose()
    const path = join(folder, 'layout.gguf')
    await exportGguf(saved, path, { type: 'f32', tokenizer })
    await using checkpoint = await openCheckpoint(saved)
    await using file = await readGguf(path)
    const ours = async (key: string) => (await readF32(checkpoint, `model.layers.${key}.weight`)).data
    const shape = (name: string) => file.tensors.get(name)?.shape

    const kv = await ours('1.self_attn.kv_b_proj')
    const [keys, values] = [await file.readF32('blk.1.attn_k_b.weight'), await file.readF32('blk.1.attn_v_b.weight')]
    expect(shape('blk.1.attn_k_b.weight')).toEqual([4, 32, 32])
    expect(shape('blk.1.attn_v_b.weight')).toEqual([4, 24, 32])
    for (const [head, row, latent] of [
      [0, 0, 0],
      [1, 5, 9],
      [3, 23, 31],
    ]) {
      const from = head * (32 + 24)
      expect(keys[(head * 32 + latent) * 32 + row]).toBe(kv[(from + row) * 32 + latent])
      expect(values[(head * 24 + row) * 32 + latent]).toBe(kv[(from + 32 + row) * 32 + latent])
    }

    const experts = await file.readF32('blk.2.ffn_down_exps.weight')
    expect(shape('blk.2.ffn_down_exps.weight')).toEqual([16, 96, 32])
    expect(experts.slice(5 * 96 * 32, 6 * 96 * 32)).toEqual(await ours('2.mlp.experts.5.down_proj'))
    expect(await file.readF32('blk.0.ffn_up.weight')).toEqual(await ours('0.mlp.up_proj'))
    expect(await file.readF32('blk.1.ffn_up_shexp.weight')).toEqual(await ours('1.mlp.shared_experts.up_proj'))
    expect(await file.readF32('blk.1.ffn_gate_inp.weight')).toEqual(await ours('1.mlp.gate'))
    expect((await file.readF32('blk.1.exp_probs_b.bias'))[1]).toBeCloseTo(Math.sin(7) / 50, 7)
    expect(shape('output.weight')).toEqual([320, 96])
    expect([...file.tensors.keys()].some(name => name.startsWith('blk.3'))).toBe(false)
  })

  test('with RoPE on halves are reordered into pairs', async () => {
    const llama = modelOf(cases.llama)
    const path = join(folder, 'halves.gguf')
    await exportGguf(llama, path, { type: 'f32', tokenizer })
    await using file = await readGguf(path)
    const exported = await file.readF32('blk.0.attn_k.weight')
    const ours = await (
      llama.decoder[0].self_attn as unknown as { k_proj: { weight: { data(): Promise<Float32Array> } } }
    ).k_proj.weight.data()
    const row = (values: Float32Array, index: number) => values.slice(index * 96, (index + 1) * 96)
    for (const [pair, side] of [
      [0, 0],
      [0, 1],
      [7, 1],
    ]) {
      expect(row(exported, 32 + 2 * pair + side)).toEqual(row(ours, 32 + 16 * side + pair))
    }
    llama.dispose()
  })

  test('have the requested type if their rows are complete blocks, except norms and gates, which stay f32', async () => {
    const model = modelOf({ ...cases.v3, tie_word_embeddings: true, n_shared_experts: 0 })
    const path = join(folder, 'types.gguf')
    await exportGguf(model, path, { type: 'q4_0', tokenizer })
    model.dispose()
    await using file = await readGguf(path)
    const type = (name: string) => file.tensors.get(name)?.type
    expect(type('blk.1.attn_q_b.weight')).toBe('q4_0')
    expect(type('blk.1.attn_norm.weight')).toBe('f32')
    expect(type('blk.1.ffn_gate_inp.weight')).toBe('f32')
    expect(type('output.weight')).toBe(undefined)
    expect(file.metadata.get('general.file_type')?.value).toBe(2)
    // llama.cpp requires a shared expert, so one of zeros is added.
    expect(file.metadata.get('deepseek2.expert_shared_count')?.value).toBe(1)
    expect((await file.readF32('blk.1.ffn_up_shexp.weight')).every(x => x === 0)).toBe(true)
    const odd = modelOf({ ...cases.v3, moe_intermediate_size: 40 })
    const oddPath = join(folder, 'odd.gguf')
    await exportGguf(odd, oddPath, { type: 'q8_0', tokenizer })
    odd.dispose()
    await using other = await readGguf(oddPath)
    expect(other.tensors.get('blk.1.ffn_down_exps.weight')?.type).toBe('f16')
    expect(other.tensors.get('blk.1.ffn_up_exps.weight')?.type).toBe('q8_0')
  })

  test('an unknown type is rejected before the model is read', async () => {
    await expect(exportGguf('nowhere', 'nowhere.gguf', { type: 'q5' as 'q8_0' })).rejects.toMatchObject({
      code: 'E_CONFIG',
      message: 'exportGguf: unknown type "q5"; pass one of f32, f16, q4_0, q8_0, bf16',
    })
  })

  test('that do not match the configuration are rejected by name', async () => {
    const model = modelOf(cases.v3)
    const saved = join(folder, 'wrong')
    await model.save(saved)
    model.dispose()
    const path = join(folder, 'wrong.gguf')
    const config = JSON.parse(await readFile(join(saved, 'config.json'), 'utf8'))
    await writeFile(join(saved, 'config.json'), JSON.stringify({ ...config, v_head_dim: 32 }))
    const failure = await exportGguf(saved, path, { tokenizer }).catch(error => error)
    expect(isMoeError(failure, 'E_CHECKPOINT')).toBe(true)
    expect(failure.message).toMatch(
      /"model.layers.0.self_attn.kv_b_proj.weight" has the shape \[224, 32\], expected \[256, 32\]/,
    )
    await writeFile(
      join(saved, 'config.json'),
      JSON.stringify({ ...config, num_hidden_layers: config.num_hidden_layers + 2 }),
    )
    await expect(exportGguf(saved, path, { tokenizer })).rejects.toThrow(
      /"model.layers.\d.input_layernorm.weight" is missing/,
    )
    await expect(exportGguf(saved, path)).rejects.toThrow(/has no tokenizer.json; pass \{ tokenizer \}/)
    // Sizes for which there is no memory.
    await writeFile(join(saved, 'config.json'), JSON.stringify({ ...config, vocab_size: 2 ** 40 }))
    await expect(exportGguf(saved, path, { tokenizer })).rejects.toThrow(/but the checkpoint has only \d+/)
  })
})
