// Instructions by which threads cooperate: barriers, atomics, shuffles, matrix products and asynchronous copies. They call the runtime.
import { elements } from './values.mjs'

const shuffles = { idx: 'Index', bfly: 'Xor', up: 'Up', down: 'Down' }

export const cooperation = {
  // Block-wide operations.
  bar: (kernel, modifiers, operands) => {
    const form = modifiers.join('.')
    if (form === 'warp.sync') return `emu::warpBarrier(${kernel.read(operands[0], 'uint32_t')}, ${kernel.here});`
    // Warps may reach a barrier at different instructions ("bar": only the threads of a warp must execute the same one).
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
  // Not needed: the runtime runs one thread at a time.
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

  // Warp-wide operations.
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

  // Asynchronous copies and mbarriers.
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
  // wgmmas are computed when they are issued.
  wgmma: (kernel, modifiers, operands) => {
    if (modifiers[0] !== 'mma_async')
      return ['fence', 'commit_group', 'wait_group'].includes(modifiers[0])
        ? `emu::atAligned("wgmma.${modifiers[0]}", ${kernel.here});`
        : undefined
    return wgmma(kernel, modifiers.join('.'), operands)
  },
}

/** "wgmma.mma_async": d, a or its descriptor, descriptor of b, scale-d, imm-scale-a, imm-scale-b, and for bf16 imm-trans-a (if a is in shared memory), imm-trans-b. */
function wgmma(kernel, form, operands) {
  const shape = form.match(/^mma_async\.sync\.aligned\.m64n(\d+)k(?:16\.f32\.bf16\.bf16|32\.f32\.(e4m3)\.e4m3)$/)
  if (!shape) return
  const [d, a, b, scaleD, scaleA, scaleB, ...transposed] = operands
  const sums = elements(d)
  const n = Number(shape[1])
  if (sums.length !== n / 2 || scaleA !== '1' || scaleB !== '1') return
  const right = kernel.read(b, 'uint64_t')
  const place = kernel.here
  let call
  if (shape[2]) {
    if (n !== 128) return
    call = `emu::wgmmaFp8(d, ${kernel.read(a, 'uint64_t')}, ${right}, !${kernel.read(scaleD, 'bool')}, ${place})`
  } else if (a.startsWith('{')) {
    if (scaleD !== '1') return
    const left = elements(a).map(x => kernel.read(x, 'uint32_t'))
    call = `const uint32_t left[4] = {${left.join(', ')}}; emu::wgmma(d, ${n}, left, ${right}, ${transposed[0] === '1'}, ${place})`
  } else {
    call = `emu::wgmma(d, ${n}, ${kernel.read(a, 'uint64_t')}, ${right}, ${transposed[0] === '1'}, ${transposed[1] === '1'}, ${scaleD === '0'}, ${place})`
  }
  const values = sums.map(x => kernel.read(x, 'float')).join(', ')
  const results = sums.map((x, i) => kernel.write(x, 'float', `sums[${i}]`)).join(' ')
  return `{ float sums[${n / 2}] = {${values}}; computeWgmma(sums, [&](float* d) { ${call}; }, ${place}); ${results} }`
}
