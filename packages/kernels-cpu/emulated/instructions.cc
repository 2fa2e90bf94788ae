// Runs every instruction of avx512.h on the same generated operands and prints a checksum for each, to compare two builds of this file:
//
//   g++ -O2 -w -mavx2 -mfma -DMOE_ISA_AVX512BF16 -include avx512.h instructions.cc -o emulated && ./emulated
//   g++ -O2 -march=skylake-avx512 -mavx512vnni -mavx512bf16 instructions.cc -o real && ./real     (on a machine with these instructions)
//
// With the name of an instruction as its argument, it prints every case instead: operands, a colon and the result, as 32-bit words.
#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>

namespace {

// 64 bytes that convert to any register type.
struct alignas(64) Register {
  std::uint32_t words[16];
  template <class V>
  V as() const {
    V v;
    std::memcpy(&v, words, sizeof v);
    return v;
  }
  __m512 f() const { return as<__m512>(); }
  __m512i i() const { return as<__m512i>(); }
  __m512bh bf16() const { return as<__m512bh>(); }
};

std::uint32_t state = 1;
std::uint32_t random_word() {
  state ^= state << 13, state ^= state >> 17, state ^= state << 5;
  return state;
}

std::uint32_t word_of(float x) {
  std::uint32_t w;
  std::memcpy(&w, &x, 4);
  return w;
}

// Operands by kind: random bits; numbers that round or cancel; special values, also of 16-bit halves; numbers whose products are near the smallest normal
// number, as f32 and as pairs of bf16; small integers as f32.
std::uint32_t operand(int kind) {
  static const std::uint32_t special[] = {0,          0x80000000, 0x7f800000, 0xff800000, 0x7fc00000, 1,          0x80000001, 0x007fffff, 0x00800000,
                                          0x807fffff, 0x7f7fffff, 0x3f800000, 0xbf800000, 0x3f000000, 0x40200000, 0x00400040, 0x80008000, 0x7fff8000};
  const std::uint32_t any = random_word();
  switch (kind) {
    case 0: return any;
    case 1: return word_of(float(std::int32_t(any)) / 16777216.0f);
    case 2: return special[any % (sizeof special / 4)];
    case 3: return (any & 0x807fffff) | (any % 24 + 52) << 23;
    case 4: return (any & 0x80ff80ff) | (any % 20 + 56) << 23 | (any % 17 + 58) << 7;
    default: return word_of(float(std::int32_t(any) >> 22));
  }
}

Register made_up(int kind) {
  Register r;
  for (auto& word : r.words) word = operand(kind == 6 ? int(random_word() % 6) : kind);
  return r;
}

// Makes all NaN equal, because payloads are not compared.
std::uint32_t plain(std::uint32_t word) { return (word & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : word; }

const char* wanted = nullptr;

// Checks one instruction. `operation` returns a vector or a number; with `floats`, its words are floats whose NaN count as equal.
template <class F>
void check(const char* name, bool floats, F operation) {
  std::uint64_t sum = 14695981039346656037u;
  state = 12345;
  const bool shown = wanted && std::strcmp(wanted, name) == 0;
  for (int n = 0; n < 7 * 7 * 7 * 4; ++n) {
    const Register x[3] = {made_up(n % 7), made_up(n / 7 % 7), made_up(n / 49 % 7)};
    const auto y = operation(x[0], x[1], x[2], n);
    std::uint32_t words[16] = {};
    std::memcpy(words, &y, sizeof y);
    for (auto& word : words) {
      if (floats) word = plain(word);
      sum = (sum ^ word) * 1099511628211u;
    }
    if (!shown) continue;
    for (const Register& r : x)
      for (const auto word : r.words) std::printf("%08x ", word);
    std::printf(":");
    for (const auto word : words) std::printf(" %08x", word);
    std::printf("\n");
  }
  if (!wanted) std::printf("%-20s %016llx\n", name, static_cast<unsigned long long>(sum));
}

using R = const Register&;

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) wanted = arguments[1];
  check("loadu_ps", false, [](R a, R b, R, int n) {
    const Register both[2] = {a, b};
    return _mm512_loadu_ps(reinterpret_cast<const char*>(both) + n % 64);
  });
  check("loadu_si512", false, [](R a, R b, R, int n) {
    const Register both[2] = {a, b};
    return _mm512_loadu_si512(reinterpret_cast<const char*>(both) + n % 64);
  });
  check("load_si512", false, [](R a, R, R, int) { return _mm512_load_si512(&a); });
  check("storeu", false, [](R a, R b, R, int n) {
    Register both[2] = {};
    _mm512_storeu_ps(reinterpret_cast<float*>(both) + n % 16, a.f());
    _mm512_storeu_si512(reinterpret_cast<float*>(both) + (n + 7) % 16, b.i());
    return both[0];
  });
  check("stream_ps", false, [](R a, R, R, int) {
    Register y;
    _mm512_stream_ps(reinterpret_cast<float*>(&y), a.f());
    _mm_sfence();
    return y;
  });
#if !defined(MOE_WITHOUT_MASKS)
  check("mask_loadu_ps", false, [](R a, R b, R c, int) { return _mm512_mask_loadu_ps(a.f(), __mmask16(c.words[0]), &b); });
  check("maskz_loadu_ps", false, [](R a, R, R c, int) { return _mm512_maskz_loadu_ps(__mmask16(c.words[0]), &a); });
  check("maskz_loadu_epi32", false, [](R a, R, R c, int) { return _mm512_maskz_loadu_epi32(__mmask16(c.words[0]), &a); });
  check("mask_storeu_ps", false, [](R a, R b, R c, int) {
    Register y = b;
    _mm512_mask_storeu_ps(&y, __mmask16(c.words[0]), a.f());
    return y;
  });
  check("maskz_loadu_ps 128", false, [](R a, R, R c, int) { return _mm_maskz_loadu_ps(__mmask8(c.words[0] & 15), &a); });
  check("reduce_add_ps", true, [](R a, R, R, int) { return _mm512_reduce_add_ps(a.f()); });
  check("reduce_max_ps", true, [](R a, R, R, int) { return _mm512_reduce_max_ps(a.f()); });
  check("reduce_max_epi32", false, [](R a, R, R, int) { return _mm512_reduce_max_epi32(a.i()); });
  check("reduce_ps", true, [](R a, R, R, int) { return _mm512_reduce_ps(a.f(), 8); });
  check("permute_ps", false, [](R a, R, R, int) { return _mm512_permute_ps(a.f(), 0xb1); });
#endif
  check("set1", false, [](R a, R b, R, int n) {
    float x;
    std::memcpy(&x, &a, 4);
    return n % 2 ? (__m512i)_mm512_set1_ps(x) : _mm512_set1_epi32(int(b.words[3]));
  });
  check("setzero", false, [](R, R, R, int n) { return n % 2 ? (__m512i)_mm512_setzero_ps() : _mm512_setzero_si512(); });
  check("set_epi32", false, [](R, R, R, int n) { return _mm512_set_epi32(n, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, -15); });
  check("set_epi16", false, [](R, R, R, int) {
    return _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  });
  check("castps128_ps512", false, [](R a, R, R, int) {
    const auto y = _mm512_castps128_ps512(a.as<__m128>());
    __m128 lowest;
    std::memcpy(&lowest, &y, 16);
    return lowest;
  });
  check("max_ps", true, [](R a, R b, R, int) { return _mm512_max_ps(a.f(), b.f()); });
  check("min_ps", true, [](R a, R b, R, int) { return _mm512_min_ps(a.f(), b.f()); });
  check("max_epi32", false, [](R a, R b, R, int) { return _mm512_max_epi32(a.i(), b.i()); });
  check("madd_epi16", false, [](R a, R b, R, int) { return _mm512_madd_epi16(a.i(), b.i()); });
  check("maddubs_epi16", false, [](R a, R b, R, int) { return _mm512_maddubs_epi16(a.i(), b.i()); });
  check("add_epi16", false, [](R a, R b, R, int) { return _mm512_add_epi16(a.i(), b.i()); });
  check("set1_epi16", false, [](R a, R, R, int) { return _mm512_set1_epi16(short(a.words[0])); });
  check("unpacklo_epi32", false, [](R a, R b, R, int) { return _mm512_unpacklo_epi32(a.i(), b.i()); });
  check("unpackhi_epi32", false, [](R a, R b, R, int) { return _mm512_unpackhi_epi32(a.i(), b.i()); });
  check("unpacklo_epi64", false, [](R a, R b, R, int) { return _mm512_unpacklo_epi64(a.i(), b.i()); });
  check("unpackhi_epi64", false, [](R a, R b, R, int) { return _mm512_unpackhi_epi64(a.i(), b.i()); });
  check("fmadd_ps", true, [](R a, R b, R c, int) { return _mm512_fmadd_ps(a.f(), b.f(), c.f()); });
  check("sqrt_ps", true, [](R a, R, R, int) { return _mm512_sqrt_ps(a.f()); });
  check("roundscale_ps", true, [](R a, R, R, int) { return _mm512_roundscale_ps(a.f(), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); });
  check("scalef_ps", true, [](R a, R b, R, int) { return _mm512_scalef_ps(a.f(), b.f()); });
  check("shuffle_i32x4 88", false, [](R a, R b, R, int) { return _mm512_shuffle_i32x4(a.i(), b.i(), 0x88); });
  check("shuffle_i32x4 dd", false, [](R a, R b, R, int) { return _mm512_shuffle_i32x4(a.i(), b.i(), 0xdd); });
  check("permutexvar_epi16", false, [](R a, R b, R, int) { return _mm512_permutexvar_epi16(a.i(), b.i()); });
  check("permutexvar_ps", false, [](R a, R b, R, int) { return _mm512_permutexvar_ps(a.i(), b.f()); });
  check("movepi32_mask", false, [](R a, R, R, int) { return std::uint32_t{_mm512_movepi32_mask(a.i())}; });
  check("dpwssd_epi32", false, [](R a, R b, R c, int) { return _mm512_dpwssd_epi32(a.i(), b.i(), c.i()); });
  check("dpbusd_epi32", false, [](R a, R b, R c, int) { return _mm512_dpbusd_epi32(a.i(), b.i(), c.i()); });
#if !defined(MOE_WITHOUT_MASKS)
  check("cvtne2ps_pbh", false, [](R a, R b, R, int) { return _mm512_cvtne2ps_pbh(a.f(), b.f()); });
  check("dpbf16_ps", true, [](R a, R b, R c, int) { return _mm512_dpbf16_ps(a.f(), b.bf16(), c.bf16()); });
#endif
}
