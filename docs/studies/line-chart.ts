/** @file Draws line charts as SVG, readable on light and dark pages. */

export interface Line {
  readonly label: string
  /** `[x, y]`, with increasing x. */
  readonly points: ReadonlyArray<readonly [number, number]>
}

export interface ChartOptions {
  readonly title: string
  readonly x: string
  readonly y: string
  /** Range of y. Default: the range of the points. */
  readonly range?: readonly [number, number]
}

const size = { width: 720, height: 380, left: 64, right: 190, top: 40, bottom: 48 }
const colours = ['#2f6fde', '#d9822b', '#2e9e5b', '#b0479e', '#7a7f87']

/** About five round numbers within a range. */
function ticks(low: number, high: number): number[] {
  const rough = (high - low) / 5
  const power = 10 ** Math.floor(Math.log10(rough))
  const step = power * ([1, 2, 5, 10].find(factor => factor * power >= rough) as number)
  const count = Math.floor(high / step) - Math.ceil(low / step) + 1
  return Array.from({ length: count }, (_, i) => Number(((Math.ceil(low / step) + i) * step).toPrecision(6)))
}

/** Draws lines over a common x axis. */
export function lineChart(lines: readonly Line[], options: ChartOptions): string {
  const xs = lines.flatMap(({ points }) => points.map(([x]) => x))
  const ys = lines.flatMap(({ points }) => points.map(([, y]) => y))
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)]
  const [y0, y1] = options.range ?? [Math.min(...ys), Math.max(...ys)]
  const { width, height, left, right, top, bottom } = size
  const px = (x: number) => left + ((x - x0) / (x1 - x0)) * (width - left - right)
  const py = (y: number) =>
    height - bottom - ((Math.min(Math.max(y, y0), y1) - y0) / (y1 - y0)) * (height - top - bottom)
  const text = (x: number, y: number, content: string, more = '') =>
    `<text x="${Number(x.toFixed(1))}" y="${Number(y.toFixed(1))}" ${more}>${content}</text>`
  const middle = 'text-anchor="middle"'
  const parts = [
    `<title>${options.title}</title>`,
    text(left, 22, options.title, 'font-weight="600"'),
    ...ticks(y0, y1).flatMap(y => [
      `<path d="M${left} ${py(y).toFixed(1)}H${width - right}" stroke="#8884"/>`,
      text(left - 8, py(y) + 4, `${y}`, 'text-anchor="end"'),
    ]),
    ...ticks(x0, x1).map(x => text(px(x), height - bottom + 18, `${x}`, middle)),
    text((left + width - right) / 2, height - 8, options.x, middle),
    text(
      16,
      (top + height - bottom) / 2,
      options.y,
      `${middle} transform="rotate(-90 16 ${(top + height - bottom) / 2})"`,
    ),
    ...lines.flatMap(({ label, points }, i) => {
      const path = points.map(([x, y], n) => `${n === 0 ? 'M' : 'L'}${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join('')
      const at = top + 12 + 20 * i
      return [
        `<path d="${path}" fill="none" stroke="${colours[i % colours.length]}" stroke-width="1.8"/>`,
        `<path d="M${width - right + 12} ${at - 4}h18" stroke="${colours[i % colours.length]}" stroke-width="3"/>`,
        text(width - right + 36, at, label),
      ]
    }),
  ]
  const style = 'font-family="system-ui, sans-serif" font-size="12" fill="#777"'
  return `<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 ${width} ${height}" ${style}>\n${parts.join('\n')}\n</svg>\n`
}
