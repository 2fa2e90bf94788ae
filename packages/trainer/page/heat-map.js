/** @file A heat map that can be read with the pointer and with arrow keys. */
import { element } from './charts.js'
import { colorOf } from './loads.js'

export class HeatMap {
  #canvas
  #tip
  #cells = element('canvas', '')
  #what = null
  #places = null
  /** The described cell, `[column, row]`, or null. */
  #at = null
  #observer

  /** @param choose called with a cell that was clicked, or on which Enter was pressed */
  constructor(label, choose) {
    this.#canvas = element('canvas', '')
    this.#canvas.tabIndex = 0
    this.#canvas.setAttribute('role', 'img')
    this.label = label
    this.#tip = element('div', 'tip')
    this.#tip.setAttribute('role', 'status')
    this.#tip.hidden = true
    this.element = element('div', 'map', this.#canvas, this.#tip)
    this.#observer = new ResizeObserver(() => this.#paint())
    this.#observer.observe(this.element)
    this.#canvas.onpointermove = event => this.#describe(this.#cellAt(event))
    this.#canvas.onpointerleave = () => this.#describe(null)
    this.#canvas.onblur = () => this.#describe(null)
    this.#canvas.onclick = event => {
      const cell = this.#cellAt(event)
      if (cell) choose(...cell)
    }
    this.#canvas.onkeydown = event => {
      const { columns, rows } = this.#what ?? { columns: [], rows: [] }
      if (columns.length === 0) return
      const [column, row] = this.#at ?? [columns.length - 1, 0]
      const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }
      const move = moves[event.key]
      if (event.key === 'Enter' && this.#at) choose(column, row)
      else if (event.key === 'Escape') this.#describe(null)
      else if (move && !this.#at) this.#describe([column, row])
      else if (move) {
        const within = (value, length) => Math.max(0, Math.min(length - 1, value))
        this.#describe([within(column + move[0], columns.length), within(row + move[1], rows.length)])
      } else return
      event.preventDefault()
    }
  }

  /**
   * Draws `{ columns, rows, shade, describe, left, below, height, marked, theme }`. `columns` and `rows` contain the
   * end of each column and row, from 0 to 1, with gaps before those in `columns.gaps` and `rows.gaps`. `shade(column,
   * row)` returns a number from -1 to 1, null for a dead expert, or undefined for nothing. `describe` returns lines of
   * text about a cell. `left` and `below` contain labels, `[position, text]`.
   */
  draw(what) {
    this.#what = what
    this.#canvas.setAttribute(
      'aria-label',
      `${this.label}. ${what.summary} Use the arrow keys to read single cells, or the table below.`,
    )
    const described = this.#at
    this.#at = null
    this.#paint()
    if (described) this.#describe(described)
  }

  /** Computes the layout in CSS pixels. */
  #layOut() {
    const { columns, rows, left, below, height } = this.#what
    const width = this.element.clientWidth
    const x = Math.max(2, ...left.map(([, text]) => 7 * text.length + 10))
    const frame = { width, height, x, y: 2, right: width - 2, bottom: height - (below.length > 0 ? 22 : 2) }
    const parts = (ends, from, to) => {
      const place = ends.map(end => Math.round(from + end * (to - from)))
      return ends.map((_, i) => {
        const begin = i === 0 ? from : place[i - 1]
        const gap = place[i] - begin > 4 ? 1 : 0
        const start = begin + (ends.gaps?.has(i) ? 2 : 0)
        return [start, Math.max(1, place[i] - gap - start)]
      })
    }
    this.#places = {
      ...frame,
      columns: parts(columns, frame.x, frame.right),
      rows: parts(rows, frame.y, frame.bottom),
    }
  }

  /** Left, top, width and height of a cell. */
  #box(column, row) {
    const { columns, rows } = this.#places
    const [[x, w], [y, h]] = [columns[column], rows[row]]
    return [x, y, w, h]
  }

  /** Draws all cells and labels into a buffer, which is kept until the content changes. */
  #paint() {
    if (!this.#what || this.element.clientWidth === 0) return
    this.#layOut()
    const { columns, rows, shade, left, below, theme } = this.#what
    const { width, height, x, y: top, bottom, right } = this.#places
    const c = sized(this.#cells, width, height)
    for (let row = 0; row < rows.length; row++) {
      for (let column = 0; column < columns.length; column++) {
        const value = shade(column, row)
        if (value === undefined) continue
        const box = this.#box(column, row)
        c.fillStyle = value === null ? theme.dead : colorOf(value, theme.scale)
        c.fillRect(...box)
        if (value === null) cross(c, box, theme.card)
      }
    }
    c.font = '12px system-ui, "DejaVu Sans", sans-serif'
    c.fillStyle = theme.faint
    c.textBaseline = 'middle'
    c.textAlign = 'right'
    let free = Number.NEGATIVE_INFINITY
    for (const [at, text] of left) {
      const y = Math.max(top + 6, Math.min(bottom - 6, top + at * (bottom - top)))
      if (y - free < 13) continue
      free = y
      c.fillText(text, x - 6, y)
    }
    c.textAlign = 'center'
    for (const [at, text] of below) {
      const half = c.measureText(text).width / 2
      const place = x + at * (right - x)
      if (place >= x) c.fillText(text, Math.max(x + half, Math.min(right - half, place)), bottom + 12)
    }
    this.#mark()
  }

  /** Shows the map, with frames around the marked and the described cells. */
  #mark() {
    const { marked = {}, theme } = this.#what
    const { width, height, x, y, bottom, right } = this.#places
    this.#canvas.style.height = `${height}px`
    const c = sized(this.#canvas, width, height)
    c.drawImage(this.#cells, 0, 0, width, height)
    c.strokeStyle = theme.text
    c.lineWidth = 2
    if (marked.row !== undefined) {
      const [, y0, , h] = this.#box(0, marked.row)
      c.strokeRect(x - 1, y0 - 1, right - x + 1, h + 2)
    }
    if (marked.column !== undefined) {
      const [x0, , w] = this.#box(marked.column, 0)
      c.strokeRect(x0 - 1, y - 1, w + 2, bottom - y + 2)
    }
    if (this.#at) {
      const [x0, y0, w, h] = this.#box(...this.#at)
      c.strokeRect(x0 - 1, y0 - 1, w + 2, h + 2)
    }
  }

  #cellAt({ offsetX, offsetY }) {
    if (!this.#places) return null
    const { columns, rows } = this.#what
    const { x, y, right, bottom } = this.#places
    const column = columns.findIndex(end => (offsetX - x) / (right - x) < end)
    const row = rows.findIndex(end => (offsetY - y) / (bottom - y) < end)
    return offsetX < x || offsetY < y || column < 0 || row < 0 ? null : [column, row]
  }

  #describe(cell) {
    if (!this.#places) return
    const { columns, rows, describe } = this.#what
    const there = cell && cell[0] < columns.length && cell[1] < rows.length
    this.#at = there ? cell : null
    this.#tip.hidden = !there
    this.#mark()
    if (!there) return
    const [first, ...rest] = describe(...cell)
    this.#tip.replaceChildren(element('b', '', first), ...rest.map(line => element('div', '', line)))
    const [x0, y0, w, h] = this.#box(...cell)
    const { width } = this.#places
    const beside = x0 + w / 2 > width / 2
    this.#tip.style.left = beside ? '' : `${x0 + w + 8}px`
    this.#tip.style.right = beside ? `${width - x0 + 8}px` : ''
    this.#tip.style.top = `${y0 + h / 2}px`
  }
}

/** Resizes a canvas to a size in CSS pixels. @returns its context */
function sized(canvas, width, height) {
  const scale = devicePixelRatio || 1
  canvas.width = Math.round(width * scale)
  canvas.height = Math.round(height * scale)
  const context = canvas.getContext('2d')
  context.scale(scale, scale)
  return context
}

/** Marks a dead expert independently of color. */
function cross(c, [x, y, w, h], color) {
  const size = Math.min(w, h, 12)
  if (size < 4) return
  c.strokeStyle = color
  c.lineWidth = 1.5
  const [cx, cy, r] = [x + w / 2, y + h / 2, size / 2 - 1]
  c.beginPath()
  c.moveTo(cx - r, cy - r)
  c.lineTo(cx + r, cy + r)
  c.moveTo(cx + r, cy - r)
  c.lineTo(cx - r, cy + r)
  c.stroke()
}
