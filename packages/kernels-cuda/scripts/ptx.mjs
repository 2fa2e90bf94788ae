// From PTX, as nvcc writes it, to C++ that the emulator runs: so what is tested is what the device's compiler made of the kernels. Every
// instruction becomes one statement of `emulator/ptx.h`'s words, registers become variables, labels stay labels, and what lanes, warps and
// warpgroups do together is asked of the runtime. An instruction that is not known here is an error, not a guess. Plain Node >= 20.
//
// References are to "Parallel Thread Execution ISA", 9.0.
import { basename } from 'node:path'

/** C++ types of PTX's. */
const types = {
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
const isFloat = type => type === 'float' || type === 'double'
const bytesOf = type => (type === 'pred' ? 1 : Number(type.slice(1)) / 8)

/**
 * @param {string} text of a module
 * @param {{ module: string, file: string }} names the module's, and that of the PTX for messages
 * @returns {string} C++
 */
export function translate(text, { module, file }) {
  const lines = text.split('\n')
  const files = new Map()
  for (const line of lines) {
    const found = line.match(/^\t\.file\t(\d+) "([^"]+)"/)
    if (found) files.set(found[1], basename(found[2]))
  }
  const out = [
    '#include "ptx.h"',
    'using namespace ptx;',
    `static const char* const here = ${JSON.stringify(file)};`,
    'namespace {',
  ]
  const globals = { shared: new Map(), dynamic: new Set(), constants: new Set() }
  for (let at = 0; at < lines.length; at++) {
    const line = lines[at]
    const entry = line.match(/^\.visible \.entry (\w+)\(/)
    if (entry) {
      // Inline assembly has closing braces of its own.
      const next = lines.findIndex((other, i) => i > at && /^(\.visible \.entry|\t\.section)/.test(other))
      const end = lines.lastIndexOf('}', next === -1 ? lines.length : next)
      out.push(...new Kernel({ module, file, files, globals }).translate(entry[1], lines.slice(at, end), at + 1))
      at = end
      continue
    }
    const variable = line.match(
      /^\s*(?:\.visible |\.extern |\.weak )?\.(shared|const|global) \.align (\d+) \.(\w+) ([\w$]+)(?:\[(\d*)\])?(?: = \{([^}]*)\})?;/,
    )
    if (variable) out.push(...declareGlobal(variable, line, globals))
    else if (/^\s*\.(shared|const|global|func|extern|visible|weak)/.test(line))
      throw new Error(`${file}:${at + 1}: not known: ${line}`)
  }
  return `${[...out, '}'].join('\n')}\n`
}

function declareGlobal([, space, align, type, name, count, values], line, globals) {
  if (space === 'shared') {
    if (line.includes('.extern')) globals.dynamic.add(name)
    else globals.shared.set(name, { align, bytes: Number(count ?? 1) * bytesOf(type) })
    return []
  }
  globals.constants.add(name)
  return [`alignas(${align}) static const ${types[type]} ${name}[] = {${values ?? ''}};`]
}

class Kernel {
  constructor({ module, file, files, globals }) {
    Object.assign(this, { module, file, files, globals })
    /** Type of each register by its name, innermost block last. */
    this.scopes = [new Map()]
    this.shared = new Map(globals.shared)
    this.used = new Set()
    this.parameters = []
    this.local = new Set()
  }

  /** Lines of C++ of the kernel whose text begins in line `first` of the file. */
  translate(name, lines, first) {
    const body = []
    let maxThreads = 1024
    let where = ''
    let open = false
    for (let i = 0; i < lines.length; i++) {
      this.line = first + i
      const line = lines[i].replace(/\/\/.*/, '').trim()
      if (line === '') continue
      if (!open) {
        if (line === '{') open = true
        else if (line.startsWith('.param')) this.declareParameter(line)
        else if (line.startsWith('.maxntid'))
          maxThreads = line.match(/\d+/g).reduce((product, n) => product * Number(n), 1)
        else if (!/^(\.visible|\)|\.minnctapersm|\.maxnreg|\.reqntid)/.test(line)) this.fail(line)
        continue
      }
      const loc = line.match(/^\.loc\s+(\d+)\s+(\d+)/)
      if (loc) {
        // Line 0 is nobody's.
        const place = loc[2] === '0' ? '' : `#line ${loc[2]} "${this.files.get(loc[1])}"`
        if (place !== '' && place !== where) body.push(place)
        where = place || where
        continue
      }
      if (line.startsWith('.pragma')) continue
      // Instructions of inline assembly may share a line.
      for (const part of line.match(/[^;{}]*\{[^;]*;|[^;{}]+;|[{}]|[^;{}]+:|\S+/g).map(text => text.trim()))
        body.push(this.statement(part))
    }
    const types = this.parameters.map(p => `{'${p.letter}', ${p.count}, ${p.size}, ${p.align}}`)
    const shared = [...this.used].flatMap(variable => {
      const { align, bytes } = this.shared.get(variable)
      return [
        `static emu::SharedSlot ${variable}_slot;`,
        `const uint32_t ${variable} = emu::sharedAddress(emu::sharedArray(&${variable}_slot, ${bytes}, ${align}, "${variable}"));`,
      ]
    })
    const copied = this.addressed
      ? [`alignas(128) char parameters[${this.parameterBytes}];`, `memcpy(parameters, packed, ${this.parameterBytes});`]
      : ['const char* const parameters = packed;']
    return [
      `void ${name}(const char* packed) {`,
      '[[maybe_unused]] char* const window = sharedWindow();',
      ...copied,
      ...shared,
      ...(this.usesDynamic ? ['const uint32_t dynamicShared = emu::sharedAddress(emu::dynamicShared());'] : []),
      ...body,
      '}',
      `const emu::Parameter ${name}_parameters[] = {${[...types, '{0, 0, 0, 0}'].join(', ')}};`,
      `Registration ${name}_registration("${this.module}", "${name}", here, ${maxThreads}, ${name}_parameters, ${name});`,
    ]
  }

  fail(what) {
    throw new Error(`${this.file}:${this.line}: not known: ${what}`)
  }

  declareParameter(line) {
    const [, align, type, name, count] =
      line.match(/^\.param (?:\.align (\d+) )?\.(\w+)(?: \.ptr)?(?: \.align \d+)? (\w+)(?:\[(\d+)\])?,?$/) ??
      this.fail(line)
    const bytes = bytesOf(type) * Number(count ?? 1)
    const alignment = Number(align ?? bytesOf(type))
    const start = Math.ceil((this.parameterBytes ?? 0) / alignment) * alignment
    this.parameterBytes = start + bytes
    // PTX does not tell pointers from integers, nor the elements of an array.
    const letter = count !== undefined ? 'b' : type === 'f32' ? 'f' : bytes === 8 ? 'l' : 'i'
    this.parameters.push({ name, letter, count: Number(count ?? 0), size: bytes, align: alignment, start })
  }

  // --- Operands ---

  typeOf(register) {
    for (let i = this.scopes.length - 1; i >= 0; i--) {
      const type = this.scopes[i].get(register)
      if (type !== undefined) return type
    }
    return undefined
  }

  name(register) {
    return register.replace(/^%/, '')
  }

  /** The operand's value as an expression of the C++ type. */
  read(operand, type) {
    const declared = this.typeOf(operand)
    if (declared !== undefined) return convert(this.name(operand), declared, type)
    const special = operand.match(/^%(tid|ntid|ctaid|nctaid)\.([xyz])$/)
    if (special)
      return `(${type})${{ tid: 'threadIdx', ntid: 'blockDim', ctaid: 'blockIdx', nctaid: 'gridDim' }[special[1]]}.${special[2]}`
    // Time stands still.
    if (operand === '%globaltimer_lo') return `(${type})0`
    if (/^0f[0-9A-F]{8}$/i.test(operand))
      return convert(`0x${operand.slice(2)}u`, 'uint32_t', type === 'float' ? type : this.fail(operand))
    if (/^0d[0-9A-F]{16}$/i.test(operand))
      return convert(`0x${operand.slice(2)}ull`, 'uint64_t', type === 'double' ? type : this.fail(operand))
    if (/^-?(\d+|0x[0-9a-f]+)$/i.test(operand)) {
      if (isFloat(type)) this.fail(`${operand} as ${type}`)
      // The least of 64 bits is no literal of C++.
      return `(${type})${BigInt.asUintN(64, BigInt(operand))}ull`
    }
    return `(${type})${this.symbol(operand)}`
  }

  symbol(name) {
    if (this.shared.has(name)) {
      this.used.add(name)
      return name
    }
    if (this.globals.dynamic.has(name)) {
      this.usesDynamic = true
      return 'dynamicShared'
    }
    if (this.globals.constants.has(name) || this.local.has(name)) return `(uintptr_t)${name}`
    const parameter = this.parameters.find(p => p.name === name)
    if (!parameter) this.fail(name)
    this.addressed = true
    return `(uintptr_t)(parameters + ${parameter.start})`
  }

  /** Assigns an expression of the C++ type. */
  write(register, type, value) {
    if (register === '_') return `(void)(${value});`
    const declared = this.typeOf(register) ?? this.fail(register)
    return `${this.name(register)} = ${convert(`(${value})`, type, declared)};`
  }

  /** Where `[a+8]` points, as a pointer of the host. */
  address(operand, space) {
    const [, base, offset = '0'] = operand.match(/^\[\s*([%\w$]+)(?:\+(-?\d+))?\s*\]$/) ?? this.fail(operand)
    const parameter = space === 'param' && this.parameters.find(p => p.name === base)
    if (parameter) return `parameters + ${parameter.start + Number(offset)}`
    if (space === 'shared') return `window + (uint32_t)(${this.read(base, 'uint32_t')} + ${offset})`
    return `(char*)(${this.read(base, 'uint64_t')} + ${offset}ll)`
  }

  // --- Statements ---

  statement(part) {
    if (part === '{') {
      this.scopes.push(new Map())
      return '{'
    }
    if (part === '}') {
      this.scopes.pop()
      return '}'
    }
    if (part.endsWith(':')) return `${label(part.slice(0, -1))}:;`
    const text = part.replace(/;$/, '').trim()
    if (text.startsWith('.')) return this.declare(text)
    const [, negated, predicate, opcode, rest = ''] =
      text.match(/^(?:@(!?)(\S+)\s+)?([\w.:]+)(?:\s+([\s\S]*))?$/) ?? this.fail(part)
    const [operation, ...modifiers] = opcode.replaceAll('::', '#').split('.')
    const handler = instructions[operation] ?? this.fail(part)
    const statement = handler(this, modifiers, splitOperands(rest), part)
    if (statement === undefined) this.fail(part)
    return predicate === undefined ? statement : `if (${negated}${this.read(predicate, 'bool')}) { ${statement} }`
  }

  declare(text) {
    const registers = text.match(/^\.reg \.(\w+)\s+(%?\w+)(?:<(\d+)>)?$/)
    if (registers) {
      const [, type, name, count] = registers
      const names = count === undefined ? [name] : Array.from({ length: Number(count) }, (_, i) => `${name}${i}`)
      for (const each of names) this.scopes.at(-1).set(each, types[type] ?? this.fail(text))
      return `[[maybe_unused]] ${types[type]} ${names.map(each => this.name(each)).join(', ')};`
    }
    const variable = text.match(/^\.(shared|local) \.align (\d+) \.(\w+)\s+([\w$]+)(?:\[(\d+)\])?$/)
    if (!variable) this.fail(text)
    const [, space, align, type, name, count = '1'] = variable
    const bytes = Number(count) * bytesOf(type)
    if (space === 'local') {
      this.local.add(name)
      return `alignas(${align}) char ${name}[${bytes}];`
    }
    this.shared.set(name, { align, bytes })
    return ''
  }

  /** `file, line` of this instruction, by which the runtime knows whether threads meet at the same one. */
  get here() {
    return `here, ${this.line}`
  }
}

function convert(value, from, to) {
  if (from === to) return value
  if (from === 'bool' || to === 'bool') throw new Error(`${value}: ${from} as ${to}`)
  return isFloat(from) || isFloat(to)
    ? `bits<${to}>(${isFloat(to) ? sized(value, from, to) : value})`
    : `(${to})${value}`
}

/** Bits of a float come from a register of its size. */
function sized(value, from, to) {
  return isFloat(from) ? value : `(uint${to === 'float' ? 32 : 64}_t)${value}`
}

function label(name) {
  return name.replaceAll('$', '')
}

/** Operands, with those in braces or brackets whole. */
function splitOperands(text) {
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

/** Registers of `{a, b}`, or the one alone. */
function elements(operand) {
  return operand.startsWith('{')
    ? operand
        .slice(1, -1)
        .split(',')
        .map(text => text.trim())
    : [operand]
}

// --- Instructions: (kernel, modifiers, operands) => a statement, or undefined for what is not known ---

const comparisons = { eq: '==', ne: '!=', lt: '<', le: '<=', gt: '>', ge: '>=', lo: '<', ls: '<=', hi: '>', hs: '>=' }

/** `d = a op b`, in the type of the last modifier. */
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
const nearest = modifier => modifier === 'rn'
const none = () => false
const approximate = modifier => modifier === 'approx' || modifier === 'ftz'
/** Narrow types are promoted by C++ and come back. */
const arithmetic = operator => (a, b, type) => `(${type})(${a} ${operator} ${b})`

const spaces = ['global', 'shared', 'shared#cta', 'local', 'param', 'const']
const spaceOf = modifiers => modifiers.find(modifier => spaces.includes(modifier))?.replace('#cta', '')
const isOwn = space => space === 'param' || space === 'local'

const shuffles = { idx: 'Index', bfly: 'Xor', up: 'Up', down: 'Down' }

/** Roundings to a whole number. */
const wholes = { rni: 'rint', rzi: 'trunc', rmi: 'floor', rpi: 'ceil' }

const instructions = {
  // Control.
  bra: (_, modifiers, [target]) => (modifiers.every(m => m === 'uni') ? `goto ${label(target)};` : undefined),
  ret: () => 'return;',
  // A wait for time alone.
  nanosleep: () => '',
  trap: kernel => `emu::trap(${kernel.here});`,

  // Data.
  mov: (kernel, [type], [d, a]) => {
    if (d.startsWith('{') || a.startsWith('{')) return moveParts(kernel, type, d, a)
    return kernel.write(d, types[type], kernel.read(a, types[type]))
  },
  // Global, local and parameter addresses are generic ones here, and all are the host's.
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
    // By way of a cache that does not see what is written meanwhile.
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
      // Unequal in order: not so where one is not a number.
      const ordered = isFloat(type) && comparison === 'ne' ? ` && ${x} == ${x} && ${y} == ${y}` : ''
      return kernel.write(d, 'bool', `${x} ${comparisons[comparison]} ${y}${ordered}`)
    }
    const unordered = comparison.match(/^(\w\w)u$/)
    if (!unordered || !isFloat(type)) return
    return kernel.write(d, 'bool', `${x} != ${x} || ${y} != ${y} || ${x} ${comparisons[unordered[1]]} ${y}`)
  },
  cvt: (kernel, modifiers, [d, a, b]) => convertTypes(kernel, modifiers, d, a, b),

  // Arithmetic. The host rounds to nearest, and contracts nothing (the build says so).
  add: binary(arithmetic('+'), nearest),
  sub: binary(arithmetic('-'), nearest),
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
  // copysign d, a, b: the sign of a, the size of b.
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

  // Threads of a block.
  bar: (kernel, modifiers, operands) => {
    const form = modifiers.join('.')
    if (form === 'warp.sync') return `emu::warpBarrier(${kernel.read(operands[0], 'uint32_t')}, ${kernel.here});`
    // Warps may come to it at different instructions ("bar": only the threads of a warp must execute the same one).
    if (form === 'sync' && operands.length === 1 && operands[0] === '0') return 'emu::barrier(here, 0);'
    if (form === 'sync' && operands.length === 2)
      return `syncNamed(${kernel.read(operands[0], 'uint32_t')}, ${kernel.read(operands[1], 'uint32_t')}, ${kernel.here});`
    const reduction = { 'red.or.pred': 'Or', 'red.and.pred': 'And', 'red.popc.u32': 'Count' }[form]
    if (!reduction || operands[1] !== '0') return
    const result = `emu::barrierReduce(emu::barrier${reduction}, ${kernel.read(operands[2], 'bool')}, ${kernel.here})`
    return reduction === 'Count'
      ? kernel.write(operands[0], 'uint32_t', `(uint32_t)${result}`)
      : kernel.write(operands[0], 'bool', `${result} != 0`)
  },
  // The runtime runs one thread at a time.
  membar: () => '',
  fence: (_, modifiers) => {
    const form = modifiers.join('.')
    if (form === 'proxy.async.shared#cta') return 'emu::fenceProxyAsync();'
    return form === 'mbarrier_init.release.cluster' ? 'emu::fenceBarrierInit();' : undefined
  },
  atom: (kernel, modifiers, [d, address, a]) => {
    const [space, operation, type] = modifiers.filter(modifier => modifier !== 'relaxed' && modifier !== 'gpu')
    const kind = {
      'add.u32': 'AddKind',
      'max.s32': 'MaxSigned',
      'max.u32': 'MaxKind',
      'min.s32': 'MinSigned',
      'min.u32': 'MinKind',
    }[`${operation}.${type}`]
    return (
      kind &&
      kernel.write(
        d,
        'uint32_t',
        `emu::atomic(emu::atomic${kind}, ${kernel.address(address, space)}, ${kernel.read(a, 'uint32_t')}, 0)`,
      )
    )
  },

  // Lanes of a warp.
  shfl: (kernel, [sync, kind, type], [d, a, b, c, mask]) => {
    if (sync !== 'sync' || type !== 'b32' || !shuffles[kind]) return
    const [value, inside] = d.split('|')
    const arguments_ = [a, b, c, mask].map(x => kernel.read(x, 'uint32_t')).join(', ')
    return `{ const auto got = ptx::shuffle(emu::shuffle${shuffles[kind]}, ${arguments_}, ${kernel.here}); ${kernel.write(value, 'uint32_t', 'got.value')} ${inside ? kernel.write(inside, 'bool', 'got.inside') : ''} }`
  },
  vote: (kernel, modifiers, [d, a, mask]) => {
    const votes = `emu::ballot(${kernel.read(mask, 'uint32_t')}, ${kernel.read(a, 'bool')}, ${kernel.here})`
    switch (modifiers.join('.')) {
      case 'sync.ballot.b32':
        return kernel.write(d, 'uint32_t', votes)
      case 'sync.any.pred':
        return kernel.write(d, 'bool', `${votes} != 0`)
      case 'sync.all.pred':
        return kernel.write(d, 'bool', `${votes} == ${kernel.read(mask, 'uint32_t')}`)
    }
  },
  ldmatrix: (kernel, modifiers, [d, address]) => {
    const form = modifiers.join('.')
    const transposed = form.includes('.trans')
    if (form.replace('.trans', '') !== 'sync.aligned.m8n8.x4.shared.b16') return
    const loaded = `emu::loadMatrices(${kernel.address(address, 'shared')}, ${transposed}, ${kernel.here})`
    return `{ const auto loaded = ${loaded}; ${elements(d)
      .map((x, i) => kernel.write(x, 'uint32_t', `loaded.v[${i}]`))
      .join(' ')} }`
  },
  mma: (kernel, modifiers, [d, a, b, c]) => {
    const multiply = {
      'sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32': 'mmaBf16',
      'sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32': 'mmaTf32',
    }[modifiers.join('.')]
    if (!multiply) return
    const list = (operand, type) =>
      elements(operand)
        .map(x => kernel.read(x, type))
        .join(', ')
    const sums = `emu::${multiply}({{${list(c, 'float')}}}, {{${list(a, 'uint32_t')}}}, ${list(b, 'uint32_t')}, ${kernel.here})`
    return `{ const auto sums = ${sums}; ${elements(d)
      .map((x, i) => kernel.write(x, 'float', `sums.v[${i}]`))
      .join(' ')} }`
  },

  // Copies and barriers in shared memory.
  cp: (kernel, modifiers, operands) => {
    switch (modifiers.join('.')) {
      case 'async.commit_group':
        return 'emu::cpAsyncCommit();'
      case 'async.wait_group':
        return `emu::cpAsyncWait(${Number(operands[0])});`
      case 'async.wait_all':
        return 'emu::cpAsyncCommit(); emu::cpAsyncWait(0);'
      case 'async.cg.shared.global':
      case 'async.ca.shared.global': {
        const [to, from, bytes, valid = bytes] = operands
        return `ptx::copyAsync(${kernel.address(to, 'shared')}, ${kernel.address(from, 'global')}, ${Number(bytes)}, ${kernel.read(valid, 'uint32_t')}, ${kernel.here});`
      }
      case 'async.bulk.shared#cluster.global.mbarrier#complete_tx#bytes': {
        const [to, from, bytes, barrier] = operands
        return `emu::bulkLoad(${kernel.address(to, 'shared')}, ${kernel.address(from, 'global')}, ${kernel.read(bytes, 'int32_t')}, ${kernel.address(barrier, 'shared')}, ${kernel.here});`
      }
      case 'async.bulk.tensor.3d.shared#cluster.global.tile.mbarrier#complete_tx#bytes': {
        const [to, source, barrier] = operands
        const [, map, places] = source.match(/^\[(\S+), \{(.*)\}\]$/) ?? kernel.fail(source)
        const [x, y, z] = places.split(',').map(place => kernel.read(place.trim(), 'int32_t'))
        return `emu::tmaLoad(${kernel.address(to, 'shared')}, (const void*)${kernel.read(map, 'uint64_t')}, ${kernel.address(barrier, 'shared')}, ${x}, ${y}, ${z}, ${kernel.here});`
      }
    }
  },
  prefetch: (_, [what]) => (what === 'tensormap' ? '' : undefined),
  mbarrier: (kernel, modifiers, operands) => {
    switch (modifiers.join('.')) {
      case 'init.shared#cta.b64':
        return `emu::initBarrier(${kernel.address(operands[0], 'shared')}, ${kernel.read(operands[1], 'int32_t')}, ${kernel.here});`
      case 'arrive.shared#cta.b64':
        return `emu::arriveAtBarrier(${kernel.address(operands[1], 'shared')}, 0, ${kernel.here});`
      case 'arrive.expect_tx.shared#cta.b64':
        return `emu::arriveAtBarrier(${kernel.address(operands[1], 'shared')}, ${kernel.read(operands[2], 'int32_t')}, ${kernel.here});`
      case 'try_wait.parity.shared#cta.b64':
        return `emu::waitForBarrier(${kernel.address(operands[1], 'shared')}, ${kernel.read(operands[2], 'int32_t')}, ${kernel.here}); ${kernel.write(operands[0], 'bool', 'true')}`
    }
  },
  // Products are done where they are asked for.
  wgmma: (kernel, modifiers, operands) => {
    if (modifiers[0] !== 'mma_async')
      return ['fence', 'commit_group', 'wait_group'].includes(modifiers[0])
        ? `emu::atAligned("wgmma.${modifiers[0]}", ${kernel.here});`
        : undefined
    return wgmma(kernel, modifiers.join('.'), operands)
  },
}

function wider(type) {
  return type.replace(/(u?int)(\d+)_t/, (_, kind, size) => `${kind}${size * 2}_t`)
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

/** mov.b32 and mov.b64 of registers that together are one, the lowest first. */
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
  // To a float, or a wider one, or from integer to integer: as C++ does it.
  return rounding.every(nearest) ? kernel.write(d, to, `(${to})(${value})`) : undefined
}

/** "wgmma.mma_async": d, a or its descriptor, descriptor of b, scale-d, imm-scale-a, imm-scale-b, and of bf16 imm-trans-a (in shared memory), imm-trans-b. */
function wgmma(kernel, form, operands) {
  const shape = form.match(/^mma_async\.sync\.aligned\.m64n(\d+)k(?:16\.f32\.bf16\.bf16|32\.f32\.(e4m3)\.e4m3)$/)
  if (!shape) return
  const [d, a, b, scaleD, scaleA, scaleB, ...transposed] = operands
  const sums = elements(d)
  const n = Number(shape[1])
  if (sums.length !== n / 2 || scaleA !== '1' || scaleB !== '1') return
  const right = kernel.read(b, 'uint64_t')
  const place = kernel.here
  let ask
  if (shape[2]) {
    if (n !== 128) return
    ask = `emu::wgmmaFp8(d, ${kernel.read(a, 'uint64_t')}, ${right}, !${kernel.read(scaleD, 'bool')}, ${place})`
  } else if (a.startsWith('{')) {
    if (scaleD !== '1') return
    const left = elements(a).map(x => kernel.read(x, 'uint32_t'))
    ask = `const uint32_t left[4] = {${left.join(', ')}}; emu::wgmma(d, ${n}, left, ${right}, ${transposed[0] === '1'}, ${place})`
  } else {
    ask = `emu::wgmma(d, ${n}, ${kernel.read(a, 'uint64_t')}, ${right}, ${transposed[0] === '1'}, ${transposed[1] === '1'}, ${scaleD === '0'}, ${place})`
  }
  const values = sums.map(x => kernel.read(x, 'float')).join(', ')
  const results = sums.map((x, i) => kernel.write(x, 'float', `sums[${i}]`)).join(' ')
  return `{ float sums[${n / 2}] = {${values}}; productNow(sums, [&](float* d) { ${ask}; }, ${place}); ${results} }`
}
