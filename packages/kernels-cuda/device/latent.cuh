// Absorbed MLA decode: what its kernels have in common. Legend as in latent-attention.cu.
#pragma once
#include "flash.cuh"

struct LatentSizes {
  int T, S, H, C, V;
  float scale;
  const int* pages; // [B, S / P], or null and P = S
  int P;

  /// Where row s of sequence blockIdx.z is: the number of its page, and the row in there.
  struct Place {
    int page, row;
  };
  __device__ __forceinline__ Place place(int s) const {
    if (pages == nullptr) return {(int)blockIdx.z, s};
    return {pages[(int64_t)blockIdx.z * (S / P) + s / P], s % P};
  }
  /// The same in rows of the whole cache.
  __device__ __forceinline__ int64_t rowOf(int s) const {
    const Place at = place(s);
    return (int64_t)at.page * P + at.row;
  }
};

/// The keys from .. to - 1 that part blockIdx.x of sequence blockIdx.z covers: whole tiles of BN, shared out evenly by its own length.
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

/// Where the block puts row r of its results: the output itself, or one of the parts.
MOE_DEVICE int64_t partRow(LatentSizes z, int r) { return ((int64_t)blockIdx.x * gridDim.z + blockIdx.z) * z.T * z.H + r; }
