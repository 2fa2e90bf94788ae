// Hopper's TMA copies, mbarriers and warpgroup products (sm_90a only), as thin wrappers of PTX. The emulator implements
// the same functions (emulator/hopper.h). Names in quotes are sections of the PTX ISA.
#pragma once
#include "moe.cuh"

/// CUtensorMap, aligned as in cuda.h since CUDA 13: describes a matrix in global memory to the copy engine (TMA). A
/// kernel takes it as `const __grid_constant__ TensorMap` (signature `t`).
struct __align__(128) TensorMap {
  uint64_t words[16];
};

/// An mbarrier in shared memory ("Parallel Synchronization and Communication Instructions: mbarrier"). A phase
/// completes when all expected arrivals have happened and all expected bytes have been copied; then the next phase
/// begins.
struct Barrier {
  uint64_t state;
};

#ifdef MOE_EMULATOR
#include "hopper.h"
#else

/// The functions below only compile for sm_90a.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "hopper.cuh is for sm_90a: name the module <op>-sm90a"
#endif

MOE_DEVICE uint32_t sharedAddress(const void* shared) { return (uint32_t)__cvta_generic_to_shared(shared); }
/// Returns the value of lane 0, called by whole warps. This tells the compiler that an address or descriptor is
/// warp-uniform, so that it keeps it in uniform registers. Otherwise it would recompute it at every use, in a dozen
/// instructions before the first product.
template <class T>
MOE_DEVICE T* warpUniform(T* shared) {
  return (T*)__cvta_shared_to_generic(__shfl_sync(wholeWarp, sharedAddress(shared), 0));
}
MOE_DEVICE uint64_t warpUniform(uint64_t operand) { return operand >> 32 << 32 | __shfl_sync(wholeWarp, (uint32_t)operand, 0); }
/// The descriptor of an operand 16 * `distance` bytes further on. The empty asm keeps this a single addition here.
/// Otherwise the compiler would recompute the descriptor, or compute the descriptors of all k steps before a loop,
/// which takes more registers than a warp has.
MOE_DEVICE uint64_t advanceDescriptor(uint64_t operand, uint32_t distance = 0) {
  operand += distance;
  asm volatile("" : "+l"(operand));
  return operand;
}

/// Initializes a barrier, called by one thread before any use. The same thread must then call fenceBarrierInit(), and
/// all threads __syncthreads().
MOE_DEVICE void initBarrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(sharedAddress(barrier)), "r"(arrivals) : "memory");
}
/// Makes barriers that this thread has initialized visible to the copy engine ("membar/fence": proxies).
MOE_DEVICE void fenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
/// Arrives at the barrier. What this thread has done before (its whole warp, after __syncwarp) is visible to whoever
/// waits for the phase.
MOE_DEVICE void arrive(Barrier* barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(sharedAddress(barrier)) : "memory"); }
/// Arrives, and adds `bytes` to what must be copied before the phase completes.
MOE_DEVICE void arriveAndExpectTx(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(sharedAddress(barrier)), "r"(bytes) : "memory");
}
MOE_DEVICE uint32_t nanoseconds() {
  uint32_t now;
  asm volatile("mov.u32 %0, %%globaltimer_lo;" : "=r"(now));
  return now;
}
/// Waits for the completion of the phase with this parity. Phases are numbered from 0, and the phase before the first
/// one counts as completed, with parity 1. A phase that does not complete within two seconds traps, so that a bug fails
/// the launch instead of hanging it.
MOE_DEVICE void wait(Barrier* barrier, int parity) {
  uint32_t done, since = 0;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(sharedAddress(barrier)), "r"(parity)
        : "memory");
    if (done != 0) break;
    if (since == 0) since = nanoseconds() | 1;
    else if (nanoseconds() - since > 2000000000u) __trap();
  } while (true);
}

/// Starts the TMA copy of a box of the matrix, starting at element (x, y, z); elements outside of the matrix are zeros.
/// Adds the box's bytes to `barrier` when it completes. Called by one thread; `shared` is aligned to 1024 bytes
/// ("cp.async.bulk.tensor").
MOE_DEVICE void tmaLoad(void* shared, const TensorMap& map, Barrier* barrier, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(sharedAddress(shared)),
               "l"(&map), "r"(sharedAddress(barrier)), "r"(x), "r"(y), "r"(z)
               : "memory");
}
/// The same for `bytes` contiguous bytes. Addresses and size are multiples of 16 ("cp.async.bulk").
MOE_DEVICE void bulkLoad(void* shared, const void* global, int bytes, Barrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(sharedAddress(shared)), "l"(global), "r"(bytes),
               "r"(sharedAddress(barrier))
               : "memory");
}
MOE_DEVICE void prefetchMap(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

/// Orders this thread's accesses to shared memory before later accesses of the async proxy (wgmma operands, TMA
/// copies). Needed by each thread that has written an operand, and by threads that have read what a copy will
/// overwrite, before they signal that they have finished ("fence.proxy.async").
MOE_DEVICE void fenceProxyAsync() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
/// A named barrier for the 128 threads of a warpgroup ("bar"; barrier 0 is __syncthreads).
MOE_DEVICE void syncWarpgroup() { asm volatile("bar.sync %0, 128;" ::"r"(1 + (int)threadIdx.x / 128) : "memory"); }

/// Prevents the compiler from moving accesses to accumulators across this point (warpgroup_fence_operand in CUTLASS).
/// The compiler does not know when wgmma owns them.
template <int N>
MOE_DEVICE void fenceAccumulator(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
/// Required before the first wgmma after other instructions have accessed the accumulators, by all threads of the
/// warpgroup ("wgmma.fence").
template <int N>
MOE_DEVICE void wgmmaFence(float (&d)[N]) {
  fenceAccumulator(d);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
/// Commits the wgmmas issued so far as a group.
MOE_DEVICE void wgmmaCommit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits until at most `Pending` of the most recent groups are in flight. Until then, a wgmma's accumulators and its
/// operands in shared memory must not be accessed.
template <int Pending, int N>
MOE_DEVICE void wgmmaWait(float (&d)[N]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
  if (Pending == 0) fenceAccumulator(d);
}
/// Forces the computation of these non-negative values before what follows. ptxas would move the arithmetic behind a
/// later wgmmaWait, where it no longer overlaps with products. The nanosleep never runs, but ptxas does not know that.
template <int N>
MOE_DEVICE void computeFirst(const float (&x)[N]) {
  uint32_t signs = 0;
#pragma unroll
  for (int i = 0; i < N; i++) signs |= __float_as_uint(x[i]);
  if ((int)signs < 0) asm volatile("nanosleep.u32 1;" ::: "memory");
}

// Lists of asm operands: MOE_TEN(t) is "%t0, ... %t9", MOE_SUMS* are accumulators.
#define MOE_TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define MOE_0_TO_29 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " MOE_TEN(1) MOE_TEN(2)
#define MOE_0_TO_59 MOE_0_TO_29 MOE_TEN(3) MOE_TEN(4) MOE_TEN(5)
#define MOE_0_TO_89 MOE_0_TO_59 MOE_TEN(6) MOE_TEN(7) MOE_TEN(8)
#define MOE_0_TO_119 MOE_0_TO_89 MOE_TEN(9) MOE_TEN(10) MOE_TEN(11)
#define MOE_SUMS8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define MOE_SUMS32(i) MOE_SUMS8(i), MOE_SUMS8(i + 8), MOE_SUMS8(i + 16), MOE_SUMS8(i + 24)
#define MOE_SUMS64(i) MOE_SUMS32(i), MOE_SUMS32(i + 32)
#define MOE_PRODUCT(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 "

/// d += a b^T for 16 k, by all 128 threads of a warpgroup. a has 64 rows, b has N; both are descriptors, K-major, or
/// MN-major with MnMajorA or MnMajorB. Fresh: d = a b^T (scale-d = 0). Accumulator layout, with thread t of the
/// warpgroup, w = t/32, g = t%32/4, c = t%4:
/// d[4j], d[4j+1] = D[16w+g][8j+2c, +1], d[4j+2], d[4j+3] = D[16w+g+8][8j+2c, +1]
/// ("wgmma.mma_async", "Register Fragments for wgmma.mma_async.m64nNk16").
template <int N, bool MnMajorB = false, bool MnMajorA = false, bool Fresh = false>
MOE_DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b) {
  static_assert(N == 32 || N == 64 || N == 80 || N == 128 || N == 144 || N == 192 || N == 256, "the widths that are used");
  // The scales of a and b are 1.
  if constexpr (N == 32) {
    asm volatile(MOE_PRODUCT(32) "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, %20, 1, 1, %18, %19;"
                 : MOE_SUMS8(0), MOE_SUMS8(8)
                 : "l"(a), "l"(b), "n"(MnMajorA), "n"(MnMajorB), "n"(!Fresh));
  } else if constexpr (N == 64) {
    asm volatile(MOE_PRODUCT(64) "{" MOE_0_TO_29 "%30, %31}, %32, %33, %36, 1, 1, %34, %35;" : MOE_SUMS32(0) : "l"(a), "l"(b), "n"(MnMajorA), "n"(MnMajorB), "n"(!Fresh));
  } else if constexpr (N == 80) {
    asm volatile(MOE_PRODUCT(80) "{" MOE_0_TO_29 "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39}, %40, %41, %44, 1, 1, %42, %43;"
                 : MOE_SUMS32(0), MOE_SUMS8(32)
                 : "l"(a), "l"(b), "n"(MnMajorA), "n"(MnMajorB), "n"(!Fresh));
  } else if constexpr (N == 128) {
    asm volatile(MOE_PRODUCT(128) "{" MOE_0_TO_59 "%60, %61, %62, %63}, %64, %65, %68, 1, 1, %66, %67;" : MOE_SUMS64(0) : "l"(a), "l"(b), "n"(MnMajorA), "n"(MnMajorB), "n"(!Fresh));
  } else if constexpr (N == 144) {
    asm volatile(MOE_PRODUCT(144) "{" MOE_0_TO_59 MOE_TEN(6) "%70, %71}, %72, %73, %76, 1, 1, %74, %75;" : MOE_SUMS64(0), MOE_SUMS8(64) : "l"(a), "l"(b), "n"(MnMajorA), "n"(MnMajorB), "n"(!Fresh));
  } else if constexpr (N == 192) {
    asm volatile(MOE_PRODUCT(192) "{" MOE_0_TO_89 "%90, %91, %92, %93, %94, %95}, %96, %97, %100, 1, 1, %98, %99;"
                 : MOE_SUMS64(0), MOE_SUMS32(64)
                 : "l"(a), "l"(b), "n"(MnMajorA), "n"(MnMajorB), "n"(!Fresh));
  } else {
    asm volatile(MOE_PRODUCT(256) "{" MOE_0_TO_119 "%120, %121, %122, %123, %124, %125, %126, %127}, %128, %129, %132, 1, 1, %130, %131;"
                 : MOE_SUMS64(0), MOE_SUMS64(64)
                 : "l"(a), "l"(b), "n"(MnMajorA), "n"(MnMajorB), "n"(!Fresh));
  }
}
/// The same in f8e4m3, for 32 k and 128 rows of b. Both operands are K-major; a step of k is 32 bytes, as in bf16.
template <bool Fresh>
MOE_DEVICE void wgmmaFp8(float (&d)[64], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" MOE_0_TO_59 "%60, %61, %62, %63}, %64, %65, p, 1, 1;\n"
      "}"
      : MOE_SUMS64(0)
      : "l"(a), "l"(b), "n"(!Fresh));
}
/// wgmma with A, 64 x 16, in registers, which must not be changed until the group has completed: a[0], a[1] =
/// A[16w+g][2c, +1], A[16w+g+8][2c, +1]; a[2], a[3] are the same, eight columns further. Two neighbouring accumulator
/// blocks, rounded to bf16, have this layout.
template <int N, bool MnMajor = false>
MOE_DEVICE void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
  static_assert(N == 64 || N == 128 || N == 192 || N == 256, "the widths that are used");
  if constexpr (N == 64) {
    asm volatile(MOE_PRODUCT(64) "{" MOE_0_TO_29 "%30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, %37;"
                 : MOE_SUMS32(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(MnMajor));
  } else if constexpr (N == 128) {
    asm volatile(MOE_PRODUCT(128) "{" MOE_0_TO_59 "%60, %61, %62, %63}, {%64, %65, %66, %67}, %68, 1, 1, 1, %69;"
                 : MOE_SUMS64(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(MnMajor));
  } else if constexpr (N == 192) {
    asm volatile(MOE_PRODUCT(192) "{" MOE_0_TO_89 "%90, %91, %92, %93, %94, %95}, {%96, %97, %98, %99}, %100, 1, 1, 1, %101;"
                 : MOE_SUMS64(0), MOE_SUMS32(64)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(MnMajor));
  } else {
    asm volatile(MOE_PRODUCT(256) "{" MOE_0_TO_119 "%120, %121, %122, %123, %124, %125, %126, %127}, {%128, %129, %130, %131}, %132, 1, 1, 1, %133;"
                 : MOE_SUMS64(0), MOE_SUMS64(64)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(MnMajor));
  }
}
#undef MOE_TEN
#undef MOE_0_TO_29
#undef MOE_0_TO_59
#undef MOE_0_TO_89
#undef MOE_0_TO_119
#undef MOE_SUMS8
#undef MOE_SUMS32
#undef MOE_SUMS64
#undef MOE_PRODUCT

#endif

/// Descriptor of a K-major operand: a tile with rows of 64 bf16 (128 bytes), as tmaLoad writes it with a 128-byte
/// swizzle. The tile is aligned to 1024 bytes, firstRow is a multiple of 8 rows into it, and `k` is a multiple of 16
/// within the row.
/// ("Matrix Descriptor Format": address / 16; the stride of 8 rows / 16 at bit 32; the swizzle mode at bit 62.)
MOE_DEVICE uint64_t kMajorDescriptor(const void* firstRow, int k) {
  const uint64_t start = (sharedAddress(firstRow) & 0x3ffff) >> 4;
  return (start | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62) + k / 8;
}

/// Descriptor of an MN-major operand: 16 rows of such tiles, where row number = k. Each tile has 64 columns of the
/// operand, and the next 64 are `next` bytes further (an A operand has only 64). Alignment is as above. (The stride of
/// 64 columns / 16 at bit 16, of 8 rows / 16 at bit 32.)
MOE_DEVICE uint64_t mnMajorDescriptor(const void* firstRow, int next) {
  const uint64_t start = (sharedAddress(firstRow) & 0x3ffff) >> 4;
  return start | (uint64_t)(next >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}
