/** @file Loads of experts as people see them: shares of the mean, and shades for them. */

/** Loads over their mean: 1 for an expert that has what it would have if all had the same. */
export function shares(load) {
  const mean = load.reduce((sum, count) => sum + count, 0) / load.length
  return load.map(count => (mean > 0 ? count / mean : 0))
}

/** From -1 (a quarter of the mean, or less) over 0 (the mean) to 1 (four times, or more); null for an expert without a token. */
export function shadeOfShare(share) {
  if (share === 0) return null
  return Math.max(-1, Math.min(1, Math.log2(share) / 2))
}

/** Biases without their mean: what all experts of a layer have in common chooses none of them. */
export function centred(bias) {
  const mean = bias.reduce((sum, value) => sum + value, 0) / bias.length
  return bias.map(value => value - mean)
}

/** From -1 to 1, by the largest bias that is shown. */
export function shadeOfBias(bias, largest) {
  return largest > 0 ? bias / largest : 0
}

/** A shade as a colour. @param scale `{ low, middle, high }`, each `[red, green, blue]` */
export function colorOf(shade, { low, middle, high }) {
  const end = shade < 0 ? low : high
  const part = Math.abs(shade)
  return `rgb(${middle.map((from, i) => Math.round(from + part * (end[i] - from))).join(' ')})`
}

/** What is worth saying of a layer. */
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
