// Absorbed MLA decoding: what the kernels for any architecture and for Hopper share. Legend as in latent-attention.cu.
#pragma once
#include "flash.cuh"

struct LatentSizes {
  int B, T, S, H, C, V;
  float scale;
  const int* pages; // page table [B, S / P], or null and P = S
  int P;

  /// The position of row s of a sequence: the number of its page, and the row within it.
  struct Place {
    int page, row;
  };
  __device__ __forceinline__ Place place(int sequence, int s) const {
    if (pages == nullptr) return {sequence, s};
    return {pages[(int64_t)sequence * (S / P) + s / P], s % P};
  }
  /// The same as a row of the whole cache.
  __device__ __forceinline__ int64_t rowOf(int sequence, int s) const {
    const Place at = place(sequence, s);
    return (int64_t)at.page * P + at.row;
  }
};

/// This block's tile of BM rows, beginning with row `first` of a sequence, and its split of the keys (flash-decoding):
/// keys from .. to - 1. blockIdx.x counts the tiles of all sequences, blockIdx.y the splits. Splits are whole tiles of
/// BN keys, distributed evenly by the sequence's own length.
struct Part {
  int sequence, first, from, to;
  Visible visible;
  template <int BM, int BN>
  MOE_DEVICE Part of(const int* lengths, const LatentSizes& z) {
    const unsigned tiles = divUp(z.T * z.H, BM);
    const int sequence = blockIdx.x / tiles, first = blockIdx.x % tiles * BM;
    const Visible visible = Visible::of(z.T, z.S, lengths, sequence, 1);
    const int size = divUp(divUp(visible.limit, BN), (int)gridDim.y) * BN;
    const int from = min((int)blockIdx.y * size, visible.limit);
    return {sequence, first, from, min(from + size, visible.limit), visible};
  }
};

/// Where the block writes row r of its sequence's results: in the output itself, or in the partial results of its split.
MOE_DEVICE int64_t partRow(const LatentSizes& z, const Part& part, int r) { return ((int64_t)blockIdx.y * z.B + part.sequence) * z.T * z.H + r; }
