/**
 * @file Trains a model in a worker, which keeps the page responsive, and generates text with it. The training text, the losses and the
 * checkpoints are saved in the origin's private file system, so a run can be resumed after the page was closed.
 */
import { setDefaultBackend } from '@moe/core'
import { DeepSeek, presets } from '@moe/deepseek'
import { BpeTokenizer, trainBpeAsync } from '@moe/tokenizer-bpe'
import { modelFolder, texts, train } from '@moe/trainer'
import { pickBackend } from './backend.js'

const begin = '<｜begin▁of▁sentence｜>'
const end = '<｜end▁of▁sentence｜>'

/** Latent attention with heads of size 16, one dense layer, then MoE layers with 8 experts, 2 per token. */
const shape = (width, layers) => ({
  ...presets.tiny,
  hidden_size: width,
  intermediate_size: 4 * width,
  moe_intermediate_size: width / 2,
  num_hidden_layers: layers,
  num_attention_heads: width / 16,
  q_lora_rank: width / 2,
  kv_lora_rank: width / 2,
  qk_nope_head_dim: 16,
  qk_rope_head_dim: 16,
  v_head_dim: 16,
  n_routed_experts: 8,
  num_experts_per_tok: 2,
  n_group: 1,
  topk_group: 1,
  num_nextn_predict_layers: 0,
})

const shapes = { small: shape(64, 3), medium: shape(96, 4), large: shape(128, 5) }

let storage
let tokenizer
let model
let stop = new AbortController()

const actions = {
  async open() {
    const backend = await pickBackend()
    setDefaultBackend(backend)
    storage = await openStorage()
    const kept = await read('run.json')
    post('open', { device: backend.device, models: Object.keys(shapes), kept })
    if (!kept?.step) return
    const folder = await modelFolder(storage)
    tokenizer = await BpeTokenizer.fromJSONAsync(
      await (await (await folder.getFileHandle('tokenizer.json')).getFile()).text(),
    )
    model = await DeepSeek.fromPretrained(folder)
    post('model')
  },

  async train({ text, size, steps, resume }) {
    stop = new AbortController()
    post('status', 'training a tokenizer')
    const data = texts([text], { validation: 0.02 })
    tokenizer = await trainBpeAsync(data.training, {
      vocabSize: 512,
      preTokenizer: 'deepseek-v3',
      specialTokens: [begin, end],
    })
    const config = { ...shapes[size], vocab_size: tokenizer.vocabSize, bos_token_id: 0, eos_token_id: 1 }
    model?.dispose()
    model = new DeepSeek(config, { seed: 1, objective: { biasSpeed: 0.01 } })
    const before = resume ? await read('run.json') : undefined
    const run = { text, size, steps, step: 0, losses: [], heldOut: [], loads: [], ...before }
    if (!resume) await write('run.json', run)
    let saved = Promise.resolve()
    const { validation, interrupted } = await train(model, {
      data,
      tokenizer,
      steps,
      batchSize: 8,
      sequenceLength: 64,
      optimizer: 'muon',
      lr: 1e-2,
      evalEvery: Math.ceil(steps / 8),
      evalTokens: 2048,
      loadsEvery: 5,
      out: storage,
      checkpointEvery: 50,
      keepCheckpoints: 1,
      resume,
      overwrite: !resume,
      progress: false,
      signal: stop.signal,
      onEvent(event) {
        if (event.type === 'start')
          for (const list of [run.losses, run.heldOut]) list.length = upTo(list, event.fromStep)
        if (event.type === 'step') run.losses.push([event.step, Number(event.nll.toPrecision(5))])
        if (event.type === 'loads') run.loads = event.layers
        if (event.type === 'evaluation') run.heldOut.push([event.step, Number(event.loss.toPrecision(5))])
        if (event.type === 'checkpoint') run.step = event.step
        if (event.type === 'checkpoint' || event.type === 'end') saved = saved.then(() => write('run.json', run))
        if (event.type !== 'fail') post('event', event)
      },
    })
    await saved
    post('trained', { interrupted, bitsPerByte: validation.bitsPerByte })
    post('model')
  },

  async write({ prompt }) {
    stop = new AbortController()
    const options = { tokenizer, maxTokens: 200, temperature: 0.6, topP: 0.95, seed: Date.now() % 2 ** 31 }
    const generation = model.generate(tokenizer.encode(prompt, { addSpecialTokens: false }), {
      ...options,
      signal: stop.signal,
    })
    for await (const piece of generation) post('piece', piece)
    post('written')
  },

  /** Sends the model's files, in the Hugging Face layout. */
  async files() {
    const folder = await storage.getDirectoryHandle('model', { create: true })
    await model.save(folder)
    await write('tokenizer.json', tokenizer, folder)
    const files = []
    for await (const name of folder.keys()) files.push(await (await folder.getFileHandle(name)).getFile())
    post('files', files)
  },

  stop() {
    stop.abort()
  },
}

const post = (what, value) => postMessage({ what, value })

const upTo = (points, step) => points.filter(point => point[0] <= step).length

/** @throws Error if the browser has no storage, as in some private windows */
async function openStorage() {
  const whole = await navigator.storage.getDirectory()
  return whole.getDirectoryHandle('trained-in-the-page', { create: true })
}

async function write(name, value, folder = storage) {
  const file = await (await folder.getFileHandle(name, { create: true })).createWritable()
  await file.write(JSON.stringify(value))
  await file.close()
}

async function read(name) {
  try {
    return JSON.parse(await (await (await storage.getFileHandle(name)).getFile()).text())
  } catch {
    return undefined
  }
}

addEventListener('message', async ({ data: { action, ...options } }) => {
  try {
    await actions[action](options)
  } catch (error) {
    post(error.code === 'E_ABORTED' ? 'written' : 'failed', error.message)
  }
})
post('started')
