// Block-wise quantization to f8e4m3 with one f32 scale per block. Kernels end in _t<threads per block of the matrix>.
#include "four.cuh"

constexpr float largestF8 = 448.f;

// Stores four codes of a row: columns i .. i+3 of n.
MOE_DEVICE void storeCodes(uint8_t* to, int i, int n, const Four& x, float scale) {
  uint8_t code[4];
  for (int k = 0; k < 4; k++) code[k] = toF8e4m3(x.v[k] / scale).bits;
  if (i + 4 <= n && reinterpret_cast<uintptr_t>(to + i) % 4 == 0) {
    *reinterpret_cast<uint32_t*>(to + i) = code[0] | code[1] << 8 | code[2] << 16 | (uint32_t)code[3] << 24;
    return;
  }
  for (int k = 0; k < 4; k++) {
    if (i + k < n) to[i + k] = code[k];
  }
}

// Legend: the matrix is R x C; a row of blocks has `across` blocks of br x bc. A group of Threads threads processes one
// block, whose vectors of four elements are numbered row by row. Each thread holds its first `Held` vectors in
// registers and reads the others twice.
template <int Threads, int Held>
MOE_DEVICE void quantize(uint8_t* q, float* scales, const float* x, int64_t blocks, int across, int R, int C, int br, int bc) {
  const int64_t block = (int64_t)blockIdx.x * (blockDim.x / Threads) + threadIdx.x / Threads;
  if (block >= blocks) return;
  const int row = (int)(block / across) * br, column = (int)(block % across) * bc;
  const int rows = br < R - row ? br : R - row, columns = bc < C - column ? bc : C - column;
  const int perRow = divUp(columns, 4), vectors = rows * perRow, lane = (int)threadIdx.x % Threads;
  const int64_t corner = (int64_t)row * C + column;
  const auto start = [&](int v) { return corner + (int64_t)(v / perRow) * C; };
  const auto read = [&](int v) { return load4<false>(x + start(v), v % perRow * 4, columns); };
  float top = 0.f;
  const auto meet = [&](const Four& f) {
    for (int k = 0; k < 4; k++) top = maxOrNan(top, fabsf(f.v[k]));
  };
  Four held[Held];
#pragma unroll
  for (int j = 0; j < Held; j++) {
    const int v = lane + Threads * j;
    held[j] = v < vectors ? read(v) : Four{};
  }
#pragma unroll
  for (int j = 0; j < Held; j++) meet(held[j]);
  for (int v = lane + Threads * Held; v < vectors; v += Threads) meet(read(v));
  top = blockMax<Threads>(top);
  const float quotient = top / largestF8, scale = quotient == 0.f ? 1.f : quotient;
  if (lane == 0) scales[block] = scale;
#pragma unroll
  for (int j = 0; j < Held; j++) {
    const int v = lane + Threads * j;
    if (v < vectors) storeCodes(q + start(v), v % perRow * 4, columns, held[j], scale);
  }
  for (int v = lane + Threads * Held; v < vectors; v += Threads) {
    storeCodes(q + start(v), v % perRow * 4, columns, read(v), scale);
  }
}

MOE_KERNEL((128), moe_quantize_f32_t32,
           (uint8_t* q, float* scales, const float* x, int64_t blocks, int across, int R, int C, int br, int bc)) {
  quantize<32, 2>(q, scales, x, blocks, across, R, C, br, bc);
}
MOE_KERNEL((512), moe_quantize_f32_t512,
           (uint8_t* q, float* scales, const float* x, int64_t blocks, int across, int R, int C, int br, int bc)) {
  quantize<512, 8>(q, scales, x, blocks, across, R, C, br, bc);
}
