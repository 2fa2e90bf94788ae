/** @file Converts expert loads to shares of the mean, and to shades. */

/** Loads divided by their mean: 1 for an expert with a balanced load. */
export function shares(load) {
  const mean = load.reduce((sum, count) => sum + count, 0) / load.length
  return load.map(count => (mean > 0 ? count / mean : 0))
}

/**
 * Shade of a share: from -1 (a quarter of the mean or less) through 0 (the mean) to 1 (four times the mean or more);
 * null for an expert without tokens.
 */
export function shadeOfShare(share) {
  if (share === 0) return null
  return Math.max(-1, Math.min(1, Math.log2(share) / 2))
}

/** Biases minus their mean, which does not affect the selection. */
export function centred(bias) {
  const mean = bias.reduce((sum, value) => sum + value, 0) / bias.length
  return bias.map(value => value - mean)
}

/** Shade of a bias: from -1 to 1, relative to the largest bias shown. */
export function shadeOfBias(bias, largest) {
  return largest > 0 ? bias / largest : 0
}

/** The color of a shade. @param scale `{ low, middle, high }`, each `[red, green, blue]` */
export function colorOf(shade, { low, middle, high }) {
  const end = shade < 0 ? low : high
  const part = Math.abs(shade)
  return `rgb(${middle.map((from, i) => Math.round(from + part * (end[i] - from))).join(' ')})`
}

/** Summary of a layer's loads. */
export function summaryOf({ load, dropped, bias }) {
  const of = shares(load)
  const busiest = of.indexOf(Math.max(...of))
  const idlest = of.indexOf(Math.min(...of))
  const choices = load.reduce((sum, count) => sum + count, 0)
  return {
    maxVio: of[busiest] - 1,
    busiest,
    idlest,
    least: of[idlest],
    dead: load.flatMap((count, expert) => (count === 0 ? [expert] : [])),
    dropped: dropped === undefined || choices === 0 ? null : dropped / choices,
    bias: bias ? [Math.min(...bias), Math.max(...bias)] : null,
  }
}
