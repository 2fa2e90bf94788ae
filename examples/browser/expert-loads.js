/** @file Draws the expert loads of each layer as a row of cells: no tokens is blue, the mean has no colour, twice the mean is red. */

/** @param layers `layers` of a `loads` event */
export function drawLoads(element, layers) {
  element.replaceChildren(
    ...layers.flatMap(({ name, load }) => {
      const mean = load.reduce((sum, count) => sum + count, 0) / load.length
      const cells = load.map((count, expert) => {
        const cell = document.createElement('i')
        cell.style.background = colour(count / mean)
        cell.title = `expert ${expert}: ${(count / mean).toFixed(2)} of the mean`
        return cell
      })
      const label = document.createElement('span')
      label.textContent = name.replace('layers.', 'layer ')
      const row = document.createElement('div')
      row.setAttribute('role', 'img')
      row.setAttribute('aria-label', load.map(count => (count / mean).toFixed(2)).join(', '))
      row.append(...cells)
      const busiest = document.createElement('span')
      busiest.className = 'faint'
      busiest.textContent = `MaxVio ${(Math.max(...load) / mean - 1).toFixed(2)}`
      return [label, row, busiest]
    }),
  )
}

function colour(share) {
  const away = Math.min(1, Math.abs(share - 1))
  return `color-mix(in oklab, ${share < 1 ? '#2166ac' : '#b2182b'} ${(100 * away).toFixed(0)}%, var(--grid))`
}
