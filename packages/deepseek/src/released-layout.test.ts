/** @file Checkpoints with the layout of released ones: names, dtypes, shards, the MTP layer after the last, and its copies of shared weights. */
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type TensorEntry, writeSafetensors } from '@moe/checkpoint'
import {
  defaultBackend,
  namedParameters,
  QuantizedParameter,
  Random,
  scope,
  setDefaultBackend,
  stateDict,
  tensor,
} from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { afterAll, describe, expect, test } from 'vitest'
import { exportGguf } from './gguf/export-gguf.ts'
import { DeepSeek, loadWeights } from './index.ts'

setDefaultBackend(referenceBackend())
const root = await mkdtemp(join(tmpdir(), 'moe-released-'))
afterAll(() => rm(root, { recursive: true }))

/** The keys of DeepSeek-V3's config.json, with small numbers. */
const config = {
  architectures: ['DeepseekV3ForCausalLM'],
  attention_bias: false,
  attention_dropout: 0.0,
  auto_map: { AutoConfig: 'configuration_deepseek.DeepseekV3Config', AutoModel: 'modeling_deepseek.DeepseekV3Model' },
  aux_loss_alpha: 0.001,
  bos_token_id: 0,
  eos_token_id: 1,
  ep_size: 1,
  first_k_dense_replace: 1,
  hidden_act: 'silu',
  hidden_size: 40,
  initializer_range: 0.02,
  intermediate_size: 72,
  kv_lora_rank: 24,
  max_position_embeddings: 163840,
  model_type: 'deepseek_v3',
  moe_intermediate_size: 20,
  moe_layer_freq: 1,
  n_group: 2,
  n_routed_experts: 4,
  n_shared_experts: 1,
  norm_topk_prob: true,
  num_attention_heads: 2,
  num_experts_per_tok: 2,
  num_hidden_layers: 2,
  num_key_value_heads: 2,
  num_nextn_predict_layers: 1,
  pretraining_tp: 1,
  q_lora_rank: 28,
  qk_nope_head_dim: 16,
  qk_rope_head_dim: 8,
  rms_norm_eps: 1e-6,
  rope_scaling: {
    beta_fast: 32,
    beta_slow: 1,
    factor: 40,
    mscale: 1.0,
    mscale_all_dim: 1.0,
    original_max_position_embeddings: 4096,
    type: 'yarn',
  },
  rope_theta: 10000,
  routed_scaling_factor: 2.5,
  scoring_func: 'sigmoid',
  seq_aux: true,
  tie_word_embeddings: false,
  topk_group: 1,
  topk_method: 'noaux_tc',
  torch_dtype: 'bfloat16',
  transformers_version: '4.33.1',
  use_cache: true,
  v_head_dim: 16,
  vocab_size: 50,
}

/** The scales of the released V3 (f32), and of V3.1 (powers of two, in f32 or as exponents). */
type Scales = 'f32' | 'powers of two' | 'f8e8m0'

const e4m3 = (code: number): number => {
  const [exponent, mantissa] = [(code >> 3) & 15, code & 7]
  const size = exponent === 0 ? mantissa * 2 ** -9 : (1 + mantissa / 8) * 2 ** (exponent - 7)
  return code & 128 ? -size : size
}

/** Writes a checkpoint. Returns its folder and the dequantized tensors, computed in f64. */
async function release(name: string, options: { block?: [number, number]; scales?: Scales; quantization?: unknown }) {
  const { block, scales = 'f32', quantization } = options
  const random = new Random(7)
  const entries: TensorEntry[] = []
  const expected = new Map<string, Float64Array>()
  const bf16 = (key: string, shape: number[]) => {
    const size = shape.reduce((a, b) => a * b, 1)
    const data = Uint16Array.from({ length: size }, () => 0x3c00 + random.integer(0x300) + 0x8000 * random.integer(2))
    const value = (bits: number) => new Float32Array(Uint32Array.of(bits << 16).buffer)[0]
    expected.set(key, Float64Array.from(data, value))
    entries.push({ name: key, dtype: 'bf16', shape, data })
  }
  const linear = (key: string, [rows, columns]: [number, number]) => {
    if (block === undefined) return bf16(key, [rows, columns])
    const data = Uint8Array.from({ length: rows * columns }, () => random.integer(127) + 128 * random.integer(2))
    const across = Math.ceil(columns / block[1])
    const shape = [Math.ceil(rows / block[0]), across]
    const exponents = Uint8Array.from({ length: shape[0] * across }, () => 115 + random.integer(8))
    const factors = Float32Array.from(exponents, x => 2 ** (x - 127) * (scales === 'f32' ? 1 + random.next() : 1))
    expected.set(
      key,
      Float64Array.from(data, (code, i) => {
        const [row, column] = [Math.floor(i / columns), i % columns]
        return e4m3(code) * factors[Math.floor(row / block[0]) * across + Math.floor(column / block[1])]
      }),
    )
    entries.push({ name: key, dtype: 'f8e4m3', shape: [rows, columns], data })
    const scale = `${key}_scale_inv`
    if (scales === 'f8e8m0') entries.push({ name: scale, dtype: 'f8e8m0', shape, data: exponents })
    else entries.push({ name: scale, dtype: 'f32', shape, data: factors })
  }

  const { hidden_size: hidden, vocab_size: vocabulary, num_attention_heads: heads, num_hidden_layers: layers } = config
  const { kv_lora_rank: kv, q_lora_rank: q, qk_nope_head_dim: nope, qk_rope_head_dim: rope, v_head_dim: v } = config
  const mlp = (prefix: string, inner: number) => {
    for (const part of ['gate_proj', 'up_proj']) linear(`${prefix}.${part}.weight`, [inner, hidden])
    linear(`${prefix}.down_proj.weight`, [hidden, inner])
  }
  bf16('model.embed_tokens.weight', [vocabulary, hidden])
  for (let layer = 0; layer <= layers; layer++) {
    const at = `model.layers.${layer}`
    if (layer === layers) {
      for (const norm of ['enorm', 'hnorm', 'shared_head.norm']) bf16(`${at}.${norm}.weight`, [hidden])
      bf16(`${at}.eh_proj.weight`, [hidden, 2 * hidden])
      bf16(`${at}.embed_tokens.weight`, [vocabulary, hidden])
      bf16(`${at}.shared_head.head.weight`, [vocabulary, hidden])
    }
    bf16(`${at}.input_layernorm.weight`, [hidden])
    bf16(`${at}.post_attention_layernorm.weight`, [hidden])
    linear(`${at}.self_attn.q_a_proj.weight`, [q, hidden])
    bf16(`${at}.self_attn.q_a_layernorm.weight`, [q])
    linear(`${at}.self_attn.q_b_proj.weight`, [heads * (nope + rope), q])
    linear(`${at}.self_attn.kv_a_proj_with_mqa.weight`, [kv + rope, hidden])
    bf16(`${at}.self_attn.kv_a_layernorm.weight`, [kv])
    linear(`${at}.self_attn.kv_b_proj.weight`, [heads * (nope + v), kv])
    linear(`${at}.self_attn.o_proj.weight`, [hidden, heads * v])
    if (layer < config.first_k_dense_replace) mlp(`${at}.mlp`, config.intermediate_size)
    else {
      bf16(`${at}.mlp.gate.weight`, [config.n_routed_experts, hidden])
      const bias = Float32Array.from({ length: config.n_routed_experts }, () => random.next())
      expected.set(`${at}.mlp.gate.e_score_correction_bias`, Float64Array.from(bias))
      entries.push({
        name: `${at}.mlp.gate.e_score_correction_bias`,
        dtype: 'f32',
        shape: [config.n_routed_experts],
        data: bias,
      })
      for (let e = 0; e < config.n_routed_experts; e++) mlp(`${at}.mlp.experts.${e}`, config.moe_intermediate_size)
      mlp(`${at}.mlp.shared_experts`, config.moe_intermediate_size)
    }
  }
  bf16('model.norm.weight', [hidden])
  bf16('lm_head.weight', [vocabulary, hidden])

  const folder = join(root, name)
  await mkdir(folder)
  const weightMap: Record<string, string> = {}
  const shards = 4
  for (let i = 0; i < shards; i++) {
    // Scales may be in another shard than their weight.
    const part = entries.filter((_, j) => Math.floor((j * shards) / entries.length) === i)
    const file = `model-0000${i + 1}-of-00000${shards}.safetensors`
    await writeSafetensors(join(folder, file), part, { metadata: { format: 'pt' } })
    for (const { name } of part) weightMap[name] = file
  }
  const index = { metadata: { total_size: 0 }, weight_map: weightMap }
  await writeFile(join(folder, 'model.safetensors.index.json'), JSON.stringify(index))
  const quantized =
    quantization ??
    (block && {
      activation_scheme: 'dynamic',
      fmt: 'e4m3',
      quant_method: 'fp8',
      ...(scales === 'f32' ? {} : { scale_fmt: 'ue8m0' }),
      weight_block_size: block,
    })
  await writeFile(
    join(folder, 'config.json'),
    JSON.stringify({ ...config, ...(quantized ? { quantization_config: quantized } : {}) }),
  )
  return { folder, expected }
}

const copies = /^model\.layers\.2\.(embed_tokens|shared_head\.head)\./

async function expectWeights(model: DeepSeek, expected: ReadonlyMap<string, Float64Array>) {
  const entries = stateDict(model)
  expect(entries.map(({ name }) => name).sort()).toEqual([...expected.keys()].filter(key => !copies.test(key)).sort())
  for (const { name, data } of entries) {
    expect({ name, data: await data() }).toEqual({ name, data: Float32Array.from(expected.get(name) as Float64Array) })
  }
}

describe('a released checkpoint', () => {
  test.each<[string, { block?: [number, number]; scales?: Scales }]>([
    ['bf16', {}],
    ['V3', { block: [128, 128] }],
    ['V3.1', { block: [128, 128], scales: 'powers of two' }],
    ['exponents only', { block: [16, 16], scales: 'f8e8m0' }],
    ['incomplete blocks', { block: [24, 32] }],
    ['one scale per row', { block: [1, 128] }],
    ['one scale per element', { block: [1, 1], scales: 'powers of two' }],
  ])('is dequantized correctly: %s', async (name, options) => {
    const { folder, expected } = await release(name, options)
    const model = await DeepSeek.fromPretrained(folder)
    await expectWeights(model, expected)
    const logits = scope(() => model.forward(tensor(Int32Array.of(3, 4, 5), [1, 3])))
    expect((await logits.values()).every(Number.isFinite)).toBe(true)

    const filled = new DeepSeek(model.config, { seed: 1 })
    await loadWeights(filled, folder)
    await expectWeights(filled, expected)

    const stored = await DeepSeek.fromPretrained(folder, { weights: 'fp8' })
    expect(stored.lm_head.weight.dtype).toBe('f8e4m3')
    // Blocks of 128 x 128 are loaded as they are. Others are rounded again, like matrices in bf16.
    const isExact = options.block?.every(size => size === 128) ?? false
    const differs: boolean[] = []
    for (const { name, parameter, slices = [name] } of namedParameters(stored)) {
      if (!(parameter instanceof QuantizedParameter) || /embed_tokens|lm_head|eh_proj/.test(name)) continue
      const values = await parameter.dequantize().values()
      const own = slices.flatMap(slice => Array.from(expected.get(slice) as Float64Array))
      differs.push(!own.every((value, i) => values[i] === Math.fround(value)))
    }
    expect(differs.length).toBeGreaterThan(20)
    expect(differs.includes(true)).toBe(!isExact)
    const { tensors } = await exportGguf(folder, join(root, `${name}.gguf`), { type: 'f32', tokenizer: 'none' })
    expect(tensors).toBeGreaterThan(namedParameters(model).length / 2)
    for (const each of [model, filled, stored]) each.dispose()
  })

  test('opens without its MTP layer if the configuration has none, as in transformers', async () => {
    const { folder, expected } = await release('main', { block: [128, 128] })
    await writeFile(join(folder, 'config.json'), JSON.stringify({ ...config, num_nextn_predict_layers: 0 }))
    const model = await DeepSeek.fromPretrained(folder)
    await expectWeights(model, new Map([...expected].filter(([key]) => !key.startsWith('model.layers.2.'))))
    model.dispose()
  })

  test.each([
    ['awq', { quant_method: 'awq', bits: 4 }, /config\.json: unsupported quantization: quant_method "awq"/],
    ['blocks without rows', { quant_method: 'fp8', weight_block_size: [0, 128] }, /weight_block_size \[0,128\]/],
    ['blocks with one size', { quant_method: 'fp8', weight_block_size: [128] }, /weight_block_size \[128\]/],
  ])('is rejected with %s: %j', async (name, quantization, message) => {
    const { folder } = await release(name, { block: [128, 128], quantization })
    await expect(DeepSeek.fromPretrained(folder)).rejects.toThrow(
      expect.objectContaining({ code: 'E_UNSUPPORTED', message: expect.stringMatching(message) }),
    )
  })

  test('is rejected with blocks of another size than in config.json, without leaks', async () => {
    const { handles } = defaultBackend().stats()
    const quantization = { quant_method: 'fp8', weight_block_size: [64, 64] }
    const { folder } = await release('wrong', { block: [16, 16], quantization })
    for (const weights of [undefined, 'fp8'] as const) {
      await expect(DeepSeek.fromPretrained(folder, { weights })).rejects.toThrow(
        /in blocks of 64 x 64 needs scales .* got/,
      )
    }
    expect(defaultBackend().stats().handles).toBe(handles)
  })
})
