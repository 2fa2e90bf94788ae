/** @file Test servers: one with a model that runs in milliseconds, and one with scripted texts. */
import { setDefaultBackend } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { DeepSeek, type GenerationStats, presets, type TextTurnOptions, type TokenLogProb } from '@moe/deepseek'
import { trainBpe } from '@moe/tokenizer-bpe'
import { ChatTemplate } from '@moe/tokenizer-bpe/data'
import { createServer, type RequestRecord, type ServerOptions, type TextEngine } from './index.ts'

export const tokenizer = trainBpe(['the better angels of our nature, the people: 🙂 für alle'], {
  vocabSize: 290,
  specialTokens: ['<|end|>', '<|begin|>', '<|user|>', '<|assistant|>'],
  minFrequency: 1,
})

/** The token of each byte. */
const byteTokens = Array.from({ length: tokenizer.vocabSize }, (_, id) => tokenizer.tokenBytes(id)).reduce(
  (found, bytes, id) => (bytes.length === 1 && !found.has(bytes[0]) ? found.set(bytes[0], id) : found),
  new Map<number, number>(),
)
export const bytewise = (text: string) =>
  Array.from(new TextEncoder().encode(text), byte => byteTokens.get(byte) as number)

export const chatTemplate = await ChatTemplate.from({
  chat_template:
    "<|begin|>{% for m in messages %}{% if m.content == 'forbidden' %}{{ raise_exception('no such words') }}{% endif %}<|user|>{{ m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
})

export const config = {
  ...presets.tiny,
  vocab_size: tokenizer.vocabSize,
  hidden_size: 24,
  intermediate_size: 32,
  moe_intermediate_size: 8,
  num_hidden_layers: 2,
  num_attention_heads: 2,
  n_routed_experts: 8,
  num_experts_per_tok: 2,
  q_lora_rank: 12,
  kv_lora_rank: 8,
  qk_nope_head_dim: 8,
  qk_rope_head_dim: 4,
  v_head_dim: 8,
  initializer_range: 0.3,
  max_position_embeddings: 64,
  bos_token_id: tokenizer.tokenToId('<|begin|>'),
  eos_token_id: tokenizer.tokenToId('<|end|>'),
}

/** A server with a random model, on its own backend. */
export function modelServer(
  options: Partial<ServerOptions> = {},
  { context = 64, seed = 3, speculative = false } = {},
) {
  const backend = referenceBackend()
  setDefaultBackend(backend)
  const model = new DeepSeek({ ...config, max_position_embeddings: context }, { seed })
  const engine = model.continuousBatch({ maxTexts: 3, speculative })
  const records: RequestRecord[] = []
  const app = createServer({
    model,
    engine,
    tokenizer,
    chatTemplate,
    name: 'tiny',
    onRequest: record => records.push(record),
    ...options,
  })
  const dispose = () => {
    engine.dispose()
    model.dispose()
    return backend.stats().handles
  }
  return { app, model, engine, records, dispose }
}

/** The arguments of a call of the engine. */
export interface EngineCall {
  readonly ids: number[]
  readonly options: TextTurnOptions
}

/** An engine whose texts come from a function, which receives the arguments and may fill in statistics and log-probabilities. */
export function scriptedEngine(
  script: (call: EngineCall, stats: GenerationStats, logProbs: TokenLogProb[]) => AsyncIterable<string>,
): TextEngine & { readonly calls: EngineCall[] } {
  const calls: EngineCall[] = []
  return {
    calls,
    running: 0,
    waiting: 0,
    generate(ids, options) {
      const stats: GenerationStats = {
        cachedTokens: 0,
        tokens: 0,
        steps: 0,
        drafted: [],
        accepted: [],
        finishReason: null,
        tokensPerStep: 0,
      }
      calls.push({ ids: Array.from(ids), options })
      const logProbs: TokenLogProb[] = []
      const iterator = script(calls[calls.length - 1], stats, logProbs)[Symbol.asyncIterator]()
      return { stats, logProbs, promptLogProbs: [], [Symbol.asyncIterator]: () => iterator }
    },
  }
}

/** A server without a model. */
export function scriptedServer(
  script: Parameters<typeof scriptedEngine>[0],
  options: Partial<ServerOptions> = {},
  context = 64,
) {
  const engine = scriptedEngine(script)
  const records: RequestRecord[] = []
  const model = { config: { ...config, max_position_embeddings: context } } as unknown as ServerOptions['model']
  const onRequest = (record: RequestRecord) => records.push(record)
  const app = createServer({ model, engine, tokenizer, chatTemplate, name: 'tiny', onRequest, ...options })
  return { app, engine, records }
}

export const post = (body: unknown, init: RequestInit = {}): RequestInit => ({
  method: 'POST',
  body: typeof body === 'string' || body instanceof Uint8Array ? (body as string) : JSON.stringify(body),
  ...init,
  headers: { 'content-type': 'application/json', ...init.headers },
})

/** The events of a stream: parsed objects, and `[DONE]`. */
export async function events(response: Response): Promise<unknown[]> {
  const text = await response.text()
  return text
    .split('\n\n')
    .filter(event => event !== '')
    .map(event => {
      const data = event.replace(/^data: /, '')
      return data === '[DONE]' ? data : JSON.parse(data)
    })
}
