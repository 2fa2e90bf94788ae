// Rows of experts as Hopper's products over rows want them: each expert's begin at a multiple of 64 (128 in fp8) and are followed by zeros up to one.
#pragma once
#include "moe.cuh"

/// Where an expert's rows begin when they are summed over: each at a multiple of `Step`, with room for zeros up to the next one.
template <int Step = 64>
MOE_DEVICE int packedStart(const int* offsets, int expert) {
  return offsets[expert] / Step * Step + expert * Step;
}
