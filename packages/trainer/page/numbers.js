/** @file Number formats, titles of logged numbers, smoothing and axis ticks. */

/**
 * Formats a number with at most four significant digits, and k, M, G for large ones.
 * @param {number | null | undefined} value
 */
export function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return '–'
  const size = Math.abs(value)
  if (size >= 1e15 || (size > 0 && size < 1e-3))
    return value
      .toExponential(2)
      .replace(/\.?0+e/, 'e')
      .replace('e+', 'e')
  for (const [unit, letter] of [
    [1e12, 'T'],
    [1e9, 'G'],
    [1e6, 'M'],
    [1e4, 'k'],
  ]) {
    if (size >= Number(unit)) return `${digits(value / (letter === 'k' ? 1e3 : Number(unit)))}${letter}`
  }
  return digits(value)
}

/** @param {number} value */
const digits = value => (Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4))))

/**
 * Formats seconds as 0:05, 12:00, 1:02:03 or 3 d 4 h.
 * @param {number} seconds
 */
export function clock(seconds) {
  const whole = Math.round(seconds)
  const hours = Math.floor(whole / 3600)
  if (hours >= 48) return `${Math.floor(hours / 24)} d ${hours % 24} h`
  const two = (/** @type {number} */ value) => String(value).padStart(2, '0')
  const minutes = Math.floor(whole / 60) % 60
  return hours > 0 ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`
}

const heldOutUnits = { loss: 'nats per token', bitsPerByte: 'bits per byte' }

/**
 * Group, title and unit of the chart of a logged number. The evaluations of held-out sources are logged as
 * `validation/SOURCE/loss` and `validation/SOURCE/bitsPerByte`.
 * @param {string} name
 */
export function titleOfLogged(name) {
  const [, source, what] = /^validation\/(.+)\/(loss|bitsPerByte)$/.exec(name) ?? []
  if (source === undefined) return { group: 'Logged', title: name, unit: '' }
  return {
    group: 'Held-out sources',
    title: source,
    unit: heldOutUnits[/** @type {keyof typeof heldOutUnits} */ (what)],
  }
}

/**
 * A number of an evaluation. The loss of pairs is in nats per pair, and shown as `preference`.
 * @param {Readonly<Record<string, number | null | undefined>>} evaluation
 * @param {string} name
 */
export function heldOut(evaluation, name) {
  const loss = evaluation['preferred'] === undefined ? 'loss' : 'preference'
  return name === loss ? evaluation['loss'] : name === 'loss' ? undefined : evaluation[name]
}

/**
 * Smooths values by an exponential moving average with bias correction. Missing values stay missing.
 * @param {ReadonlyArray<number | null>} values
 * @param {number} weight of the earlier values, from 0 to below 1
 */
export function smoothed(values, weight) {
  if (weight === 0) return values
  let mean = 0
  let share = 0
  return values.map(value => {
    if (value === null) return null
    mean = weight * mean + (1 - weight) * value
    share = weight * share + (1 - weight)
    return mean / share
  })
}

/**
 * Positions of axis labels: at 1, 2 or 5 times a power of ten, about as many as requested.
 * @param {number} least
 * @param {number} most
 * @param {number} count
 * @param {boolean} logarithmic
 */
export function ticks(least, most, count, logarithmic) {
  if (!(most > least)) return [least]
  if (logarithmic && most / least > 20) {
    const all = []
    for (let power = Math.floor(Math.log10(least)); power <= Math.log10(most); power++)
      all.push(...[1, 2, 5].map(factor => Number(`${factor}e${power}`)))
    const within = all.filter(value => value >= least && value <= most)
    const decades = within.filter(value => /^1e/.test(value.toExponential().replace('.0', '')))
    const chosen = within.length <= 1.5 * count ? within : decades
    const every = Math.ceil(chosen.length / (1.5 * count))
    return chosen.filter((_, i) => i % every === 0)
  }
  const rough = (most - least) / count
  const power = 10 ** Math.floor(Math.log10(rough))
  const step = power * (rough / power >= 7 ? 10 : rough / power >= 3.5 ? 5 : rough / power >= 1.5 ? 2 : 1)
  const all = []
  for (let i = Math.ceil(least / step - 1e-9); i * step <= most * (1 + 1e-12) || i * step <= most; i++)
    all.push(Number((i * step).toPrecision(12)))
  return all
}
