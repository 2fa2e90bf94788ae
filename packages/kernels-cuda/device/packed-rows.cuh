// The packed layout of experts' rows, for products on Hopper that sum over rows: each expert's rows start at a multiple
// of 64 (128 in fp8) and are padded with zeros to a multiple of it.
#pragma once
#include "moe.cuh"

/// The first packed row of an expert: a multiple of `Step`, with room for the padding of all experts before it.
template <int Step = 64>
MOE_DEVICE int packedStart(const int* offsets, int expert) {
  return offsets[expert] / Step * Step + expert * Step;
}
