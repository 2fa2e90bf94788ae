// Fills a tensor with one value. One kernel per element size: (y, n, bits of the value).
#include "moe.h"

using namespace moe;

namespace {

template <class T>
void fill(Args& args) {
  T* y = args.ptr<T>();
  const int64_t n = args.size();
  const T value = static_cast<T>(args.size());
  parallel_for(n, 65536 / static_cast<int64_t>(sizeof(T)), [&](int64_t begin, int64_t end, int) { std::fill(y + begin, y + end, value); }, 64);
}

}  // namespace

MOE_KERNEL(moe_fill_b32) { fill<uint32_t>(args); }
MOE_KERNEL(moe_fill_b16) { fill<uint16_t>(args); }
MOE_KERNEL(moe_fill_b8) { fill<uint8_t>(args); }
