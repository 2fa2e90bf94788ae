/** @file Finds common prefixes of texts, so that each is processed once. */

/** Tokens to process together. */
export interface Row {
  readonly tokens: readonly number[]
  /** Position of the first hidden state that is needed, or Infinity. Those before may come from a shared prefix. */
  readonly from: number
  /** Indices of the texts that it is processed for. */
  readonly texts: readonly number[]
}

/** Sorts rows by tokens, and merges each row that is a prefix of another into that one. */
export function distinctRows(rows: readonly Row[]): Row[] {
  const sorted = rows.toSorted((a, b) => order(a.tokens, b.tokens))
  const result: Row[] = []
  // In this order, a row directly follows those that it is a prefix of.
  for (const row of sorted.reverse()) {
    const behind = result[result.length - 1]
    if (behind === undefined || shared(row.tokens, behind.tokens) < row.tokens.length) result.push(row)
    else {
      const both = { texts: [...behind.texts, ...row.texts], from: Math.min(behind.from, row.from) }
      result[result.length - 1] = { tokens: behind.tokens, ...both }
    }
  }
  return result.reverse()
}

/** For distinct, sorted rows: how many tokens each shares with another row, up to its first needed hidden state. 0 if it is less than a fourth of the row. */
export function sharedPrefixes(rows: readonly Row[]): number[] {
  const before = rows.map(({ tokens }, i) => (i === 0 ? 0 : shared(rows[i - 1].tokens, tokens)))
  return rows.map(({ tokens, from }, i) => {
    const prefix = Math.min(from, Math.max(before[i], before[i + 1] ?? 0))
    return 4 * prefix < tokens.length ? 0 : prefix
  })
}

/** Splits sorted rows into consecutive chunks of about `tokens` tokens, counting shared ones once. */
export function chunks(rows: readonly Row[], tokens: number): Row[][] {
  const result: Row[][] = []
  let size = Infinity
  for (const [i, row] of rows.entries()) {
    const more = row.tokens.length - (i === 0 ? 0 : shared(rows[i - 1].tokens, row.tokens))
    if (size + more > tokens) {
      result.push([])
      size = 0
    }
    result[result.length - 1].push(row)
    size += more
  }
  return result
}

/** The length of the common prefix. */
function shared(a: readonly number[], b: readonly number[]): number {
  let i = 0
  while (i < a.length && a[i] === b[i]) i++
  return i
}

function order(a: readonly number[], b: readonly number[]): number {
  const i = shared(a, b)
  return i < a.length && i < b.length ? a[i] - b[i] : a.length - b.length
}
