// Conversions between dtypes: (y, x, n). Pairs without a direct conversion go through f32, a block at a time.
#include "convert.h"
#include "moe.h"

using namespace moe;

namespace {

constexpr int64_t block = 512;
constexpr int64_t grain = 16384;

// --- conversions of a block to and from f32 ---

struct F32 {
  using Type = float;
  static void decode(float* y, const float* x, int64_t n) { std::memcpy(y, x, static_cast<size_t>(n) * 4); }
  static void encode(float* y, const float* x, int64_t n) { std::memcpy(y, x, static_cast<size_t>(n) * 4); }
};

// A storage format with narrow elements and vectorized conversions.
template <class Element, class Vector, f32v (*Decode)(Vector), Vector (*Encode)(f32v)>
struct Narrow {
  using Type = Element;
  static void decode(float* y, const Element* x, int64_t n) {
    each_vector(n, [&](int64_t i, int count) {
      Vector v{};
      copy(&v, x + i, count);
      store_some(y + i, Decode(v), count);
    });
  }
  static void encode(Element* y, const float* x, int64_t n) {
    each_vector(n, [&](int64_t i, int count) {
      const Vector v = Encode(load_some(x + i, count));
      copy(y + i, &v, count);
    });
  }

 private:
  // With a constant size if possible, so that it compiles to one move.
  static __attribute__((always_inline)) void copy(void* to, const void* from, int count) {
    count == lanes ? std::memcpy(to, from, sizeof(Vector)) : std::memcpy(to, from, sizeof(Element) * static_cast<size_t>(count));
  }
};

// Wraps the inline functions of the headers, because template arguments need functions with an address.
f32v decode_bf16(u16v x) { return from_bf16(x); }
u16v encode_bf16(f32v x) { return to_bf16(x); }
f32v decode_f16(u16v x) { return from_f16(x); }
u16v encode_f16(f32v x) { return to_f16(x); }
f32v decode_f8(u8v x) { return from_f8e4m3(x); }
u8v encode_f8(f32v x) { return to_f8e4m3(x); }

using Bf16 = Narrow<uint16_t, u16v, decode_bf16, encode_bf16>;
using F16 = Narrow<uint16_t, u16v, decode_f16, encode_f16>;
using F8 = Narrow<uint8_t, u8v, decode_f8, encode_f8>;

// Truncates toward zero and saturates; NaN becomes 0.
struct I32 {
  using Type = int32_t;
  static void decode(float* y, const int32_t* x, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] = static_cast<float>(x[i]);
  }
  static void encode(int32_t* y, const float* x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
      const float v = x[i];
      const bool fits = v > -2147483648.0f && v < 2147483648.0f;
      const int32_t outside = v >= 2147483648.0f ? 2147483647 : v <= -2147483648.0f ? -2147483647 - 1 : 0;
      y[i] = fits ? static_cast<int32_t>(v) : outside;
    }
  }
};

struct U8 {
  using Type = uint8_t;
  static void decode(float* y, const uint8_t* x, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] = static_cast<float>(x[i]);
  }
  static void encode(uint8_t* y, const float* x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
      const float v = x[i];
      const float low = v > 0.0f ? v : 0.0f;  // NaN and negative numbers become 0
      y[i] = static_cast<uint8_t>(static_cast<int32_t>(low < 255.0f ? low : 255.0f));
    }
  }
};

template <class From, class To>
void cast(Args& args) {
  auto* y = args.ptr<typename To::Type>();
  const auto* x = args.ptr<const typename From::Type>();
  const int64_t n = args.size();
  parallel_for(
      n, grain,
      [&](int64_t begin, int64_t end, int) {
        if constexpr (std::is_same_v<From, F32>) return To::encode(y + begin, x + begin, end - begin);
        if constexpr (std::is_same_v<To, F32>) return From::decode(y + begin, x + begin, end - begin);
        alignas(64) float buffer[block];
        for (int64_t i = begin; i < end; i += block) {
          const int64_t count = std::min(block, end - i);
          From::decode(buffer, x + i, count);
          To::encode(y + i, buffer, count);
        }
      },
      64);
}

// Converts directly, not through f32.
template <class From, class To, class F>
void direct(Args& args, F&& convert) {
  To* y = args.ptr<To>();
  const From* x = args.ptr<const From>();
  const int64_t n = args.size();
  parallel_for(
      n, grain,
      [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; i++) y[i] = convert(x[i]);
      },
      64);
}

}  // namespace

#define CASTS_FROM(name, From)                                  \
  MOE_KERNEL(moe_cast_##name##_f32) { cast<From, F32>(args); }   \
  MOE_KERNEL(moe_cast_##name##_bf16) { cast<From, Bf16>(args); } \
  MOE_KERNEL(moe_cast_##name##_f16) { cast<From, F16>(args); }   \
  MOE_KERNEL(moe_cast_##name##_f8e4m3) { cast<From, F8>(args); }

CASTS_FROM(f32, F32)
CASTS_FROM(bf16, Bf16)
CASTS_FROM(f16, F16)
CASTS_FROM(f8e4m3, F8)
CASTS_FROM(i32, I32)
CASTS_FROM(u8, U8)

#define CASTS_TO_INTEGERS(name, From)                         \
  MOE_KERNEL(moe_cast_##name##_i32) { cast<From, I32>(args); } \
  MOE_KERNEL(moe_cast_##name##_u8) { cast<From, U8>(args); }

CASTS_TO_INTEGERS(f32, F32)
CASTS_TO_INTEGERS(bf16, Bf16)
CASTS_TO_INTEGERS(f16, F16)
CASTS_TO_INTEGERS(f8e4m3, F8)

MOE_KERNEL(moe_cast_i32_i32) {
  direct<int32_t, int32_t>(args, [](int32_t x) { return x; });
}
MOE_KERNEL(moe_cast_u8_u8) {
  direct<uint8_t, uint8_t>(args, [](uint8_t x) { return x; });
}
MOE_KERNEL(moe_cast_i32_u8) {
  direct<int32_t, uint8_t>(args, [](int32_t x) { return static_cast<uint8_t>(std::min(255, std::max(0, x))); });
}
MOE_KERNEL(moe_cast_u8_i32) {
  direct<uint8_t, int32_t>(args, [](uint8_t x) { return static_cast<int32_t>(x); });
}
