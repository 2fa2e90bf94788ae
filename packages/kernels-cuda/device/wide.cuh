// Vector stores that are guaranteed to compile to one instruction. nvcc splits the store of a float4 into four and
// merges them again where it can. In an unrolled loop, the PTX shows that the first one stays split, which costs as
// many sectors per store as the whole vector.
#pragma once
#include "moe.cuh"

/// Stores to global memory; `to` is aligned to 16 bytes.
MOE_DEVICE void storeWide(float* to, float a, float b, float c, float d) {
#ifdef MOE_EMULATOR
  *(float4*)to = make_float4(a, b, c, d);
#else
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
#endif
}
/// The same, if `wanted`, as a predicate of the instruction; nvcc would generate a branch.
MOE_DEVICE void storeWideIf(bool wanted, float* to, float a, float b, float c, float d) {
#ifdef MOE_EMULATOR
  if (wanted) storeWide(to, a, b, c, d);
#else
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %5, 0;\n"
      "@p st.global.v4.f32 [%0], {%1, %2, %3, %4};\n"
      "}" ::"l"(__cvta_generic_to_global(to)),
      "f"(a), "f"(b), "f"(c), "f"(d), "r"((int)wanted)
      : "memory");
#endif
}
/// Stores to global memory; `to` is aligned to 8 bytes.
MOE_DEVICE void storeWide(float* to, float a, float b) {
#ifdef MOE_EMULATOR
  *(float2*)to = make_float2(a, b);
#else
  asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "f"(a), "f"(b) : "memory");
#endif
}
MOE_DEVICE void storeWide(bf16* to, uint32_t a, uint32_t b) {
#ifdef MOE_EMULATOR
  *(uint2*)to = make_uint2(a, b);
#else
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(a), "r"(b) : "memory");
#endif
}
/// Stores to shared memory; `to` is aligned to 16 bytes.
MOE_DEVICE void storeWideShared(float* to, float a, float b, float c, float d) {
#ifdef MOE_EMULATOR
  *(float4*)to = make_float4(a, b, c, d);
#else
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"((uint32_t)__cvta_generic_to_shared(to)), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
#endif
}
/// Stores to shared memory; `to` is aligned to 8 bytes.
MOE_DEVICE void storeWideShared(bf16* to, uint32_t a, uint32_t b) {
#ifdef MOE_EMULATOR
  *(uint2*)to = make_uint2(a, b);
#else
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"((uint32_t)__cvta_generic_to_shared(to)), "r"(a), "r"(b) : "memory");
#endif
}

/// A quad holds 16 columns of a row: each lane two neighbours of the first eight, (a, b), and two of the next eight,
/// (c, d). Returns four neighbouring columns to each lane, so that half as many stores are needed, each of which costs
/// as many passes as it touches rows. Called by whole warps.
MOE_DEVICE float4 gatherFour(float a, float b, float c, float d) {
  const bool even = threadIdx.x % 2 == 0;
  const float first = __shfl_xor_sync(wholeWarp, even ? c : a, 1), second = __shfl_xor_sync(wholeWarp, even ? d : b, 1);
  return even ? make_float4(a, b, first, second) : make_float4(first, second, c, d);
}
/// The column of the first of these four, within the sixteen.
MOE_DEVICE int gatheredColumn() { return threadIdx.x % 2 * 8 + threadIdx.x % 4 / 2 * 4; }
