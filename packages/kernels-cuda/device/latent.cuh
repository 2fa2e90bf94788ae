// Absorbed MLA decoding: what the kernels for any architecture and for Hopper share. Legend as in latent-attention.cu.
#pragma once
#include "flash.cuh"

struct LatentSizes {
  int T, S, H, C, V;
  float scale;
  const int* pages; // page table [B, S / P], or null and P = S
  int P;

  /// The position of row s of sequence blockIdx.z: the number of its page, and the row within it.
  struct Place {
    int page, row;
  };
  __device__ __forceinline__ Place place(int s) const {
    if (pages == nullptr) return {(int)blockIdx.z, s};
    return {pages[(int64_t)blockIdx.z * (S / P) + s / P], s % P};
  }
  /// The same as a row of the whole cache.
  __device__ __forceinline__ int64_t rowOf(int s) const {
    const Place at = place(s);
    return (int64_t)at.page * P + at.row;
  }
};

/// The split of keys (flash-decoding): keys from .. to - 1 of sequence blockIdx.z that belong to split blockIdx.x.
/// Splits are whole tiles of BN, distributed evenly by the sequence's own length.
struct Part {
  int from, to;
  Visible visible;
  template <int BN>
  MOE_DEVICE Part of(const int* lengths, LatentSizes z) {
    const Visible visible = Visible::of(z.T, z.S, lengths, blockIdx.z, 1);
    const int size = divUp(divUp(visible.limit, BN), (int)gridDim.x) * BN;
    const int from = min((int)blockIdx.x * size, visible.limit);
    return {from, min(from + size, visible.limit), visible};
  }
};

/// Where the block writes row r of its results: in the output itself, or in the partial results of its split.
MOE_DEVICE int64_t partRow(LatentSizes z, int r) { return ((int64_t)blockIdx.x * gridDim.z + blockIdx.z) * z.T * z.H + r; }
