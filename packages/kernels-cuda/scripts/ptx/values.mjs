// Types and operands of PTX, and their C++.

/** The C++ type of each PTX type. */
export const types = {
  pred: 'bool',
  b8: 'uint8_t',
  u8: 'uint8_t',
  s8: 'int8_t',
  b16: 'uint16_t',
  u16: 'uint16_t',
  s16: 'int16_t',
  b32: 'uint32_t',
  u32: 'uint32_t',
  s32: 'int32_t',
  b64: 'uint64_t',
  u64: 'uint64_t',
  s64: 'int64_t',
  f32: 'float',
  f64: 'double',
}
export const isFloat = type => type === 'float' || type === 'double'
export const bytesOf = type => (type === 'pred' ? 1 : Number(type.slice(1)) / 8)

export function convert(value, from, to) {
  if (from === to) return value
  if (from === 'bool' || to === 'bool') throw new Error(`${value}: ${from} as ${to}`)
  return isFloat(from) || isFloat(to)
    ? `bits<${to}>(${isFloat(to) ? sized(value, from, to) : value})`
    : `(${to})${value}`
}

/** Truncates an integer register to the size of the float whose bits are read from it. */
function sized(value, from, to) {
  return isFloat(from) ? value : `(uint${to === 'float' ? 32 : 64}_t)${value}`
}

export function wider(type) {
  return type.replace(/(u?int)(\d+)_t/, (_, kind, size) => `${kind}${size * 2}_t`)
}

export function label(name) {
  return name.replaceAll('$', '')
}

/** Splits operands at commas outside of braces and brackets. */
export function splitOperands(text) {
  const operands = []
  let depth = 0
  let current = ''
  for (const character of text) {
    if ('{['.includes(character)) depth++
    if (']}'.includes(character)) depth--
    if (character === ',' && depth === 0) {
      operands.push(current.trim())
      current = ''
    } else current += character
  }
  if (current.trim() !== '') operands.push(current.trim())
  return operands
}

/** The registers of a vector operand `{a, b}`, or of a scalar one. */
export function elements(operand) {
  return operand.startsWith('{')
    ? operand
        .slice(1, -1)
        .split(',')
        .map(text => text.trim())
    : [operand]
}

/** Rounding to nearest, which is the host's rounding mode. */
export const nearest = modifier => modifier === 'rn'
