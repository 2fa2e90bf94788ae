// Arithmetic and bits.
import { isFloat, nearest, types, wider } from './values.mjs'

/** `d = a op b` in the type given by the last modifier. */
function binary(expression, allowed = () => true) {
  return (kernel, modifiers, [d, a, b]) => {
    const type = types[modifiers.at(-1)]
    if (!type || !modifiers.slice(0, -1).every(allowed)) return
    return kernel.write(d, type, expression(kernel.read(a, type), kernel.read(b, type), type, modifiers))
  }
}
function unary(expression, allowed = () => true) {
  return (kernel, modifiers, [d, a]) => {
    const type = types[modifiers.at(-1)]
    if (!type || !modifiers.slice(0, -1).every(allowed)) return
    return kernel.write(d, type, expression(kernel.read(a, type), type, modifiers))
  }
}
const none = () => false
const approximate = modifier => modifier === 'approx' || modifier === 'ftz'
/** C++ promotes narrow types to int, so the result is cast back. */
const castBack = operator => (a, b, type) => `(${type})(${a} ${operator} ${b})`

export const arithmetic = {
  // Arithmetic. The host rounds to nearest; the build's options prevent contraction into fused multiply-adds.
  add: binary(castBack('+'), nearest),
  sub: binary(castBack('-'), nearest),
  mul: (kernel, modifiers, [d, a, b]) => {
    const type = types[modifiers.at(-1)]
    const [x, y] = [kernel.read(a, type), kernel.read(b, type)]
    switch (modifiers[0]) {
      case 'lo':
        return kernel.write(d, type, `(${type})(${x} * ${y})`)
      case 'hi':
        return kernel.write(d, type, `mulHi(${x}, ${y})`)
      case 'wide':
        return kernel.write(d, wider(type), `(${wider(type)})${x} * (${wider(type)})${y}`)
      default:
        return isFloat(type) && modifiers.slice(0, -1).every(nearest) ? kernel.write(d, type, `${x} * ${y}`) : undefined
    }
  },
  mad: (kernel, [part, typeName], [d, a, b, c]) => {
    const type = types[typeName]
    const [x, y] = [kernel.read(a, type), kernel.read(b, type)]
    if (part === 'lo') return kernel.write(d, type, `(${type})(${x} * ${y} + ${kernel.read(c, type)})`)
    const wide = wider(type)
    return part === 'wide'
      ? kernel.write(d, wide, `(${wide})${x} * (${wide})${y} + ${kernel.read(c, wide)}`)
      : undefined
  },
  fma: (kernel, modifiers, [d, a, b, c]) => {
    const type = types[modifiers.at(-1)]
    const operation = { 'rn.f32': '__builtin_fmaf', 'rn.f64': '__builtin_fma', 'rm.f32': 'fmaDown' }[
      modifiers.join('.')
    ]
    return operation && kernel.write(d, type, `${operation}(${[a, b, c].map(x => kernel.read(x, type)).join(', ')})`)
  },
  div: binary(
    (a, b, type) => (isFloat(type) ? `${a} / ${b}` : `divide<${type}>(${a}, ${b})`),
    modifier => ['rn', 'full', 'approx'].includes(modifier),
  ),
  rem: binary((a, b, type) => `remainder<${type}>(${a}, ${b})`, none),
  neg: unary((a, type) => (isFloat(type) ? `-${a}` : `(${type})(0 - ${a})`), none),
  abs: unary(
    (a, type) =>
      type === 'float'
        ? `__builtin_fabsf(${a})`
        : type === 'double'
          ? `__builtin_fabs(${a})`
          : `${a} < 0 ? (${type})(0 - ${a}) : ${a}`,
    none,
  ),
  min: binary((a, b, type) => `${isFloat(type) ? 'minimum' : 'smaller'}<${type}>(${a}, ${b})`, none),
  max: binary(
    (a, b, type, modifiers) =>
      modifiers.includes('NaN')
        ? `maximumOrNan(${a}, ${b})`
        : `${isFloat(type) ? 'maximum' : 'larger'}<${type}>(${a}, ${b})`,
    modifier => modifier === 'NaN',
  ),
  sqrt: unary((a, type) => `__builtin_sqrt${type === 'float' ? 'f' : ''}(${a})`, nearest),
  rcp: unary(
    (a, _, modifiers) => {
      const exact = modifiers.includes('ftz') ? `flush(1 / flush(${a}))` : `1 / ${a}`
      return modifiers.includes('approx') ? `approximately(${exact}, 0x1p-23f)` : exact
    },
    modifier => nearest(modifier) || approximate(modifier),
  ),
  rsqrt: unary(a => `approximately(1 / __builtin_sqrtf(${a}), 0x1p-22f)`, approximate),
  ex2: unary((a, _, modifiers) => (modifiers.includes('ftz') ? `flush(ex2(${a}))` : `ex2(${a})`), approximate),
  lg2: unary(a => `log2f(${a})`, approximate),
  sin: unary(a => `sinf(${a})`, approximate),
  cos: unary(a => `cosf(${a})`, approximate),
  // copysign d, a, b: the sign of a, the magnitude of b.
  copysign: binary((a, b) => `__builtin_copysignf(${b}, ${a})`, none),

  // Bits.
  and: bitwise('&', '&&'),
  or: bitwise('|', '||'),
  xor: bitwise('^', '!='),
  not: (kernel, [type], [d, a]) =>
    kernel.write(
      d,
      types[type],
      type === 'pred' ? `!${kernel.read(a, 'bool')}` : `(${types[type]})~${kernel.read(a, types[type])}`,
    ),
  shl: shift('shl'),
  shr: shift('shr'),
  bfi: (kernel, [type], [d, a, b, at, length]) =>
    kernel.write(
      d,
      types[type],
      `bfi<${types[type]}>(${kernel.read(a, types[type])}, ${kernel.read(b, types[type])}, ${kernel.read(at, 'uint32_t')}, ${kernel.read(length, 'uint32_t')})`,
    ),
  bfe: (kernel, [type], [d, a, at, length]) =>
    kernel.write(
      d,
      types[type],
      `bfe<${types[type]}>(${kernel.read(a, types[type])}, ${kernel.read(at, 'uint32_t')}, ${kernel.read(length, 'uint32_t')})`,
    ),
  popc: (kernel, [type], [d, a]) =>
    kernel.write(
      d,
      'uint32_t',
      type === 'b32'
        ? `(uint32_t)__builtin_popcount(${kernel.read(a, 'uint32_t')})`
        : `(uint32_t)__builtin_popcountll(${kernel.read(a, 'uint64_t')})`,
    ),
  clz: (kernel, [type], [d, a]) =>
    type === 'b32' ? kernel.write(d, 'uint32_t', `clz(${kernel.read(a, 'uint32_t')})`) : undefined,
  brev: (kernel, [type], [d, a]) =>
    type === 'b32' ? kernel.write(d, 'uint32_t', `brev(${kernel.read(a, 'uint32_t')})`) : undefined,
  bfind: (kernel, modifiers, [d, a]) =>
    modifiers.at(-1) === 'u32'
      ? kernel.write(d, 'uint32_t', `bfind<${modifiers[0] === 'shiftamt'}>(${kernel.read(a, 'uint32_t')})`)
      : undefined,
  prmt: (kernel, [type], [d, a, b, c]) =>
    type === 'b32'
      ? kernel.write(d, 'uint32_t', `prmt(${[a, b, c].map(x => kernel.read(x, 'uint32_t')).join(', ')})`)
      : undefined,
}

function bitwise(operator, ofPredicates) {
  return (kernel, [type], [d, a, b]) => {
    const cpp = types[type]
    const [x, y] = [kernel.read(a, cpp), kernel.read(b, cpp)]
    return kernel.write(d, cpp, type === 'pred' ? `${x} ${ofPredicates} ${y}` : `(${cpp})(${x} ${operator} ${y})`)
  }
}

function shift(name) {
  return (kernel, [type], [d, a, b]) =>
    kernel.write(
      d,
      types[type],
      `${name}<${types[type]}>(${kernel.read(a, types[type])}, ${kernel.read(b, 'uint32_t')})`,
    )
}
