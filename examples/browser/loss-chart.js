/** @file Draws the loss of a training run: each step, their running mean, and evaluations on held-out text. */

const margin = { left: 34, right: 10, top: 8, bottom: 24 }

export class LossChart {
  #element
  #steps = 1
  #losses = []
  #means = []
  #heldOut = []
  #due = false

  constructor(element) {
    this.#element = element
    new ResizeObserver(() => this.#draw()).observe(element)
  }

  /** Clears the chart for a run of `steps` steps. */
  begin(steps) {
    this.#steps = steps
    this.#losses = []
    this.#means = []
    this.#heldOut = []
    this.#drawSoon()
  }

  add(step, loss) {
    // Running mean over the last steps; over fewer at the beginning and in short runs.
    const over = Math.min(1 + this.#losses.length / 8, Math.max(2, this.#steps / 25))
    const before = this.#means.at(-1)?.[1] ?? loss
    this.#losses.push([step, loss])
    this.#means.push([step, before + (loss - before) / over])
    this.#drawSoon()
  }

  addHeldOut(step, loss) {
    this.#heldOut.push([step, loss])
    this.#drawSoon()
  }

  #drawSoon() {
    if (this.#due) return
    this.#due = true
    requestAnimationFrame(() => {
      this.#due = false
      this.#draw()
    })
  }

  #draw() {
    const { clientWidth: width, clientHeight: height } = this.#element
    const values = [...this.#losses, ...this.#heldOut].map(([, loss]) => loss)
    const [low, high, ticks] = range(values.length === 0 ? [0, 6] : values)
    const x = step => margin.left + (step / this.#steps) * (width - margin.left - margin.right)
    const y = loss => margin.top + ((high - loss) / (high - low)) * (height - margin.top - margin.bottom)
    const path = points => {
      const stride = Math.ceil(points.length / width)
      const some = points.filter((_, i) => i % stride === 0 || i === points.length - 1)
      return some.map(([step, loss], i) => `${i === 0 ? 'M' : 'L'}${x(step).toFixed(1)} ${y(loss).toFixed(1)}`).join('')
    }
    const [, , steps] = range([0, this.#steps])
    this.#element.innerHTML = `<svg role="img" aria-label="Loss by step">
      ${ticks.map(tick => `<line x1="${margin.left}" x2="${width - margin.right}" y1="${y(tick)}" y2="${y(tick)}"/><text x="${margin.left - 8}" y="${y(tick) + 4}" text-anchor="end">${tick}</text>`).join('')}
      ${steps.map(step => `<text x="${x(step)}" y="${height - 4}" text-anchor="${step === 0 ? 'start' : step === this.#steps ? 'end' : 'middle'}">${step}</text>`).join('')}
      <path class="each" d="${path(this.#losses)}"/><path class="mean" d="${path(this.#means)}"/>
      ${this.#heldOut.map(([step, loss]) => `<circle cx="${x(step)}" cy="${y(loss)}" r="4"><title>held out, step ${step}: ${loss.toFixed(3)}</title></circle>`).join('')}
    </svg>`
  }
}

/** Returns the ends of an axis, and round numbers on it. */
function range(values) {
  const least = values.reduce((a, b) => Math.min(a, b))
  const most = values.reduce((a, b) => Math.max(a, b))
  const about = (most - least || 1) / 4
  const power = 10 ** Math.floor(Math.log10(about))
  const stride = [1, 2, 5, 10].find(factor => factor * power >= about) * power
  const low = Math.floor(least / stride) * stride
  const high = Math.max(most, low + stride)
  const ticks = []
  for (let i = Math.ceil(low / stride); i * stride <= high + stride / 1e6; i++)
    ticks.push(Number((i * stride).toPrecision(6)))
  return [low, high, ticks]
}
