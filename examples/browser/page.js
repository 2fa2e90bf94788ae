/** @file A model in a page: opened by its address, it continues a text. */
import { setDefaultBackend } from '@moe/core'
import { DeepSeek } from '@moe/deepseek'
import { BpeTokenizer } from '@moe/tokenizer-bpe'
import { pickBackend } from './backend.js'

const [form, prompt, button, text, status] = ['form', 'prompt', 'button', 'text', 'status'].map(id =>
  document.getElementById(id),
)

const folder = new URL('model/', document.baseURI)
const { backend, tokenizer, model } = await open().catch(error => {
  tell(error.message)
  throw error
})
tell(`ready on ${backend.device}`)
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
      tell(
        `${((1000 * generation.stats.tokens) / (performance.now() - started)).toFixed(1)} tokens/s on ${backend.device}`,
      )
    }
  } catch (error) {
    if (error.code !== 'E_ABORTED') tell(error.message)
  }
  stop = null
  button.textContent = 'Write on'
})

function tell(what) {
  status.textContent = what
}

async function open() {
  const backend = await pickBackend()
  setDefaultBackend(backend)
  const tokenizerFile = await fetch(new URL('tokenizer.json', folder))
  if (!tokenizerFile.ok)
    throw new Error(`there is no model here (tokenizer.json: ${tokenizerFile.status}); npm start makes one`)
  const tokenizer = await BpeTokenizer.fromJSONAsync(await tokenizerFile.text())
  const model = await DeepSeek.fromPretrained(folder, {
    onProgress: ({ bytes, totalBytes }) => tell(`${(bytes / 1e6).toFixed(1)} of ${(totalBytes / 1e6).toFixed(1)} MB`),
  })
  return { backend, tokenizer, model }
}
