/** @file Opens a model by its URL and continues a text. */
import { setDefaultBackend } from '@moe/core'
import { DeepSeek } from '@moe/deepseek'
import { BpeTokenizer } from '@moe/tokenizer-bpe'
import { pickBackend } from './backend.js'

const [form, prompt, button, text, status] = ['form', 'prompt', 'button', 'text', 'status'].map(id =>
  document.getElementById(id),
)

const folder = new URL('model/', document.baseURI)
const { backend, tokenizer, model } = await open().catch(error => {
  show(error.message)
  throw error
})
show(`ready (${backend.device})`)
button.disabled = false

let stop = null
form.addEventListener('submit', async event => {
  event.preventDefault()
  if (stop) return stop.abort()
  stop = new AbortController()
  button.textContent = 'Stop'
  text.textContent = prompt.value
  const started = performance.now()
  const options = {
    tokenizer,
    maxTokens: 200,
    temperature: 0.6,
    topP: 0.95,
    seed: Date.now() % 2 ** 31,
    signal: stop.signal,
  }
  try {
    const generation = model.generate(tokenizer.encode(prompt.value), options)
    for await (const piece of generation) {
      text.textContent += piece
      show(
        `${((1000 * generation.stats.tokens) / (performance.now() - started)).toFixed(1)} tokens/s (${backend.device})`,
      )
    }
  } catch (error) {
    if (error.code !== 'E_ABORTED') show(error.message)
  }
  stop = null
  button.textContent = 'Continue'
})

function show(message) {
  status.textContent = message
}

async function open() {
  const backend = await pickBackend()
  setDefaultBackend(backend)
  const tokenizerFile = await fetch(new URL('tokenizer.json', folder))
  if (!tokenizerFile.ok)
    throw new Error(
      `no model with a tokenizer.json found (HTTP ${tokenizerFile.status}); run npm start to train one, or pass tokenizer to train`,
    )
  const tokenizer = await BpeTokenizer.fromJSONAsync(await tokenizerFile.text())
  const model = await DeepSeek.fromPretrained(folder, {
    onProgress: ({ bytes, totalBytes }) => show(`${(bytes / 1e6).toFixed(1)} of ${(totalBytes / 1e6).toFixed(1)} MB`),
  })
  return { backend, tokenizer, model }
}
