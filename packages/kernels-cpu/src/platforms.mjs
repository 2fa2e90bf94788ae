// The instruction sets that the native library is built for, and the platforms that have their own package (npm/<platform>/).

/**
 * Instruction sets by architecture, lowest first, with flags for g++ and clang++ and Zig's name of the CPU. On arm64: NEON, which every CPU has;
 * byte dot products (Armv8.2: Apple M1, Graviton 2); bf16 matrix products together with i8mm (Armv8.6: Apple M2, Graviton 3).
 */
export const levels = {
  x64: {
    baseline: { flags: ['-march=x86-64'], zig: 'x86_64' },
    avx2: {
      flags: ['-march=x86-64', '-mavx2', '-mfma', '-mf16c', '-mbmi', '-mbmi2', '-mlzcnt', '-mpopcnt', '-mmovbe'],
      zig: 'x86_64_v3',
    },
    avx512: {
      flags: ['-march=skylake-avx512', '-mtune=icelake-server', '-mprefer-vector-width=512'],
      zig: 'skylake_avx512-prefer_256_bit',
    },
    avx512vnni: {
      flags: ['-march=skylake-avx512', '-mtune=icelake-server', '-mprefer-vector-width=512', '-mavx512vnni'],
      zig: 'skylake_avx512+avx512vnni-prefer_256_bit',
    },
    avx512bf16: {
      flags: [
        '-march=skylake-avx512',
        '-mtune=icelake-server',
        '-mprefer-vector-width=512',
        '-mavx512vnni',
        '-mavx512bf16',
      ],
      zig: 'skylake_avx512+avx512vnni+avx512bf16-prefer_256_bit',
    },
  },
  arm64: {
    baseline: { flags: ['-march=armv8-a'], zig: 'generic' },
    dotprod: { flags: ['-march=armv8.2-a+dotprod'], zig: 'generic+v8_2a+dotprod' },
    bf16: { flags: ['-march=armv8.2-a+dotprod+bf16+i8mm'], zig: 'generic+v8_2a+dotprod+bf16+i8mm' },
  },
}

/**
 * Platforms with published packages, by `platformName`. `target` is Zig's name, with the oldest supported system version: Node 20 itself needs
 * glibc 2.28. `isas`: the libraries to build, if not all. `zig`: the CPU to compile for instead of a generic one.
 */
export const platforms = {
  'linux-x64': { target: 'x86_64-linux-gnu.2.28', os: 'linux', cpu: 'x64', libc: 'glibc' },
  'linux-arm64': { target: 'aarch64-linux-gnu.2.28', os: 'linux', cpu: 'arm64', libc: 'glibc' },
  'linuxmusl-x64': { target: 'x86_64-linux-musl', os: 'linux', cpu: 'x64', libc: 'musl' },
  'linuxmusl-arm64': { target: 'aarch64-linux-musl', os: 'linux', cpu: 'arm64', libc: 'musl' },
  // Almost no Intel Mac has AVX-512.
  'darwin-x64': { target: 'x86_64-macos.11.0', os: 'darwin', cpu: 'x64', isas: ['baseline', 'avx2'] },
  // Every Apple silicon Mac has at least dot products.
  'darwin-arm64': {
    target: 'aarch64-macos.11.0',
    os: 'darwin',
    cpu: 'arm64',
    isas: ['dotprod', 'bf16'],
    zig: 'apple_m1',
  },
  'win32-x64': { target: 'x86_64-windows-gnu', os: 'win32', cpu: 'x64' },
}

/**
 * Name of a platform; its package is `@moe/kernels-cpu-<name>`. Uses Node's names, and `linuxmusl` for Alpine and other systems without glibc.
 * @param {string} os
 * @param {string} cpu
 * @param {string | null} [libc]
 */
export function platformName(os, cpu, libc) {
  return `${os}${libc === 'musl' ? 'musl' : ''}-${cpu}`
}

/**
 * File name of an instruction set's library.
 * @param {string} isa
 * @param {string} os
 */
export function libraryName(isa, os) {
  return `moe-cpu-${isa}.${{ darwin: 'dylib', win32: 'dll' }[os] ?? 'so'}`
}

/**
 * File names of the libraries in a platform's package.
 * @param {string} platform
 * @returns {string[]}
 */
export function librariesOf(platform) {
  const { os, cpu, isas = Object.keys(levels[cpu]) } = platforms[platform]
  return isas.map(isa => libraryName(isa, os))
}
