/** @file One chart: a metric of several runs. */
import { heldOut, short, smoothed, ticks } from './numbers.js'
import uPlot from './uplot.js'

/** Maximum distance in pixels between the pointer and the point whose value is shown. */
const reach = 40

/** Titles and units of known metrics, in display order. Other metrics follow. */
export const known = [
  { group: 'Rewards', name: 'reward', title: 'Reward', unit: 'mean over texts', validation: 'reward' },
  { group: 'Rewards', name: 'preference', title: 'Preference loss', unit: 'nats per pair', validation: 'preference' },
  {
    group: 'Rewards',
    name: 'preferred',
    title: 'Pairs with the chosen text preferred',
    unit: 'fraction',
    validation: 'preferred',
  },
  { group: 'Rewards', name: 'rewardStd', title: 'Reward spread', unit: 'standard deviation within groups' },
  { group: 'Rewards', name: 'flatGroups', title: 'Groups with equal rewards', unit: 'fraction' },
  { group: 'Rewards', name: 'entropy', title: 'Entropy', unit: 'nats per token' },
  { group: 'Rewards', name: 'textLength', title: 'Text length', unit: 'tokens' },
  { group: 'Rewards', name: 'cutOff', title: 'Texts cut off at maxTokens', unit: 'fraction' },
  { group: 'Rewards', name: 'kl', title: 'KL divergence from the reference', unit: 'nats per token' },
  { group: 'Rewards', name: 'clipped', title: 'Clipped tokens', unit: 'fraction' },
  { group: 'Rewards', name: 'samplerKl', title: 'KL divergence of sampler and training pass', unit: 'nats per token' },
  { group: 'Loss', name: 'nll', title: 'Training loss', unit: 'nats per token', validation: 'loss' },
  { group: 'Loss', name: 'bitsPerByte', title: 'Held-out data', unit: 'bits per byte', validation: 'bitsPerByte' },
  { group: 'Loss', name: 'loss', title: 'Objective', unit: 'minimized loss' },
  { group: 'Loss', name: 'mtp', title: 'Multi-token prediction', unit: 'nats per token' },
  { group: 'Experts', name: 'maxVio', title: 'MaxVio', unit: 'max load / mean load − 1' },
  { group: 'Experts', name: 'maxVioWorst', title: 'MaxVio, worst layer', unit: 'max load / mean load − 1' },
  { group: 'Experts', name: 'deadExperts', title: 'Dead experts', unit: 'in all layers' },
  { group: 'Experts', name: 'balance', title: 'Balance loss', unit: '' },
  { group: 'Optimization', name: 'lr', title: 'Learning rate', unit: '' },
  { group: 'Optimization', name: 'gradNorm', title: 'Gradient norm', unit: 'before clipping' },
  { group: 'Speed', name: 'tokensPerSecond', title: 'Speed', unit: 'tokens per second' },
]

export class Chart {
  #plot
  #legend
  #at
  #key = ''
  #box
  #lines = []
  #observer

  /**
   * @param what an entry of `known`, or similar @param zoom called with a range of the horizontal axis @param hover
   *   called with the position of the pointer on it, or null
   */
  constructor(what, zoom, hover) {
    this.what = what
    this.zoom = zoom
    this.element = element('section', 'chart')
    const unit = element('span', 'unit', what.unit)
    unit.title = what.unit
    const header = element('header', '', element('h3', '', what.title), unit)
    this.#at = header.appendChild(element('span', 'at'))
    this.#box = element('div', 'plot')
    this.#legend = element('ul', '')
    this.element.append(header, this.#legend, this.#box)
    this.#box.onpointermove = ({ clientX }) => {
      const { left, width } = this.#plot.over.getBoundingClientRect()
      const at = clientX - left
      hover(at >= 0 && at <= width ? this.#plot.posToVal(at, 'x') : null)
    }
    this.#box.onpointerleave = () => hover(null)
    this.#observer = new ResizeObserver(() => this.#plot?.setSize(this.#size))
    this.#observer.observe(this.#box)
  }

  remove() {
    this.#observer.disconnect()
    this.#plot?.destroy()
    this.element.remove()
  }

  /** Width of the chart in pixels. */
  get width() {
    return this.#box.clientWidth
  }

  get #size() {
    return { width: Math.max(120, this.#box.clientWidth), height: this.#box.clientHeight }
  }

  /** Draws runs: `{ name, color, dash, series, detailed, state }`. */
  draw(runs, view) {
    const { what } = this
    const tables = []
    const series = [{}]
    const bands = []
    this.#lines = []
    const table = (x, ...columns) => tables.push([x, ...columns])
    for (const run of runs) {
      const of = run.detailed ?? run.series
      const column = of.columns.get(what.name)
      const x = view.across === 'tokens' ? of.columns.get('tokens')?.mean : of.steps
      if (column && x) {
        const visible = values => (view.logarithmic ? values.map(value => (value > 0 ? value : null)) : values)
        const { stroke, fill, faint } = run.colors
        if (column.min) {
          bands.push({ series: [series.length + 1, series.length], fill })
          series.push({ points: { show: false } }, { points: { show: false } })
          table(x, visible(column.min), visible(column.max))
        } else if (view.smoothing > 0) {
          series.push({ stroke: faint, width: 1, points: { show: false } })
          table(x, visible(column.mean))
        }
        this.#lines.push({ run, index: series.length })
        series.push({ stroke, width: 2, dash: run.dash, points: { show: x.length === 1, size: 6, fill: stroke } })
        table(x, visible(smoothed(column.mean, view.smoothing)))
      }
      for (const averaged of what.logged ? [false] : what.validation ? [false, true] : []) {
        const points = what.logged
          ? logged(run, what.logged, view.across)
          : validation(run, what.validation, view.across, averaged)
        if (points.length === 0) continue
        // A chart without a training curve.
        const own = what.logged !== undefined || what.name === 'bitsPerByte'
        this.#lines.push({
          run,
          index: series.length,
          mark: averaged ? 'EMA' : own ? '' : 'held-out',
        })
        const { stroke } = run.colors
        const filled = own && !averaged
        const marks = { show: true, size: filled ? 6 : 8, width: 2, stroke, fill: filled ? stroke : view.theme.card }
        series.push({
          stroke,
          width: own ? 2 : 0,
          dash: averaged ? [2, 4] : run.dash,
          points: marks,
          ...(own ? {} : { paths: () => null }),
        })
        table(
          points.map(([at]) => at),
          points.map(([, value]) => value),
        )
      }
    }
    this.element.hidden = tables.length === 0
    if (tables.length === 0) return
    const data = uPlot.join(tables)
    const key = JSON.stringify([
      view,
      series.map(({ stroke, points }) => [stroke, points?.show]),
      this.#lines.map(({ run }) => run.name),
    ])
    if (key === this.#key) {
      this.#plot.setData(data, false)
      this.#plot.setScale('x', this.#range(data[0], view.range))
    } else {
      this.#key = key
      this.#plot?.destroy()
      this.#plot = new uPlot(this.#options(series, bands, view, data), data, this.#box)
    }
    this.#showValues()
  }

  #range(x, range) {
    const [min, max] = range ?? [x[0], x[x.length - 1]]
    return min < max ? { min, max } : { min: min - 1, max: max + 1 }
  }

  #options(series, bands, view, data) {
    const { theme, logarithmic } = view
    const axis = {
      stroke: theme.faint,
      font: '12px system-ui, "DejaVu Sans", sans-serif',
      grid: { stroke: theme.grid, width: 1 },
      ticks: { show: false },
      values: (_, values) => values.map(short),
    }
    const { min, max } = this.#range(data[0], view.range)
    return {
      ...this.#size,
      padding: [8, 14, 0, 0],
      legend: { show: false },
      series,
      bands,
      scales: {
        x: { time: false, min, max },
        y: {
          distr: logarithmic ? 3 : 1,
          range: (_, low, high) =>
            low === null ? [1, 2] : logarithmic ? [low / 1.08, high * 1.08] : padded(low, high),
        },
      },
      axes: [
        {
          ...axis,
          splits: (u, _, low, high) => ticks(low, high, Math.max(2, u.width / 110), false),
          label: view.across,
          labelSize: 16,
          labelFont: axis.font,
          labelGap: -2,
          size: 26,
          gap: 4,
        },
        {
          ...axis,
          size: (_, values) => Math.max(30, ...(values ?? []).map(text => 12 + 7 * text.length)),
          gap: 6,
          splits: (_, __, low, high) => ticks(low, high, 5, logarithmic),
        },
      ],
      cursor: {
        y: false,
        sync: { key: 'runs', setSeries: false },
        drag: { x: true, y: false, setScale: false },
        points: { size: 7 },
        bind: { dblclick: () => () => this.zoom(null) },
        dataIdx: (u, index, at) => nearest(u, index, at),
      },
      hooks: {
        setCursor: [() => this.#showValues()],
        setSelect: [
          u => {
            const { left, width } = u.select
            u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false)
            if (width >= 4) this.zoom([u.posToVal(left, 'x'), u.posToVal(left + width, 'x')])
          },
        ],
      },
    }
  }

  /** Shows the values under the pointer, or the last ones. */
  #showValues() {
    const u = this.#plot
    if (!u) return
    const { left, idxs } = u.cursor
    const hovered = left >= 0 && idxs
    this.#at.textContent = hovered ? `at ${Math.round(u.posToVal(left, 'x')).toLocaleString('en-US')}` : ''
    const entries = new Map()
    for (const { run, index, mark = '' } of this.#lines) {
      const values = u.data[index]
      const value = hovered ? values[idxs[index]] : values.findLast(one => one !== null && one !== undefined)
      if (value === null || value === undefined) continue
      if (!entries.has(run)) {
        const name = element('i', '', run.name)
        name.title = run.name
        entries.set(run, element('li', '', swatch(run), name))
      }
      entries.get(run).append(...(mark === '' ? [] : [element('span', 'mark', mark)]), element('b', '', short(value)))
    }
    this.#legend.replaceChildren(...entries.values())
  }
}

/** Points of a logged number as `[x, y]`. */
function logged({ state, series }, name, across) {
  const { steps = [], values = [] } = state.logged[name] ?? {}
  return steps.flatMap((step, i) => {
    const x = across === 'step' ? step : tokensAt(series, step)
    return x === undefined || values[i] === null ? [] : [[x, values[i]]]
  })
}

/** Held-out points as `[x, y]`, of the weights or of the EMA. */
function validation({ state, series }, name, across, averaged) {
  return state.validation.flatMap(({ step, ema, ...weights }) => {
    const value = heldOut(averaged ? (ema ?? {}) : weights, name)
    if (typeof value !== 'number') return []
    const x = across === 'step' ? step : tokensAt(series, step)
    return x === undefined ? [] : [[x, value]]
  })
}

const tokensAt = ({ steps, columns }, step) => columns.get('tokens')?.mean[steps.findIndex(other => other >= step)]

function nearest(u, index, at) {
  const values = u.data[index]
  const has = i => values[i] !== null && values[i] !== undefined
  if (has(at)) return at
  const x = u.data[0]
  const here = u.valToPos(x[at], 'x')
  for (const by of [-1, 1]) {
    let i = at
    while (i >= 0 && i < x.length && !has(i) && Math.abs(u.valToPos(x[i], 'x') - here) < reach) i += by
    if (has(i) && Math.abs(u.valToPos(x[i], 'x') - here) < reach) return i
  }
  return null
}

function padded(low, high) {
  const pad = 0.06 * (high - low || Math.abs(high) || 1)
  return [low >= 0 && low - pad < 0 ? 0 : low - pad, high + pad]
}

export function swatch({ colors, dash }) {
  const mark = element('span', 'swatch')
  mark.style.borderTopColor = colors.stroke
  if (dash) mark.style.borderTopStyle = 'dashed'
  return mark
}

/** Creates an element with a class and children. Strings become text nodes. */
export function element(name, className, ...children) {
  const made = document.createElement(name)
  if (className) made.className = className
  made.append(...children)
  return made
}
