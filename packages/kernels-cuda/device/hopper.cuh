// Hopper's copy engine, its barriers, and the matrix products of a warpgroup (sm_90a alone). In the emulator each has the same
// meaning (emulator/hopper.h). Names in quotes are sections of the PTX ISA.
#pragma once
#include "moe.cuh"

/// CUtensorMap, aligned as in cuda.h since CUDA 13: what the copy engine knows of a matrix in memory. A kernel takes it as
/// `const __grid_constant__ TensorMap` (signature `t`).
struct __align__(128) TensorMap {
  uint64_t words[16];
};

/// An mbarrier ("Parallel Synchronization and Communication Instructions: mbarrier"), in shared memory. A phase ends when all its
/// arrivals have come and all bytes that it was told to expect have landed; then the next one begins.
struct Barrier {
  uint64_t state;
};

#ifdef MOE_EMULATOR
#include "hopper.h"
#else

/// Kernels that use what is below are seen by this architecture's compiler only.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "hopper.cuh is for sm_90a: name the module <op>-sm90a"
#endif

MOE_DEVICE uint32_t sharedAddress(const void* shared) { return (uint32_t)__cvta_generic_to_shared(shared); }
/// The same place in shared memory, or the same operand (operandAt), by whole warps. The compiler takes its address for one that all lanes have, and keeps it; otherwise it
/// finds it anew at every use, in a dozen steps before the first product.
template <class T>
MOE_DEVICE T* kept(T* shared) {
  return (T*)__cvta_shared_to_generic(__shfl_sync(wholeWarp, sharedAddress(shared), 0));
}
MOE_DEVICE uint64_t kept(uint64_t operand) { return operand >> 32 << 32 | __shfl_sync(wholeWarp, (uint32_t)operand, 0); }
/// The operand that lies 16 `distance` bytes further on, found by adding to this one here: not anew, nor for all steps of k ahead of a loop, in more registers than a
/// warp has.
MOE_DEVICE uint64_t further(uint64_t operand, uint32_t distance = 0) {
  operand += distance;
  asm volatile("" : "+l"(operand));
  return operand;
}

/// By one thread, before anybody uses it: what follows is fenceBarriers() by the same thread, then __syncthreads().
MOE_DEVICE void initBarrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(sharedAddress(barrier)), "r"(arrivals) : "memory");
}
/// Makes barriers that this thread has initialized visible to the copy engine ("membar/fence": proxies).
MOE_DEVICE void fenceBarriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
/// What this warp has done so far is done for whoever waits for the phase.
MOE_DEVICE void arrive(Barrier* barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(sharedAddress(barrier)) : "memory"); }
/// The same, and the phase lasts until `bytes` more have landed.
MOE_DEVICE void arriveAndExpect(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(sharedAddress(barrier)), "r"(bytes) : "memory");
}
MOE_DEVICE uint32_t nanoseconds() {
  uint32_t now;
  asm volatile("mov.u32 %0, %%globaltimer_lo;" : "=r"(now));
  return now;
}
/// Waits for the end of the latest phase of this parity: phases count from 0, and before the first one lies one of parity 1. A phase
/// that does not end within two seconds is an error of the launch, rather than a launch that does not end.
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

/// Starts the copy of a box of the matrix from element (x, y, z) on; outside of the matrix are zeros. It counts as the box's bytes at
/// `barrier`. By one thread; `shared` is a multiple of 1024 ("cp.async.bulk.tensor").
MOE_DEVICE void copyBox(void* shared, const TensorMap& map, Barrier* barrier, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(sharedAddress(shared)),
               "l"(&map), "r"(sharedAddress(barrier)), "r"(x), "r"(y), "r"(z)
               : "memory");
}
/// Likewise `bytes` in a row; all are multiples of 16 ("cp.async.bulk").
MOE_DEVICE void copyBytes(void* shared, const void* global, int bytes, Barrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(sharedAddress(shared)), "l"(global), "r"(bytes),
               "r"(sharedAddress(barrier))
               : "memory");
}
MOE_DEVICE void prefetchMap(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

/// An operand that threads have written themselves: each, after it wrote and before it tells that it did. Likewise where threads have read what the copy
/// engine will write over ("fence.proxy.async").
MOE_DEVICE void fenceOperands() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
/// All 128 threads of the warpgroup meet, and what each has done is done for the others ("bar"; barrier 0 is the block's).
MOE_DEVICE void syncWarpgroup() { asm volatile("bar.sync %0, 128;" ::"r"(1 + (int)threadIdx.x / 128) : "memory"); }

/// The compiler moves nothing that reads or writes the sums across this place: it does not know when they are the tensor cores'.
template <int N>
MOE_DEVICE void holdSums(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
/// Before the first product after other instructions have touched the sums, by all threads of the warpgroup ("wgmma.fence").
template <int N>
MOE_DEVICE void fenceProducts(float (&d)[N]) {
  holdSums(d);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
/// Closes a group of products.
MOE_DEVICE void commitProducts() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits until at most `Pending` of the latest groups are on their way. Until a product's group is waited for, its sums belong to the
/// tensor cores, and so do its operands in shared memory.
template <int Pending, int N>
MOE_DEVICE void waitProducts(float (&d)[N]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
  if (Pending == 0) holdSums(d);
}
/// These numbers, none of which is negative, are computed before what follows. ptxas moves arithmetic behind a wait for products that stands after it, and then nothing is computed beside
/// them; that nobody sleeps here it does not know.
template <int N>
MOE_DEVICE void computeFirst(const float (&x)[N]) {
  uint32_t signs = 0;
#pragma unroll
  for (int i = 0; i < N; i++) signs |= __float_as_uint(x[i]);
  if ((int)signs < 0) asm volatile("nanosleep.u32 1;" ::: "memory");
}

// "%<tens>0, ... %<tens>9", and sums as operands of asm.
#define MOE_TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define MOE_0_TO_29 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " MOE_TEN(1) MOE_TEN(2)
#define MOE_0_TO_59 MOE_0_TO_29 MOE_TEN(3) MOE_TEN(4) MOE_TEN(5)
#define MOE_0_TO_89 MOE_0_TO_59 MOE_TEN(6) MOE_TEN(7) MOE_TEN(8)
#define MOE_0_TO_119 MOE_0_TO_89 MOE_TEN(9) MOE_TEN(10) MOE_TEN(11)
#define MOE_SUMS8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define MOE_SUMS32(i) MOE_SUMS8(i), MOE_SUMS8(i + 8), MOE_SUMS8(i + 16), MOE_SUMS8(i + 24)
#define MOE_SUMS64(i) MOE_SUMS32(i), MOE_SUMS32(i + 32)
#define MOE_PRODUCT(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 "

/// d += a b^T for 16 of k, by all 128 threads of a warpgroup: a has 64 rows and b has N (each operandAt, or operandAcross when AcrossA, AcrossB). Fresh: d = a b^T, whatever d was.
/// Thread t of the warpgroup has, with w = t/32, g = t%32/4, c = t%4: d[4j], d[4j+1] = D[16w+g][8j+2c, +1], d[4j+2], d[4j+3] =
/// D[16w+g+8][8j+2c, +1] ("wgmma.mma_async", "Register Fragments for wgmma.mma_async.m64nNk16").
template <int N, bool AcrossB = false, bool AcrossA = false, bool Fresh = false>
MOE_DEVICE void multiplyGroup(float (&d)[N / 2], uint64_t a, uint64_t b) {
  static_assert(N == 32 || N == 64 || N == 80 || N == 128 || N == 144 || N == 192 || N == 256, "the widths that are used");
  // Scales of a and b: 1.
  if constexpr (N == 32) {
    asm volatile(MOE_PRODUCT(32) "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, %20, 1, 1, %18, %19;"
                 : MOE_SUMS8(0), MOE_SUMS8(8)
                 : "l"(a), "l"(b), "n"(AcrossA), "n"(AcrossB), "n"(!Fresh));
  } else if constexpr (N == 64) {
    asm volatile(MOE_PRODUCT(64) "{" MOE_0_TO_29 "%30, %31}, %32, %33, %36, 1, 1, %34, %35;" : MOE_SUMS32(0) : "l"(a), "l"(b), "n"(AcrossA), "n"(AcrossB), "n"(!Fresh));
  } else if constexpr (N == 80) {
    asm volatile(MOE_PRODUCT(80) "{" MOE_0_TO_29 "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39}, %40, %41, %44, 1, 1, %42, %43;"
                 : MOE_SUMS32(0), MOE_SUMS8(32)
                 : "l"(a), "l"(b), "n"(AcrossA), "n"(AcrossB), "n"(!Fresh));
  } else if constexpr (N == 128) {
    asm volatile(MOE_PRODUCT(128) "{" MOE_0_TO_59 "%60, %61, %62, %63}, %64, %65, %68, 1, 1, %66, %67;" : MOE_SUMS64(0) : "l"(a), "l"(b), "n"(AcrossA), "n"(AcrossB), "n"(!Fresh));
  } else if constexpr (N == 144) {
    asm volatile(MOE_PRODUCT(144) "{" MOE_0_TO_59 MOE_TEN(6) "%70, %71}, %72, %73, %76, 1, 1, %74, %75;" : MOE_SUMS64(0), MOE_SUMS8(64) : "l"(a), "l"(b), "n"(AcrossA), "n"(AcrossB), "n"(!Fresh));
  } else if constexpr (N == 192) {
    asm volatile(MOE_PRODUCT(192) "{" MOE_0_TO_89 "%90, %91, %92, %93, %94, %95}, %96, %97, %100, 1, 1, %98, %99;"
                 : MOE_SUMS64(0), MOE_SUMS32(64)
                 : "l"(a), "l"(b), "n"(AcrossA), "n"(AcrossB), "n"(!Fresh));
  } else {
    asm volatile(MOE_PRODUCT(256) "{" MOE_0_TO_119 "%120, %121, %122, %123, %124, %125, %126, %127}, %128, %129, %132, 1, 1, %130, %131;"
                 : MOE_SUMS64(0), MOE_SUMS64(64)
                 : "l"(a), "l"(b), "n"(AcrossA), "n"(AcrossB), "n"(!Fresh));
  }
}
/// The same of f8e4m3, 32 of k (each operandAt, 32 bytes of a row as ever), with 128 rows of b; Fresh likewise.
template <bool Fresh>
MOE_DEVICE void multiplyGroupFp8(float (&d)[64], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" MOE_0_TO_59 "%60, %61, %62, %63}, %64, %65, p, 1, 1;\n"
      "}"
      : MOE_SUMS64(0)
      : "l"(a), "l"(b), "n"(!Fresh));
}
/// multiplyGroup with 64 x 16 of a in registers, until the product's group is waited for: a[0], a[1] = A[16w+g][2c, +1], A[16w+g+8][2c, +1];
/// a[2], a[3] the same eight columns on. Two neighbouring columns of sums are, rounded, such registers.
template <int N, bool Across = false>
MOE_DEVICE void multiplyGroup(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
  static_assert(N == 64 || N == 128 || N == 192 || N == 256, "the widths that are used");
  if constexpr (N == 64) {
    asm volatile(MOE_PRODUCT(64) "{" MOE_0_TO_29 "%30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, %37;"
                 : MOE_SUMS32(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(Across));
  } else if constexpr (N == 128) {
    asm volatile(MOE_PRODUCT(128) "{" MOE_0_TO_59 "%60, %61, %62, %63}, {%64, %65, %66, %67}, %68, 1, 1, 1, %69;"
                 : MOE_SUMS64(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(Across));
  } else if constexpr (N == 192) {
    asm volatile(MOE_PRODUCT(192) "{" MOE_0_TO_89 "%90, %91, %92, %93, %94, %95}, {%96, %97, %98, %99}, %100, 1, 1, 1, %101;"
                 : MOE_SUMS64(0), MOE_SUMS32(64)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(Across));
  } else {
    asm volatile(MOE_PRODUCT(256) "{" MOE_0_TO_119 "%120, %121, %122, %123, %124, %125, %126, %127}, {%128, %129, %130, %131}, %132, 1, 1, 1, %133;"
                 : MOE_SUMS64(0), MOE_SUMS64(64)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(Across));
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

/// A tile of rows of 64 bf16 (128 bytes), as copyBox leaves it with a swizzle of 128 bytes: an operand whose k runs along memory.
/// Its first row is a multiple of 8 rows into a tile at a multiple of 1024; `k` is a multiple of 16 within the row.
/// ("Matrix Descriptor Format": address / 16, at bit 32 the distance of 8 rows / 16, at bit 62 the swizzle.)
MOE_DEVICE uint64_t operandAt(const void* firstRow, int k) {
  const uint64_t start = (sharedAddress(firstRow) & 0x3ffff) >> 4;
  return (start | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62) + k / 8;
}

/// Sixteen rows of such tiles as an operand whose k runs across memory: row k, and of each 64 columns as they lie in one tile, the next
/// 64 `next` bytes on (a left operand has 64 alone). The first row is a multiple of 8 rows into a tile at a multiple of 1024. (The distance of
/// 64 columns / 16 at bit 16, of 8 rows / 16 at bit 32.)
MOE_DEVICE uint64_t operandAcross(const void* firstRow, int next) {
  const uint64_t start = (sharedAddress(firstRow) & 0x3ffff) >> 4;
  return start | (uint64_t)(next >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}
