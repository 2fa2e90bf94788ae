/** @file The page around train-worker.js: training text, controls, loss chart, expert loads, and generated text. */
import { drawLoads } from './expert-loads.js'
import { LossChart } from './loss-chart.js'

const ids = [
  'text',
  'size',
  'file',
  'speeches',
  'model',
  'steps',
  'form',
  'train',
  'resume',
  'status',
  'loss',
  'experts',
]
const [text, size, file, speeches, model, steps, form, trainButton, resumeButton, status, loss, experts] = ids.map(find)
const [writing, prompt, writeButton, written, download] = ['writing', 'prompt', 'write', 'written', 'download'].map(
  find,
)
const chart = new LossChart(loss)
const worker = new Worker('train-worker.js', { type: 'module' })
const ask = (action, options = {}) => worker.postMessage({ action, ...options })

/** `training`, `writing`, or empty. */
let busy = ''
let ready = false
let hasModel = false
/** The saved run, which can be resumed. */
let kept
let start
let speed = 0

const handlers = {
  started: () => ask('open'),
  open({ device, models, kept: run }) {
    ready = true
    model.replaceChildren(...models.map(name => new Option(name, name)))
    say(`ready (${device})`)
    if (run === undefined) return speeches.click()
    show(run)
    if (run.step < run.steps) say(`a saved run can be resumed: ${run.step} of ${run.steps} steps done`)
  },
  status: say,
  model() {
    hasModel = true
  },
  event(event) {
    if (event.type === 'start') {
      start = event
      say('running the first step')
    } else if (event.type === 'step') step(event)
    else if (event.type === 'loads') drawLoads(experts, event.layers)
    else if (event.type === 'evaluation') chart.addHeldOut(event.step, event.loss)
    else if (event.type === 'evaluating') say(`evaluating on held-out text, ${Math.floor(100 * event.done)} %`)
    else if (event.type === 'checkpoint') kept = { ...kept, step: event.step }
  },
  trained({ interrupted, bitsPerByte }) {
    busy = ''
    say(
      interrupted
        ? `stopped after step ${kept.step} of ${kept.steps}`
        : `finished: ${bitsPerByte.toFixed(2)} bits per byte on held-out text`,
    )
  },
  piece(piece) {
    written.textContent += piece
  },
  written() {
    busy = ''
  },
  files(files) {
    for (const one of files) {
      const link = document.createElement('a')
      link.href = URL.createObjectURL(one)
      link.download = one.name
      link.click()
      setTimeout(() => URL.revokeObjectURL(link.href), 60_000)
    }
  },
  failed(message) {
    busy = ''
    say(message, true)
  },
}

chart.begin(Number(steps.value))
worker.addEventListener('message', ({ data: { what, value } }) => {
  handlers[what](value)
  showButtons()
})
worker.addEventListener('error', ({ message }) => say(message, true))

form.addEventListener('submit', event => {
  event.preventDefault()
  if (busy === 'training') return ask('stop')
  kept = { text: text.value, size: model.value, steps: Number(steps.value), step: 0 }
  trainFrom(false)
})
resumeButton.addEventListener('click', () => {
  setText(kept.text)
  model.value = kept.size
  steps.value = kept.steps
  trainFrom(true)
})
writing.addEventListener('submit', event => {
  event.preventDefault()
  if (busy === 'writing') return ask('stop')
  busy = 'writing'
  written.textContent = prompt.value
  ask('write', { prompt: prompt.value })
  showButtons()
})
download.addEventListener('click', () => ask('files'))
speeches.addEventListener('click', async () => {
  const answer = await fetch('corpus.txt')
  if (answer.ok) setText(await answer.text())
})
file.addEventListener('change', async () => {
  if (file.files[0]) setText(await file.files[0].text())
  file.value = ''
})
text.addEventListener('input', () => setText(text.value))

function trainFrom(resume) {
  busy = 'training'
  hasModel = false
  speed = 0
  if (!resume) chart.begin(kept.steps)
  ask('train', { ...kept, resume })
  showButtons()
}

function step({ step, nll, tokensPerSecond }) {
  chart.add(step, nll)
  speed = speed === 0 ? tokensPerSecond : 0.9 * speed + 0.1 * tokensPerSecond
  const left = ((start.steps - step) * start.tokensPerStep) / speed
  const clock = `${Math.floor(left / 60)}:${String(Math.floor(left % 60)).padStart(2, '0')}`
  say(`step ${step} of ${start.steps}, loss ${nll.toFixed(2)}, ${grouped(speed)} tokens/s, ${clock} left`)
}

/** Shows a saved run. */
function show(run) {
  kept = run
  setText(run.text)
  model.value = run.size
  steps.value = run.steps
  chart.begin(run.steps)
  const done = ([step]) => step <= run.step
  for (const [step, nll] of run.losses.filter(done)) chart.add(step, nll)
  for (const [step, nll] of run.heldOut.filter(done)) chart.addHeldOut(step, nll)
  if (run.loads.length > 0) drawLoads(experts, run.loads)
}

function setText(value) {
  if (text.value !== value) text.value = value
  size.textContent = value === '' ? '' : `${grouped(value.length)} characters`
  showButtons()
}

function showButtons() {
  const training = busy === 'training'
  trainButton.disabled = !ready || busy === 'writing' || (!training && text.value.length < 1000)
  trainButton.textContent = training ? 'Stop' : 'Train'
  resumeButton.hidden = busy !== '' || !(kept?.step > 0 && kept.step < kept.steps)
  for (const field of [text, file, speeches, model, steps]) field.disabled = training
  writeButton.disabled = training || !hasModel
  written.dataset.empty = hasModel ? 'Press Continue to generate text with the model.' : 'Train a model first.'
  writeButton.textContent = busy === 'writing' ? 'Stop' : 'Continue'
  download.disabled = busy !== '' || !hasModel
}

function say(what, bad = false) {
  status.textContent = what
  status.classList.toggle('bad', bad)
}

function find(id) {
  return document.getElementById(id)
}

function grouped(number) {
  return Math.round(number).toLocaleString('en-US')
}
