// Fills memory with a 32-bit word, for any dtype: (y, word, bytes). y is aligned to 16 bytes.
#include "moe.cuh"

MOE_KERNEL((256), moe_fill, (uint8_t * y, int word, int64_t bytes)) {
  const unsigned w = (unsigned)word;
  for (int64_t i = 16 * gridThread(); i < bytes; i += 16 * gridThreads()) {
    if (i + 16 <= bytes) {
      *(uint4*)(y + i) = make_uint4(w, w, w, w);
    } else {
      for (int64_t j = i; j < bytes; j++) y[j] = (uint8_t)(w >> 8 * (j % 4));
    }
  }
}
