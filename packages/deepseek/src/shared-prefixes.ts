/** @file Which beginnings texts share, so that each is read once. */

/** Tokens that are read together for whoever wants to know what stands behind some of them. */
export interface Row {
  readonly tokens: readonly number[]
  /** Position of the first hidden state that is wanted, Infinity where none is: what stands before may be read elsewhere. */
  readonly from: number
  /** The texts that it is read for, by number. */
  readonly texts: readonly number[]
}

/** Rows in the order of their tokens. One that another one begins with is read with that. */
export function distinctRows(rows: readonly Row[]): Row[] {
  const sorted = rows.toSorted((a, b) => order(a.tokens, b.tokens))
  const result: Row[] = []
  // Rows that go on stand right behind the ones that they begin with.
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

/** Of each of these rows, which are distinct and in order, how many tokens another one begins with, too, and no wanted ones: 0 where that is less than a fourth. */
export function sharedPrefixes(rows: readonly Row[]): number[] {
  const before = rows.map(({ tokens }, i) => (i === 0 ? 0 : shared(rows[i - 1].tokens, tokens)))
  return rows.map(({ tokens, from }, i) => {
    const prefix = Math.min(from, Math.max(before[i], before[i + 1] ?? 0))
    return 4 * prefix < tokens.length ? 0 : prefix
  })
}

/** Runs of rows in order that have about so many tokens to read, what they share counted once. */
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

/** How many tokens both begin with. */
function shared(a: readonly number[], b: readonly number[]): number {
  let i = 0
  while (i < a.length && a[i] === b[i]) i++
  return i
}

function order(a: readonly number[], b: readonly number[]): number {
  const i = shared(a, b)
  return i < a.length && i < b.length ? a[i] - b[i] : a.length - b.length
}
