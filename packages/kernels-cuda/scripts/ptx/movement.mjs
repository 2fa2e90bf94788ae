// Control flow, data movement, comparisons and conversions.
import { bytesOf, elements, isFloat, label, nearest, types } from './values.mjs'

const comparisons = { eq: '==', ne: '!=', lt: '<', le: '<=', gt: '>', ge: '>=', lo: '<', ls: '<=', hi: '>', hs: '>=' }

const spaces = ['global', 'shared', 'shared#cta', 'local', 'param', 'const']
const spaceOf = modifiers => modifiers.find(modifier => spaces.includes(modifier))?.replace('#cta', '')
const isOwn = space => space === 'param' || space === 'local'

/** Rounding modes to an integer, by modifier. */
const wholes = { rni: 'rint', rzi: 'trunc', rmi: 'floor', rpi: 'ceil' }

export const movement = {
  // Control flow.
  bra: (_, modifiers, [target]) => (modifiers.every(m => m === 'uni') ? `goto ${label(target)};` : undefined),
  ret: () => 'return;',
  // Only waits for time.
  nanosleep: () => '',
  trap: kernel => `emu::trap(${kernel.here});`,

  // Data movement.
  mov: (kernel, [type], [d, a]) => {
    if (d.startsWith('{') || a.startsWith('{')) return moveParts(kernel, type, d, a)
    return kernel.write(d, types[type], kernel.read(a, types[type]))
  },
  // Generic, global, local and parameter addresses are all host addresses here.
  cvta: (kernel, modifiers, [d, a]) => {
    const space = modifiers.at(-2)
    if (space === 'shared')
      return modifiers[0] === 'to'
        ? kernel.write(d, 'uint64_t', `${kernel.read(a, 'uint64_t')} - (uintptr_t)window`)
        : kernel.write(d, 'uint64_t', `(uintptr_t)window + ${kernel.read(a, 'uint32_t')}`)
    return ['global', 'local', 'param', 'const'].includes(space)
      ? kernel.write(d, 'uint64_t', kernel.read(a, 'uint64_t'))
      : undefined
  },
  ld: (kernel, modifiers, [d, address]) => {
    const space = spaceOf(modifiers)
    const type = types[modifiers.at(-1)]
    const targets = elements(d)
    const load = `${isOwn(space) ? 'loadOwn' : 'load'}<${type}, ${targets.length}>(${kernel.address(address, space)})`
    // Uses a cache that is not coherent with writes of the launch.
    const check = modifiers.includes('nc')
      ? `emu::checkConstant(${kernel.address(address, space)}, sizeof(${type}) * ${targets.length}, ${kernel.here}); `
      : ''
    if (targets.length === 1) return check + kernel.write(d, type, `${load}.v[0]`)
    return `{ ${check}const auto loaded = ${load}; ${targets.map((target, i) => kernel.write(target, type, `loaded.v[${i}]`)).join(' ')} }`
  },
  st: (kernel, modifiers, [address, a]) => {
    const space = spaceOf(modifiers)
    const type = types[modifiers.at(-1)]
    const values = elements(a).map(value => kernel.read(value, type))
    return `${isOwn(space) ? 'storeOwn' : 'store'}<${type}, ${values.length}>(${kernel.address(address, space)}, {{${values.join(', ')}}});`
  },
  selp: (kernel, [type], [d, a, b, p]) =>
    kernel.write(
      d,
      types[type],
      `${kernel.read(p, 'bool')} ? ${kernel.read(a, types[type])} : ${kernel.read(b, types[type])}`,
    ),
  setp: (kernel, modifiers, [d, a, b]) => {
    if (modifiers.length !== 2 || d.includes('|')) return
    const [comparison, typeName] = modifiers
    const type = types[typeName]
    const [x, y] = [kernel.read(a, type), kernel.read(b, type)]
    if (comparison === 'nan' || comparison === 'num')
      return kernel.write(
        d,
        'bool',
        comparison === 'nan' ? `${x} != ${x} || ${y} != ${y}` : `${x} == ${x} && ${y} == ${y}`,
      )
    if (comparisons[comparison]) {
      // Ordered inequality is false for NaN.
      const ordered = isFloat(type) && comparison === 'ne' ? ` && ${x} == ${x} && ${y} == ${y}` : ''
      return kernel.write(d, 'bool', `${x} ${comparisons[comparison]} ${y}${ordered}`)
    }
    const unordered = comparison.match(/^(\w\w)u$/)
    if (!unordered || !isFloat(type)) return
    return kernel.write(d, 'bool', `${x} != ${x} || ${y} != ${y} || ${x} ${comparisons[unordered[1]]} ${y}`)
  },
  cvt: (kernel, modifiers, [d, a, b]) => convertTypes(kernel, modifiers, d, a, b),
}

/** mov.b32 and mov.b64 that pack or unpack several registers, lowest first. */
function moveParts(kernel, type, d, a) {
  const wide = types[type]
  const parts = elements(d.startsWith('{') ? d : a)
  const size = (bytesOf(type) * 8) / parts.length
  const narrow = `uint${size}_t`
  if (d.startsWith('{')) {
    const whole = kernel.read(a, wide)
    return `{ const ${wide} whole = ${whole}; ${parts.map((part, i) => kernel.write(part, narrow, `(${narrow})(whole >> ${i * size})`)).join(' ')} }`
  }
  return kernel.write(
    d,
    wide,
    parts.map((part, i) => `(${wide})${kernel.read(part, narrow)} << ${i * size}`).join(' | '),
  )
}

function convertTypes(kernel, modifiers, d, a, b) {
  const form = modifiers.join('.')
  if (form === 'rn.bf16x2.f32')
    return kernel.write(d, 'uint32_t', `toBf16x2(${kernel.read(a, 'float')}, ${kernel.read(b, 'float')})`)
  if (form === 'rn.satfinite.e4m3x2.f32')
    return kernel.write(d, 'uint16_t', `toE4m3x2(${kernel.read(a, 'float')}, ${kernel.read(b, 'float')})`)
  if (form === 'rn.f16x2.e4m3x2') return kernel.write(d, 'uint32_t', `halvesOfE4m3x2(${kernel.read(a, 'uint16_t')})`)
  if (form === 'f32.f16') return kernel.write(d, 'float', `fromHalf(${kernel.read(a, 'uint16_t')})`)
  if (form === 'rn.f16.f32') return kernel.write(d, 'uint16_t', `toHalf(${kernel.read(a, 'float')})`)
  if (form === 'rn.bf16.f32') return kernel.write(d, 'uint16_t', `toBf16(${kernel.read(a, 'float')})`)
  if (form === 'sat.f32.f32') return kernel.write(d, 'float', `saturate(${kernel.read(a, 'float')})`)
  const [to, from] = [types[modifiers.at(-2)], types[modifiers.at(-1)]]
  const rounding = modifiers.slice(0, -2)
  if (!to || !from || rounding.length > 1) return
  const value = kernel.read(a, from)
  const suffix = from === 'float' ? 'f' : ''
  if (isFloat(from) && wholes[rounding[0]]) {
    const whole = `__builtin_${wholes[rounding[0]]}${suffix}(${value})`
    return kernel.write(d, to, isFloat(to) ? whole : `toInteger<${to}>(${whole})`)
  }
  if (isFloat(from) && !isFloat(to)) return
  // Conversions to float, to a wider type, or between integers are those of C++.
  return rounding.every(nearest) ? kernel.write(d, to, `(${to})(${value})`) : undefined
}
