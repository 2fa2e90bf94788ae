/** @file The dashboard: shows the data from the server as a list of runs and as charts. */
import { Chart, element, known, swatch } from './charts.js'
import { Experts } from './experts.js'
import { clock, short, titleOfLogged } from './numbers.js'
import { joined, wanted } from './zoom.js'

/**
 * Okabe and Ito's palette, which is distinguishable with color vision deficiencies, in a lighter and a darker form.
 * Further runs are dashed.
 */
const palette = {
  light: ['#0072b2', '#d55e00', '#009e73', '#b5569a', '#a87900', '#3a9bd1', '#4d4d4d'],
  dark: ['#56a8e8', '#ff8a3d', '#2fc79a', '#e39ac6', '#e6b422', '#9bd3f5', '#c8c8c8'],
}
const dashes = [undefined, [6, 4], [2, 3]]
/** Number of runs that are shown by default. */
const shownAtFirst = 8

const statusText = {
  training: 'training',
  finished: 'finished',
  interrupted: 'interrupted',
  time: 'time limit reached',
  failed: 'failed',
  killed: 'ended abruptly',
  silent: 'no recent data',
  unknown: '',
}

const $ = id => document.getElementById(id)
const dark = matchMedia('(prefers-color-scheme: dark)')
/** Runs by name: `{ name, order, shown, state, series, detailed, colors, dash, row }`. */
const runs = new Map()
const charts = new Map()
const groups = new Map()
const view = { smoothing: 0, across: 'step', logarithmic: false, range: null, theme: {} }
const experts = new Experts()
let order = 0
/** Difference between the server's clock and ours, in milliseconds. */
let ahead = 0

const source = new EventSource('live')
source.onopen = () => connection('live', false)
source.onerror = () => connection(source.readyState === EventSource.CLOSED ? 'disconnected' : 'reconnecting…', true)
source.onmessage = ({ data }) => {
  const { folder, now, runs: changed, gone } = JSON.parse(data)
  ahead = now - Date.now()
  $('folder').textContent = `in ${folder}`
  document.title = `Runs in ${folder.split(/[\\/]/).pop()}`
  for (const name of gone) {
    runs.get(name)?.row.remove()
    runs.delete(name)
  }
  const fresh = changed.filter(({ state }) => !runs.has(state.name)).map(({ state }) => state)
  for (const state of fresh.sort((a, b) => began(a) - began(b))) add(state)
  for (const { state, series } of changed) {
    const run = runs.get(state.name)
    run.state = state
    if (series.from === 0) run.part = undefined
    patch(run.series, series)
  }
  if (fresh.length > 0) arrange()
  redraw()
}

function connection(text, lost) {
  $('connection').textContent = text
  $('connection').className = lost ? 'lost' : ''
}

const began = ({ about, changed }) => Date.parse(about.began) || changed

function add(state) {
  const run = { name: state.name, order: order++, state, shown: true, series: { steps: [], columns: new Map() } }
  runs.set(run.name, run)
  run.row = element('div', 'run')
  paint(run)
}

function paint(run) {
  const colors = palette[dark.matches ? 'dark' : 'light']
  const stroke = colors[run.order % colors.length]
  run.colors = { stroke, faint: `${stroke}66`, fill: `${stroke}30` }
  run.dash = dashes[Math.floor(run.order / colors.length) % dashes.length]
}

/** Sorts runs, latest first. Of many runs, only the latest are shown. */
function arrange() {
  const sorted = [...runs.values()].sort((a, b) => b.order - a.order)
  sorted.forEach((run, i) => {
    if (run.chosen === undefined) run.shown = i < shownAtFirst
  })
  $('runs').replaceChildren(...sorted.map(({ row }) => row))
}

/** Adds a patch from the server to a series. */
function patch(series, { from, steps, columns }) {
  const splice = (list, values) => [...list.slice(0, from), ...values]
  series.steps = splice(series.steps, steps)
  const empty = Array.from({ length: from }, () => null)
  const before = from === 0 ? new Map() : series.columns
  series.columns = new Map(
    columns.map(({ name, mean, min, max }) => {
      const had = before.get(name)
      const all = (kind, values) => values && splice(had?.[kind] ?? empty, values)
      return [name, { mean: all('mean', mean), min: all('min', min), max: all('max', max) }]
    }),
  )
}

let asked = false
/** Redraws the page, at most once per frame. */
function redraw() {
  if (asked) return
  asked = true
  requestAnimationFrame(() => {
    asked = false
    list()
    detail()
    drawCharts()
    experts.draw(shownRuns(), view)
    settings()
  })
}

function list() {
  $('controls').hidden = runs.size === 0
  if (runs.size === 0) {
    $('runs').replaceChildren(
      element(
        'p',
        'empty',
        'No runs yet. Runs appear here when train() is called with an out folder inside this folder.',
      ),
    )
  } else $('runs').querySelector('.empty')?.remove()
  for (const run of runs.values()) row(run)
}

function row(run) {
  const { state, series, shown } = run
  const { step, steps, status } = state
  let box = run.row.querySelector('input')
  if (!box) {
    box = element('input', '')
    box.type = 'checkbox'
    box.onchange = () => {
      run.shown = run.chosen = box.checked
      redraw()
    }
    run.row.append(element('label', '', box))
  }
  box.checked = shown
  const label = run.row.firstChild
  label.replaceChildren(box, swatch(run), run.name)
  run.row.className = shown ? 'run' : 'run hidden'

  const age = (Date.now() + ahead - state.changed) / 1000
  const quiet = status === 'training' && age > 60 ? `, last update ${clock(age)} ago` : ''
  const bar = element('progress', '')
  bar.max = steps ?? 1
  bar.value = steps === null ? 0 : step
  bar.setAttribute('aria-label', 'progress')
  const left = state.secondsLeft === null ? '' : `, ${clock(state.secondsLeft)} left`
  const of = steps === null ? '' : ` of ${steps.toLocaleString('en-US')}`
  const done = element(
    'div',
    'done number',
    element('span', '', `step ${step.toLocaleString('en-US')}${of}${left}${quiet}`),
    bar,
  )
  const last = name => series.columns.get(name)?.mean.findLast(value => value !== null)
  const validation = state.validation[state.validation.length - 1]
  const numbers = [
    ['loss', last('nll')],
    ['bits per byte', validation?.bitsPerByte],
    ['MaxVio', last('maxVio')],
    ['dead experts', last('deadExperts')],
    ['tokens/s', status === 'training' ? state.tokensPerSecond : last('tokensPerSecond')],
  ].map(([title, value]) => element('div', 'number', element('span', '', title), element('b', '', short(value))))
  const notes = [
    ...(state.problem === null ? [] : [element('div', 'note bad', state.problem)]),
    ...(state.badLines > 0 ? [element('div', 'note', `unreadable lines in metrics.jsonl: ${state.badLines}`)] : []),
    ...state.notices.slice(-2).map(notice => element('div', 'note', notice)),
  ]
  run.row.replaceChildren(label, element('div', `status ${status}`, statusText[status]), done, ...numbers, ...notes)
}

const shownRuns = () => [...runs.values()].filter(run => run.shown).sort((a, b) => a.order - b.order)

/** Fetches more detail for a zoomed range. It is shown as soon as it arrives. */
function detail() {
  const pixels = Math.max(200, ...[...charts.values()].map(chart => chart.width))
  for (const run of shownRuns()) {
    const steps = wanted(run.series, view, pixels)
    // While a run is training, new data extends the range.
    const key = steps && JSON.stringify([...steps, Math.min(steps[1], run.state.step), pixels])
    if (key === undefined) run.part = undefined
    else if (run.asking === undefined && run.part?.key !== key) fetchPart(run, steps, pixels, key)
    run.detailed = run.part && joined(run.series, run.part)
  }
}

async function fetchPart(run, [from, to], most, key) {
  run.asking = key
  try {
    const response = await fetch(`series.json?${new URLSearchParams({ run: run.name, from, to, most })}`)
    if (!response.ok) return
    const part = { key, steps: [], columns: new Map() }
    patch(part, await response.json())
    run.part = part
  } catch {
    // Keep showing the points of the whole run.
    return
  } finally {
    run.asking = undefined
  }
  redraw()
}

function drawCharts() {
  const shown = shownRuns()
  const names = new Set(shown.flatMap(({ series }) => [...series.columns.keys()]))
  const others = [...names]
    .filter(name => name !== 'tokens' && !known.some(one => one.name === name))
    .map(name => ({ group: 'Other', name, title: name, unit: '' }))
  const logged = [...new Set(shown.flatMap(({ state }) => Object.keys(state.logged)))].map(name => ({
    ...titleOfLogged(name),
    name: `logged ${name}`,
    logged: name,
  }))
  for (const what of [...known, ...others, ...logged]) {
    let chart = charts.get(what.name)
    if (!chart) {
      chart = new Chart(what, zoom, at => experts.hover(at))
      charts.set(what.name, chart)
      groupOf(what.group).append(chart.element)
    }
    chart.draw(shown, view)
  }
  for (const [, { heading, box }] of groups) heading.hidden = ![...box.children].some(child => !child.hidden)
}

function groupOf(name) {
  let group = groups.get(name)
  if (!group) {
    group = { heading: element('h2', '', name), box: element('div', 'group') }
    groups.set(name, group)
    $('charts').append(group.heading, group.box)
  }
  return group.box
}

function zoom(range) {
  view.range = range
  $('whole').hidden = range === null
  redraw()
}

let settingsKey = ''
/** Shows the settings with a column for each selected run. Settings that differ come first. */
function settings() {
  const shown = shownRuns()
  const all = shown.map(({ state }) => {
    const { backend, device, parameters, tokensPerStep, began: at } = state.about
    const start = at ? new Date(at).toLocaleString() : undefined
    return { began: start, backend, device, trained: parameters, tokensPerStep, ...state.settings }
  })
  const key = JSON.stringify([shown.map(({ name }) => name), all])
  if (key === settingsKey) return
  settingsKey = key
  const names = [...new Set(all.flatMap(Object.keys))].filter(name => all.some(one => one[name] !== undefined))
  const differs = name => new Set(all.map(one => one[name])).size > 1
  const rows = [...names.filter(differs), ...names.filter(name => !differs(name))].map(name =>
    element(
      'tr',
      differs(name) ? 'differs' : '',
      element('th', '', name),
      ...all.map(one => element('td', '', one[name] === undefined ? '' : String(one[name]))),
    ),
  )
  const head = element('tr', '', element('th', ''), ...shown.map(run => element('th', '', run.name)))
  $('settings')
    .querySelector('table')
    .replaceChildren(head, ...rows)
  $('settings').hidden = names.length === 0
}

function theme() {
  const style = getComputedStyle(document.documentElement)
  view.theme = Object.fromEntries(
    ['faint', 'grid', 'card', 'text'].map(name => [name, style.getPropertyValue(`--${name}`).trim()]),
  )
  view.dark = dark.matches
  for (const run of runs.values()) paint(run)
  redraw()
}

$('smoothing').oninput = ({ target }) => {
  view.smoothing = Number(target.value)
  $('smoothing-value').textContent = target.value
  redraw()
}
$('across').onchange = ({ target }) => {
  view.across = target.value === 'tokens' ? 'tokens' : 'step'
  zoom(null)
}
$('logarithmic').onchange = ({ target }) => {
  view.logarithmic = target.checked
  redraw()
}
$('whole').onclick = () => zoom(null)
document.querySelector('form').onsubmit = event => event.preventDefault()
dark.addEventListener('change', theme)
setInterval(() => list(), 10_000)
theme()
