// Stores of neighbours that stay one access. nvcc stores a float4 as four floats and joins them again where it can; of an unrolled loop it
// leaves the first apart (seen in PTX), which takes as many sectors each as all together.
#pragma once
#include "moe.cuh"

/// To global memory; `to` is a multiple of 16 bytes.
MOE_DEVICE void storeWide(float* to, float a, float b, float c, float d) {
#ifdef MOE_EMULATOR
  *(float4*)to = make_float4(a, b, c, d);
#else
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
#endif
}
/// The same, unless not `wanted`: a predicate of the instruction, where nvcc would make a branch.
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
/// To global memory; `to` is a multiple of 8 bytes.
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
/// To shared memory; `to` is a multiple of 16 bytes.
MOE_DEVICE void storeWideShared(float* to, float a, float b, float c, float d) {
#ifdef MOE_EMULATOR
  *(float4*)to = make_float4(a, b, c, d);
#else
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"((uint32_t)__cvta_generic_to_shared(to)), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
#endif
}
/// To shared memory; `to` is a multiple of 8 bytes.
MOE_DEVICE void storeWideShared(bf16* to, uint32_t a, uint32_t b) {
#ifdef MOE_EMULATOR
  *(uint2*)to = make_uint2(a, b);
#else
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"((uint32_t)__cvta_generic_to_shared(to)), "r"(a), "r"(b) : "memory");
#endif
}

/// Of eight columns of a row and of the next eight, four lanes have two neighbours each, (a, b) and (c, d); what comes back are four neighbours, which are stored at once: half as many
/// stores, and each takes as long as it touches rows. By whole warps.
MOE_DEVICE float4 gatherFour(float a, float b, float c, float d) {
  const bool even = threadIdx.x % 2 == 0;
  const float first = __shfl_xor_sync(wholeWarp, even ? c : a, 1), second = __shfl_xor_sync(wholeWarp, even ? d : b, 1);
  return even ? make_float4(a, b, first, second) : make_float4(first, second, c, d);
}
/// The first of these four, counted from the first of the sixteen columns.
MOE_DEVICE int gatheredColumn() { return threadIdx.x % 2 * 8 + threadIdx.x % 4 / 2 * 4; }
