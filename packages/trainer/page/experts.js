/** @file Heat maps of a run's expert loads: all layers at a step, and one layer over time. */
import { element } from './charts.js'
import { HeatMap } from './heat-map.js'
import { centred, shadeOfBias, shadeOfShare, shares, summaryOf } from './loads.js'
import { short, ticks } from './numbers.js'

/** Blue and orange can be distinguished with any color vision; the middle is close to the page's background. */
const scales = {
  light: { low: [4, 83, 148], middle: [243, 243, 240], high: [190, 77, 0] },
  dark: { low: [106, 186, 255], middle: [38, 45, 54], high: [255, 158, 74] },
}
/** Number of lines to cache for when the pointer comes back. */
const mostLines = 64
/** Width in pixels of a line in the map over time. */
const pixelsPerLine = 2

const $ = id => document.getElementById(id)

export class Experts {
  #runs = []
  #view = {}
  /** The run that is shown. */
  #run = null
  #key = ''
  #line = null
  #over = []
  #overKey = ''
  /** Key of what the page shows. */
  #drawn = ''
  #lines = []
  /** Step of the slider; null for the last one. */
  #step = null
  /** Step under the pointer on a chart, or null. */
  #hovered = null
  #layer = null
  #asking = false
  #layers = new HeatMap('Expert loads of all layers: experts from left to right, layers from top to bottom', (_, row) =>
    this.#choose(this.#line?.layers[row].name),
  )
  #time = new HeatMap('Expert loads of one layer: steps from left to right, experts from top to bottom', column =>
    this.#goTo(this.#over[column].step),
  )

  constructor() {
    $('experts-map').append(this.#layers.element)
    $('experts-time').append(this.#time.element)
    $('experts-run').onchange = ({ target }) => {
      this.#show(this.#runs.find(({ name }) => name === target.value))
    }
    $('experts-what').onchange = () => this.#draw()
    $('experts-step').oninput = ({ target }) => {
      const value = Number(target.value)
      this.#goTo(value + Number(target.step) > Number(target.max) ? null : value)
    }
    $('experts-layer').onchange = ({ target }) => this.#choose(target.value)
  }

  /** @param runs the selected runs, as in `Chart.draw` */
  draw(runs, view) {
    this.#view = view
    this.#runs = runs.filter(({ state }) => state.loads !== null)
    $('experts').hidden = this.#runs.length === 0
    if (this.#runs.length === 0) return
    const names = this.#runs.map(({ name }) => name)
    options($('experts-run'), names)
    const run = this.#runs.find(({ name }) => name === this.#run?.name) ?? this.#runs[this.#runs.length - 1]
    this.#show(run)
  }

  /** Shows the loads of a step while the pointer is at that position of a chart; null when it has left. */
  hover(at) {
    if (this.#run === null) return
    const { steps, columns } = this.#run.series
    const tokens = this.#view.across === 'tokens' ? columns.get('tokens')?.mean : undefined
    const step = at === null ? null : tokens ? steps[tokens.findIndex(value => value >= at)] : Math.round(at)
    if (step === this.#hovered) return
    this.#hovered = step ?? null
    this.#ask()
  }

  #show(run) {
    this.#run = run
    const { loads, about } = run.state
    // A resumed run may have written other lines.
    const key = `${run.name} ${about.began}`
    if (key !== this.#key) {
      this.#key = key
      this.#lines = []
      this.#overKey = ''
    }
    $('experts-run').value = run.name
    options($('experts-layer'), loads.layers)
    if (!loads.layers.includes(this.#layer)) this.#layer = loads.layers[0]
    $('experts-layer').value = this.#layer
    this.#ask()
  }

  #choose(layer) {
    if (layer === undefined) return
    this.#layer = layer
    $('experts-layer').value = layer
    this.#ask()
  }

  #goTo(step) {
    this.#step = step
    this.#ask()
  }

  /** Fetches what is missing, one request at a time, and draws. */
  async #ask() {
    if (this.#asking) return
    this.#asking = true
    try {
      while (await this.#fetchMissing());
    } catch {
      // The next message from the server triggers another attempt.
    } finally {
      this.#asking = false
    }
    this.#draw()
  }

  /** @returns whether something was fetched */
  async #fetchMissing() {
    const { name, state } = this.#run
    const { first, last } = state.loads
    const step = Math.max(0, Math.min(last, this.#hovered ?? this.#step ?? last))
    const key = this.#key
    const known = this.#lines.find(line => line.step >= step && line.step - line.steps < step)
    if (known) this.#line = known
    else {
      const line = await get('loads.json', { run: name, step })
      if (key !== this.#key) return true
      this.#line = line
      // If lines are missing, it may cover other steps, and is fetched again when needed.
      this.#lines = [...this.#lines.slice(-mostLines + 1), line]
    }
    const { range, across } = this.#view
    const [from, to] = range && across === 'step' ? range.map(Math.round) : [first, last]
    const most = Math.max(20, Math.floor(this.#time.element.clientWidth / pixelsPerLine))
    const overKey = JSON.stringify([key, this.#layer, from, to, last, most])
    if (overKey === this.#overKey) return false
    const over = await get('loads.json', { run: name, layer: this.#layer, from, to, most })
    if (key !== this.#key) return true
    this.#overKey = overKey
    this.#over = over
    return true
  }

  get #theme() {
    const { theme, dark } = this.#view
    return { ...theme, dead: theme.text, scale: scales[dark ? 'dark' : 'light'] }
  }

  #draw() {
    if (!this.#run || !this.#line || $('experts').hidden) return
    const { loads } = this.#run.state
    const { step, steps, layers } = this.#line
    const what = $('experts-what')
    const wanted = [this.#step, this.#hovered === null, this.#layer, what.value, this.#view.dark]
    const key = JSON.stringify([this.#overKey, step, loads, ...wanted])
    if (key === this.#drawn) return
    this.#drawn = key
    const slider = $('experts-step')
    slider.step = String(Math.max(1, steps))
    slider.min = String(Math.min(loads.first, loads.last - 1))
    slider.max = String(loads.last)
    if (this.#hovered === null) slider.value = String(this.#step ?? loads.last)
    const count = value => value.toLocaleString('en-US')
    const when = steps > 1 ? `steps ${count(step - steps + 1)} to ${count(step)}` : `step ${count(step)}`
    $('experts-when').textContent = `${when}${this.#hovered === null ? '' : ' (under the pointer)'}`
    const biased = [...layers, ...this.#over].some(({ bias }) => bias)
    what.querySelector('[value=bias]').disabled = !biased
    if (!biased) what.value = 'load'
    const show = what.value
    const [ofLayers, ofTime] = [layers, this.#over].map(list =>
      list.map(({ load, bias }) => ({ shares: shares(load), bias: bias && centred(bias) })),
    )
    const largest = [...ofLayers, ...ofTime].reduce(
      (most, { bias = [] }) => bias.reduce((so, value) => Math.max(so, Math.abs(value)), most),
      0,
    )
    const shade = (of, expert) => {
      if (expert >= of.shares.length) return undefined
      if (show === 'load') return shadeOfShare(of.shares[expert])
      return of.bias && shadeOfBias(of.bias[expert], largest)
    }
    this.#drawLayers(layers, ofLayers, shade)
    this.#drawTime(ofTime, shade)
    this.#drawLegend(show, largest)
    this.#drawTable(layers)
  }

  #drawLayers(layers, of, shade) {
    const most = Math.max(1, ...layers.map(({ load }) => load.length))
    const { groups } = layers[0] ?? { groups: 1 }
    const row = layers.findIndex(({ name }) => name === this.#layer)
    this.#layers.draw({
      columns: even(most, groups),
      rows: even(layers.length),
      shade: (column, i) => shade(of[i], column),
      describe: (column, i) => [
        `${layers[i].name}, expert ${column}`,
        ...expertLines(layers[i], of[i].shares, column),
        `MaxVio of the layer: ${short(summaryOf(layers[i]).maxVio)}, of single steps: ${short(layers[i].stepMaxVio)}`,
      ],
      left: layers.map(({ name }, i) => [(i + 0.5) / layers.length, name]),
      below: ticks(0, most - 1, 8, false)
        .filter(Number.isInteger)
        .map(expert => [(expert + 0.5) / most, String(expert)]),
      height: Math.max(160, Math.min(30 * layers.length, 10 * layers.length + 160)) + 20,
      marked: row < 0 ? {} : { row },
      theme: this.#theme,
      summary: this.#inWords(layers),
    })
  }

  #inWords(layers) {
    if (layers.length === 0) return ''
    const all = layers.map(layer => ({ name: layer.name, ...summaryOf(layer) }))
    const worst = all.reduce((a, b) => (b.maxVio > a.maxVio ? b : a))
    const dead = all.reduce((sum, layer) => sum + layer.dead.length, 0)
    return `The busiest expert is ${worst.busiest} of ${worst.name}, with ${short(worst.maxVio + 1)} times the mean load; dead experts: ${dead}.`
  }

  #drawTime(of, shade) {
    const over = this.#over
    const experts = over[0]?.load.length ?? 1
    const begin = over.length > 0 ? over[0].step - over[0].steps : 0
    const end = over.at(-1)?.step ?? 1
    const place = step => (step - begin) / Math.max(1, end - begin)
    const column = over.findIndex(({ step }) => step >= (this.#line?.step ?? 0))
    this.#time.draw({
      columns: over.map(({ step }) => place(step)),
      rows: even(experts, over[0]?.groups ?? 1),
      shade: (i, expert) => shade(of[i], expert),
      describe: (i, expert) => [
        `expert ${expert}, ${over[i].steps > 1 ? `steps ${over[i].step - over[i].steps + 1} to` : 'step'} ${over[i].step}`,
        ...expertLines(over[i], of[i].shares, expert),
      ],
      left: ticks(0, experts - 1, 8, false)
        .filter(Number.isInteger)
        .map(expert => [(expert + 0.5) / experts, String(expert)]),
      below: ticks(begin, end, 6, false).map(step => [place(step), short(step)]),
      height: Math.max(180, Math.min(460, 16 * experts)) + 20,
      marked: column < 0 ? {} : { column },
      theme: this.#theme,
      summary: `${this.#layer}, ${over.length} lines up to step ${end}.`,
    })
  }

  #drawLegend(show, largest) {
    const { scale } = this.#theme
    const rgb = color => `rgb(${color.join(' ')})`
    $('experts-scale').style.background = `linear-gradient(90deg, ${[scale.low, scale.middle, scale.high].map(rgb)})`
    const texts = show === 'load' ? ['¼ or less', 'mean', '4 × or more'] : [short(-largest), '0', short(largest)]
    for (const [i, at] of ['low', 'middle', 'high'].entries()) $(`experts-${at}`).textContent = texts[i]
    $('experts-dead').hidden = show !== 'load'
  }

  #drawTable(layers) {
    const percent = value => `${short(100 * value)} %`
    const rows = layers.map(layer => {
      const { maxVio, busiest, idlest, least, dead, dropped, bias } = summaryOf(layer)
      const cells = [
        short(maxVio),
        short(layer.stepMaxVio),
        `${busiest} (${short(maxVio + 1)} ×)`,
        `${idlest} (${short(least)} ×)`,
        dead.length === 0 ? '0' : `${dead.length}: ${dead.slice(0, 16).join(', ')}${dead.length > 16 ? ', …' : ''}`,
        dropped === null ? '–' : percent(dropped),
        bias === null ? '–' : bias.map(short).join(' to '),
      ]
      const head = element('th', '', layer.name)
      head.scope = 'row'
      return element('tr', '', head, ...cells.map(text => element('td', '', text)))
    })
    const titles = [
      'layer',
      'MaxVio',
      'MaxVio of single steps',
      'busiest expert',
      'least busy expert',
      'dead',
      'dropped',
      'bias',
    ]
    const head = titles.map(title => {
      const cell = element('th', '', title)
      cell.scope = 'col'
      return cell
    })
    $('experts-table').replaceChildren(element('tr', '', ...head), ...rows)
  }
}

/** Ends of equal parts, with gaps between groups. */
function even(count, groups = 1) {
  const ends = Array.from({ length: count }, (_, i) => (i + 1) / count)
  const size = count / groups
  ends.gaps = new Set(Array.from({ length: groups - 1 }, (_, group) => (group + 1) * size))
  return ends
}

/** Describes an expert. */
function expertLines({ load, groups, bias }, of, expert) {
  const count = load[expert]
  return [
    count === 0 ? 'dead: no tokens' : `${short(of[expert])} × the mean`,
    `${count.toLocaleString('en-US')} tokens`,
    ...(bias ? [`bias ${short(bias[expert])}`] : []),
    ...(groups > 1 ? [`group ${Math.floor((expert * groups) / load.length)}`] : []),
  ]
}

/** Fills a list, unless it already has these options. */
function options(list, names) {
  const has = [...list.options].map(({ value }) => value)
  if (has.join('\n') === names.join('\n')) return
  list.replaceChildren(...names.map(name => new Option(name, name)))
}

async function get(path, query) {
  const response = await fetch(`${path}?${new URLSearchParams(query)}`)
  if (!response.ok) throw new Error(`${path}: ${response.status}`)
  return response.json()
}
