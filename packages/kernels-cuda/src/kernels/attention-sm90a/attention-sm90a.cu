// Flash attention on Hopper, forward (after FlashAttention-3, Shah et al. 2024) and backward, with TMA copies and
// wgmma.
// A block has two warpgroups, each with 64 of the block's 128 rows (queries; for the gradients of keys and values,
// keys), and loops over tiles of BN columns. There is no producer warp: the first warp also starts the copies.
// Legend as in attention.cu. Features are padded in q [B, T, H * DK], k [B, S, G * DK], v [B, S, G * DV] and dout [B,
// T, H * DV]; tiles in shared memory are boxes of 64 features, one after the other, with a 128-byte swizzle.
#include "flash-hopper.cuh"

/// Zeroes the rows of a tile of BN rows from `first` on, by all threads of the block. They are past the end of the
/// sequence and may contain anything, and a probability of 0 times NaN is not 0.
template <class E, int D>
MOE_DEVICE void zeroRows(unsigned char* tile, int first) {
  for (int i = threadIdx.x; i < (E::BN - first) * (D / 8); i += E::Threads) {
    const int row = first + i / (D / 8), chunk = i % (D / 8);
    *(uint4*)(tile + (chunk / 8 * E::BN + row) * 128 + chunk % 8 * 16) = make_uint4(0, 0, 0, 0);
  }
  fenceProxyAsync();
  __syncthreads();
}

/// Forward: two warpgroups with 64 queries each, against tiles of BN keys.
template <int DK_, int DV_, int BN>
struct FlashHopper : WarpgroupTile<BN> {
  static constexpr int BM = 128, DK = DK_, DV = DV_, Threads = 256, Warps = 8, Stages = 2;
  static constexpr int bytesQ = BM * DK * 2, bytesK = BN * DK * 2, bytesV = BN * DV * 2;
  MOE_DEVICE int row(int i) { return threadIdx.x / 128 * 64 + WarpgroupTile<BN>::groupRow(i); }
};

struct Sizes {
  int T, S, H, G, Dk, Dv, causal;
  float scale;
};

/// The forward pass. A block computes BM queries of head blockIdx.y of batch blockIdx.z, against all keys they attend
/// to, BN at a time. The product with values of a tile is issued after the product with keys of the next one, so that
/// the tensor cores are busy while exponentials are computed (intra-warpgroup pipelining in FlashAttention-3).
/// PingPong: the warpgroups also take turns in issuing products, so that one's exponentials overlap with the other's
/// products (its pingpong scheduling).
template <class E, bool HasStarts, bool PingPong = false>
MOE_DEVICE void attention(float* out, float* lse, const TensorMap& q, const TensorMap& k, const TensorMap& v, const int* lengths, const int* firstKeys, Sizes z) {
  MOE_DYNAMIC_SHARED(dynamic);
  MOE_SHARED(Barrier, ready, [1]);
  MOE_SHARED(Barrier, barriers, [4][E::Stages]);
  MOE_SHARED(Barrier, turns, [2]);
  Barrier *const fullKeys = warpUniform(barriers[0]), *const emptyKeys = fullKeys + E::Stages, *const fullValues = emptyKeys + E::Stages, *const emptyValues = fullValues + E::Stages;
  unsigned char* const queries = warpUniform(dynamic + (-sharedAddress(dynamic) & 1023));
  unsigned char* const keys = queries + E::bytesQ;
  unsigned char* const values = keys + E::Stages * E::bytesK;

  // The last queries attend to the most keys: they start first.
  const int b = blockIdx.z, h = blockIdx.y, g = h / (z.H / z.G), first = (gridDim.x - 1 - blockIdx.x) * E::BM;
  const Visible visible = Visible::of(z.T, z.S, lengths, b, z.causal);
  const Starts<HasStarts> starts = Starts<HasStarts>::of(firstKeys, z.T, b);
  const auto begins = starts.range(first, E::BM);
  const int tiles = divUp(max(0, visible.keys(min(first + E::BM, z.T) - 1) - begins.least), E::BN), seenByAll = visible.keys(first);
  const int warp = __shfl_sync(wholeWarp, (int)threadIdx.x / 32, 0), group = warp / 4, lane = threadIdx.x % 32;
  auto stage = [](int t) { return t % E::Stages; };
  auto parity = [](int t) { return t / E::Stages & 1; };
  // Called by one thread when the stage's previous tile is no longer needed.
  auto loadKeys = [&](int t) {
    if (t >= tiles) return;
    Barrier* const full = &fullKeys[stage(t)];
    arriveAndExpectTx(full, E::bytesK);
    for (int d = 0; d < E::DK; d += 64) tmaLoad(keys + stage(t) * E::bytesK + d * E::BN * 2, k, full, g * E::DK + d, begins.least + t * E::BN, b);
  };
  auto loadValues = [&](int t) {
    if (t >= tiles) return;
    Barrier* const full = &fullValues[stage(t)];
    arriveAndExpectTx(full, E::bytesV);
    for (int d = 0; d < E::DV; d += 64) tmaLoad(values + stage(t) * E::bytesV + d * E::BN * 2, v, full, g * E::DV + d, begins.least + t * E::BN, b);
  };
  if (threadIdx.x == 0) {
    initBarrier(ready, 1);
    for (int s = 0; s < E::Stages; s++) {
      initBarrier(&fullKeys[s], 1);
      initBarrier(&fullValues[s], 1);
      initBarrier(&emptyKeys[s], E::Warps); // one arrival per warp
      initBarrier(&emptyValues[s], E::Warps);
    }
    for (int i = 0; PingPong && i < 2; i++) initBarrier(&turns[i], E::Warps / 2);
    fenceBarrierInit();
    if (tiles > 0) {
      arriveAndExpectTx(ready, E::bytesQ);
      for (int d = 0; d < E::DK; d += 64) tmaLoad(queries + d * E::BM * 2, q, ready, h * E::DK + d, first, b);
    }
    loadKeys(0);
    loadValues(0);
    loadKeys(1);
  }
  __syncthreads();

  typename E::Scores s;
  typename E::template Accumulator<E::DV> sums = {};
  uint32_t p[E::BN / 16][4];
  OnlineSoftmax<E> softmax;
  OnlineSoftmax<E>::begin(softmax);
  const uint64_t queriesAt = warpUniform(kMajorDescriptor(queries + group * 64 * 128, 0)), keysAt = warpUniform(kMajorDescriptor(keys, 0)), valuesAt = warpUniform(mnMajorTileDescriptor(values, E::BN));
  auto multiplyKeys = [&](int t) {
    const uint64_t own = advanceDescriptor(queriesAt), tile = advanceDescriptor(keysAt, stage(t) * (E::bytesK / 16));
#pragma unroll
    for (int d = 0; d < E::DK; d += 16) wgmma<E::BN>(s.v, kMajorAt(own, E::BM, 0, d), kMajorAt(tile, E::BN, 0, d));
    wgmmaCommit();
  };
  auto multiplyValues = [&](int t) {
    const uint64_t tile = advanceDescriptor(valuesAt, stage(t) * (E::bytesV / 16));
#pragma unroll
    for (int j = 0; j < E::BN; j += 16) wgmma<E::DV, true>(sums.v, p[j / 16], mnMajorAt(tile, E::BN, j, 0));
    wgmmaCommit();
  };
  auto exponentials = [&](int t) {
    const int key = begins.least + t * E::BN;
    if (key + E::BN > seenByAll) {
#pragma unroll
      for (int i = 0; i < E::Rows; i++) {
        const int left = visible.keys(first + E::row(i)) - key - E::column(0);
#pragma unroll
        for (int j = 0; j < E::Columns; j++) E::at(s, i, j) = E::columnStep(j) < left ? E::at(s, i, j) : -infinity();
      }
    }
    if (HasStarts && key < begins.most) {
#pragma unroll
      for (int i = 0; i < E::Rows; i++) {
        const int before = starts.from(first + E::row(i)) - key - E::column(0);
#pragma unroll
        for (int j = 0; j < E::Columns; j++) E::at(s, i, j) = E::columnStep(j) < before ? -infinity() : E::at(s, i, j);
      }
    }
    return OnlineSoftmax<E>::exponentials(softmax, s, z.scale * E::Unit);
  };

  // The first turn is that of the first warpgroup.
  auto waitForTurn = [&](int t) {
    if (PingPong) wait(&turns[group], (t + 1 - group) & 1);
  };
  auto endTurn = [&] {
    if (!PingPong) return;
    __syncwarp();
    if (lane == 0) arrive(&turns[1 - group]);
  };

  if (tiles > 0) {
    wait(ready, 0);
    wait(&fullKeys[0], 0);
    E::clear(s);
    waitForTurn(0);
    wgmmaFence(s.v);
    multiplyKeys(0);
    endTurn();
    wgmmaWait<0>(s.v);
    if (lane == 0) arrive(&emptyKeys[0]);
    auto shrink = exponentials(0);
    E::pack(p, s);
    for (int t = 1; t < tiles; t++) {
      wait(&fullKeys[stage(t)], parity(t));
      E::clear(s);
      waitForTurn(t);
      wgmmaFence(s.v);
      multiplyKeys(t);
      // Overlaps with these products.
      OnlineSoftmax<E>::template apply<E::DV>(shrink, sums);
      wait(&fullValues[stage(t - 1)], parity(t - 1));
      wgmmaFence(sums.v);
      multiplyValues(t - 1);
      endTurn();
      // The whole warp waits, not only the thread that copies: otherwise the compiler would hold uniform values in
      // registers of each thread.
      if (warp == 0) {
        if (t + 1 < tiles) wait(&emptyKeys[stage(t + 1)], parity(t + 1) ^ 1);
        if (lane == 0) loadKeys(t + 1);
        wait(&emptyValues[stage(t)], parity(t) ^ 1);
        if (lane == 0) loadValues(t);
      }
      __syncwarp(); // the wait below is for the whole warp
      wgmmaWait<1>(s.v);
      fenceAccumulator(s.v);
      if (lane == 0) arrive(&emptyKeys[stage(t)]);
      shrink = exponentials(t);
      computeFirst(softmax.total);
      wgmmaWait<0>(sums.v);
      if (lane == 0) arrive(&emptyValues[stage(t - 1)]);
      E::pack(p, s);
    }
    OnlineSoftmax<E>::template apply<E::DV>(shrink, sums);
    const int last = tiles - 1, left = visible.limit - begins.least - last * E::BN;
    wait(&fullValues[stage(last)], parity(last));
    if (left < E::BN && visible.limit < z.S) zeroRows<E, E::DV>(values + stage(last) * E::bytesV, left);
    wgmmaFence(sums.v);
    multiplyValues(last);
    wgmmaWait<0>(sums.v);
  }

#pragma unroll
  for (int i = 0; i < E::Rows; i++) {
    float rowLse;
    const float factor = OnlineSoftmax<E>::finish(softmax, i, rowLse);
    const int t = first + E::row(i);
    if (t < z.T && E::column(0) == 0) lse[((int64_t)b * z.H + h) * z.T + t] = rowLse;
    storeRowIf<E, E::DV>(t < z.T, out + (((int64_t)b * z.T + t) * z.H + h) * z.Dv, sums, i, z.Dv, factor);
  }
}

/// The number of queries that per-query arrays have room for: a multiple of 64.
MOE_DEVICE int roomFor(int queries) { return divUp(queries, 64) * 64; }

/// Computes for each query, one warp each: `shift`, the log-sum-exp in Unit, and delta = sum(dout out). Padding gets
/// zeros.
MOE_KERNEL((256), moe_attention_delta_sm90a, (float* delta, float* shift, const float* lse, const float* out, const float* dout, int B, int T, int H, int D)) {
  const int padded = roomFor(T), lane = threadIdx.x % 32;
  const int64_t rows = (int64_t)B * H * padded;
  for (int64_t row = gridThread() / 32; row < rows; row += gridThreads() / 32) {
    const int t = (int)(row % padded);
    const int64_t h = row / padded % H, b = row / padded / H, from = ((b * T + t) * H + h) * D;
    float sum = 0.f;
    for (int d = lane; d < D && t < T; d += 32) sum = fmaf(out[from + d], dout[from + d], sum);
    sum = warpSum(sum);
    if (lane > 0) continue;
    delta[row] = sum;
    shift[row] = t < T ? lse[(b * H + h) * T + t] * WarpgroupTile<64>::Unit : 0.f;
  }
}

/// Backward. A block has 128 rows, 64 per warpgroup, and processes all columns, BN at a time. For the gradients of keys
/// and values, rows are keys and columns are queries; for those of queries, the reverse. Either way, the scores and the
/// gradients of the probabilities are products over DK and DV features of rows and columns.
template <int DK_, int DV_, int BN>
struct BackwardHopper : WarpgroupTile<BN> {
  static constexpr int BM = 128, DK = DK_, DV = DV_, Stages = 3, Threads = 256, Warps = 8;
  static constexpr int rowBytes = BM * (DK + DV) * 2, stageBytes = BN * (DK + DV) * 2;
  MOE_DEVICE int row(int i) { return threadIdx.x / 128 * 64 + WarpgroupTile<BN>::groupRow(i); }
};

/// The position of a tile's rows in memory: head, first row, batch.
struct TileCoord {
  int head, row, batch;
};
/// Iterates over tiles of BN rows, starting at `coord`, up to row `end`, and then over the next head from row `begin`
/// on.
template <int BN>
struct TileIterator {
  TileCoord coord;
  int begin, end;
  __device__ __forceinline__ TileCoord next() {
    const TileCoord now = coord;
    coord.row += BN;
    if (coord.row >= end) coord.row = begin, coord.head++;
    return now;
  }
};

/// The backward main loop. Copies the block's rows (with OnlyK only their K features) once and, up to `Stages` ahead,
/// the tiles of columns given by `iterator`, with `MoreBytes` bytes that `copyMore(coord, stage, barrier)` copies.
/// `step(coord, stage, columns)` is called when a tile has arrived, and must return only when all products that read it
/// have completed.
template <class E, bool OnlyK, int MoreBytes, class CopyMore, class Step>
MOE_DEVICE void mainLoop(unsigned char* rows, const TensorMap& rowsK, const TensorMap& rowsV, TileCoord coord, const TensorMap& columnsK, const TensorMap& columnsV, int tiles, TileIterator<E::BN> iterator, CopyMore copyMore, Step step) {
  MOE_SHARED(Barrier, ready, [1]);
  MOE_SHARED(Barrier, barriers, [2][E::Stages]);
  Barrier *const full = warpUniform(barriers[0]), *const empty = full + E::Stages;
  unsigned char* const stages = rows + E::rowBytes;
  const int warp = __shfl_sync(wholeWarp, (int)threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    initBarrier(ready, 1);
    for (int s = 0; s < E::Stages; s++) {
      initBarrier(&full[s], 1);
      initBarrier(&empty[s], E::Warps);
    }
    fenceBarrierInit();
    if (tiles > 0) {
      arriveAndExpectTx(ready, OnlyK ? E::BM * E::DK * 2 : E::rowBytes);
      for (int d = 0; d < E::DK; d += 64) tmaLoad(rows + d * E::BM * 2, rowsK, ready, coord.head * E::DK + d, coord.row, coord.batch);
      for (int d = 0; d < E::DV && !OnlyK; d += 64) tmaLoad(rows + (E::DK + d) * E::BM * 2, rowsV, ready, coord.head * E::DV + d, coord.row, coord.batch);
    }
  }
  // Called by the first warp when the stage's previous tile is no longer needed.
  TileIterator<E::BN> ahead = iterator;
  auto load = [&](int stage) {
    const TileCoord from = ahead.next();
    if (lane > 0) return;
    unsigned char* const to = stages + stage * E::stageBytes;
    arriveAndExpectTx(&full[stage], E::stageBytes + MoreBytes);
    copyMore(from, stage, &full[stage]);
    for (int d = 0; d < E::DK; d += 64) tmaLoad(to + d * E::BN * 2, columnsK, &full[stage], from.head * E::DK + d, from.row, from.batch);
    for (int d = 0; d < E::DV; d += 64) tmaLoad(to + (E::DK + d) * E::BN * 2, columnsV, &full[stage], from.head * E::DV + d, from.row, from.batch);
  };
  for (int t = 0; warp == 0 && t < min(tiles, E::Stages); t++) load(t);
  __syncthreads();
  if (tiles > 0) wait(ready, 0);
  for (int t = 0, stage = 0, parity = 0; t < tiles; t++) {
    wait(&full[stage], parity);
    step(iterator.next(), stage, stages + stage * E::stageBytes);
    if (MoreBytes > 0) fenceProxyAsync(); // threads have read what the copy engine will overwrite
    __syncwarp();
    if (lane == 0) arrive(&empty[stage]);
    // The other warpgroup is rarely more than one tile behind. The whole warp waits, not only the thread that copies:
    // otherwise the compiler would hold uniform values in registers of each thread.
    const int before = stage > 0 ? stage - 1 : E::Stages - 1;
    if (warp == 0 && t > 0 && t - 1 + E::Stages < tiles) {
      wait(&empty[before], stage > 0 ? parity : parity ^ 1);
      load(before);
    }
    __syncwarp();
    if (++stage == E::Stages) stage = 0, parity ^= 1;
  }
}

/// Computes the scores of this warpgroup's rows and a tile of columns, from their K features, and, unless OnlyK, the
/// gradients of the probabilities, from their V features. The latter are a group of their own, which may still be in
/// flight on return.
template <class E, bool OnlyK = false>
MOE_DEVICE void wgmmaScores(typename E::Scores& s, typename E::Scores& gradients, uint64_t rows, uint64_t columns) {
  const uint64_t rowsK = advanceDescriptor(rows), columnsK = advanceDescriptor(columns), rowsV = advanceDescriptor(rows, E::DK * E::BM / 8), columnsV = advanceDescriptor(columns, E::DK * E::BN / 8);
  wgmmaFence(s.v);
  if (!OnlyK) wgmmaFence(gradients.v);
  wgmma<E::BN, false, false, true>(s.v, rowsK, columnsK);
#pragma unroll
  for (int d = 16; d < E::DK; d += 16) wgmma<E::BN>(s.v, kMajorAt(rowsK, E::BM, 0, d), kMajorAt(columnsK, E::BN, 0, d));
  wgmmaCommit();
  if (OnlyK) {
    wgmmaWait<0>(s.v);
    return;
  }
  wgmma<E::BN, false, false, true>(gradients.v, rowsV, columnsV);
#pragma unroll
  for (int d = 16; d < E::DV; d += 16) wgmma<E::BN>(gradients.v, kMajorAt(rowsV, E::BM, 0, d), kMajorAt(columnsV, E::BN, 0, d));
  wgmmaCommit();
  wgmmaWait<1>(s.v);
  fenceAccumulator(s.v);
}

/// Gradients of 128 keys and/or values of key head blockIdx.y. The query heads that share the key head are processed
/// one after the other.
template <class E, bool HasStarts, bool OfKeys, bool OfValues>
MOE_DEVICE void keysBackward(float* dk, float* dv, const TensorMap& q, const TensorMap& k, const TensorMap& v, const TensorMap& dout, const float* shift, const float* delta, const int* lengths, const int* firstKeys, Sizes z) {
  MOE_DYNAMIC_SHARED(dynamic);
  MOE_SHARED(__align__(16) float, perQuery, [E::Stages][2][E::BN]); // log-sum-exp, delta
  unsigned char* const rows = warpUniform(dynamic + (-sharedAddress(dynamic) & 1023));
  const uint64_t rowsAt = warpUniform(kMajorDescriptor(rows + threadIdx.x / 128 * 64 * 128, 0)), columnsAt = warpUniform(kMajorDescriptor(rows + E::rowBytes, 0));
  const uint64_t acrossAt = warpUniform(mnMajorTileDescriptor(rows + E::rowBytes, E::BN));
  const int b = blockIdx.z, g = blockIdx.y, first = blockIdx.x * E::BM, shares = z.H / z.G;
  const Visible visible = Visible::of(z.T, z.S, lengths, b, z.causal);
  const Starts<HasStarts> starts = Starts<HasStarts>::of(firstKeys, z.T, b);
  // Tiles of queries of each head, from the first to the last query that attends to a key of this block.
  const int begin = visible.firstQuery(first) / E::BN * E::BN, end = starts.template endOfQueries<E::Threads>(begin, first + E::BM);
  const int perHead = first < visible.limit ? max(0, divUp(end - begin, E::BN)) : 0;
  auto copyQueries = [&](TileCoord from, int stage, Barrier* barrier) {
    const int64_t at = ((int64_t)b * z.H + from.head) * roomFor(z.T) + from.row;
    bulkLoad(perQuery[stage][0], shift + at, E::BN * 4, barrier);
    bulkLoad(perQuery[stage][1], delta + at, E::BN * 4, barrier);
  };

  typename E::template Accumulator<E::DK> sumsK = {};
  typename E::template Accumulator<E::DV> sumsV = {};
  mainLoop<E, !OfKeys, 2 * E::BN * 4>(rows, k, v, {g, first, b}, q, dout, perHead * shares, {{g * shares, begin, b}, begin, begin + perHead * E::BN}, copyQueries, [&](TileCoord coord, int stage, const unsigned char*) {
    typename E::Scores s, gradients;
    wgmmaScores<E, !OfKeys>(s, gradients, rowsAt, advanceDescriptor(columnsAt, stage * (E::stageBytes / 16)));
    const auto ofQuery = [&](int which, int j) { return *(const float2*)(perQuery[stage][which] + E::column(j)); };
#pragma unroll
    for (int j = 0; j < E::Columns; j += 2) {
      const float2 shift = ofQuery(0, j);
#pragma unroll
      for (int i = 0; i < E::Rows; i++) {
        E::at(s, i, j) = exp2Fast(E::at(s, i, j) * (z.scale * E::Unit) - shift.x);
        E::at(s, i, j + 1) = exp2Fast(E::at(s, i, j + 1) * (z.scale * E::Unit) - shift.y);
      }
    }
    computeFirst(s.v);
    if (OfKeys) wgmmaWait<0>(gradients.v);
#pragma unroll
    for (int j = 0; j < E::Columns && OfKeys; j += 2) {
      const float2 delta = ofQuery(1, j);
#pragma unroll
      for (int i = 0; i < E::Rows; i++) {
        E::at(gradients, i, j) -= delta.x;
        E::at(gradients, i, j + 1) -= delta.y;
      }
    }
    if (coord.row + E::BN > z.T || first + E::BM > visible.keys(coord.row)) {
#pragma unroll
      for (int j = 0; j < E::Columns; j++) {
        const int query = coord.row + E::column(j), seen = query < z.T ? visible.keys(query) : 0;
#pragma unroll
        for (int i = 0; i < E::Rows; i++) {
          const bool sees = first + E::row(i) < seen;
          E::at(s, i, j) = sees ? E::at(s, i, j) : 0.f;
          if (OfKeys) E::at(gradients, i, j) = sees ? E::at(gradients, i, j) : 0.f;
        }
      }
    }
    if (starts.anyBehind(coord.row, E::BN, first)) {
#pragma unroll
      for (int j = 0; j < E::Columns; j++) {
        const int before = starts.from(coord.row + E::column(j)) - first;
#pragma unroll
        for (int i = 0; i < E::Rows; i++) E::at(s, i, j) = E::row(i) < before ? 0.f : E::at(s, i, j);
      }
    }
#pragma unroll
    for (int i = 0; i < E::BN / 2 && OfKeys; i++) gradients.v[i] *= s.v[i];
    uint32_t p[E::BN / 16][4], ds[E::BN / 16][4];
    if (OfValues) E::pack(p, s);
    if (OfKeys) E::pack(ds, gradients);
    if (OfValues) wgmmaFence(sumsV.v);
    if (OfKeys) wgmmaFence(sumsK.v);
    const uint64_t acrossK = advanceDescriptor(acrossAt, stage * (E::stageBytes / 16)), acrossV = advanceDescriptor(acrossK, E::DK * E::BN / 8);
#pragma unroll
    for (int t = 0; t < E::BN && OfValues; t += 16) wgmma<E::DV, true>(sumsV.v, p[t / 16], mnMajorAt(acrossV, E::BN, t, 0));
#pragma unroll
    for (int t = 0; t < E::BN && OfKeys; t += 16) wgmma<E::DK, true>(sumsK.v, ds[t / 16], mnMajorAt(acrossK, E::BN, t, 0));
    wgmmaCommit();
    wgmmaWait<0>(s.v);
    if (OfValues) fenceAccumulator(sumsV.v);
    if (OfKeys) fenceAccumulator(sumsK.v);
  });

#pragma unroll
  for (int i = 0; i < E::Rows; i++) {
    const int key = first + E::row(i);
    const int64_t at = ((int64_t)b * z.S + key) * z.G + g;
    if (OfKeys) storeRowIf<E, E::DK>(key < z.S, dk + at * z.Dk, sumsK, i, z.Dk, z.scale);
    if (OfValues) storeRowIf<E, E::DV>(key < z.S, dv + at * z.Dv, sumsV, i, z.Dv, 1.f);
  }
}

/// Gradients of 128 queries of head blockIdx.y.
template <class E, bool HasStarts>
MOE_DEVICE void queriesBackward(float* dq, const TensorMap& q, const TensorMap& k, const TensorMap& v, const TensorMap& dout, const float* shift, const float* delta, const int* lengths, const int* firstKeys, Sizes z) {
  MOE_DYNAMIC_SHARED(dynamic);
  unsigned char* const rows = warpUniform(dynamic + (-sharedAddress(dynamic) & 1023));
  const uint64_t rowsAt = warpUniform(kMajorDescriptor(rows + threadIdx.x / 128 * 64 * 128, 0)), columnsAt = warpUniform(kMajorDescriptor(rows + E::rowBytes, 0));
  const uint64_t acrossAt = warpUniform(mnMajorTileDescriptor(rows + E::rowBytes, E::BN));
  const int b = blockIdx.z, h = blockIdx.y, g = h / (z.H / z.G), first = (gridDim.x - 1 - blockIdx.x) * E::BM;
  const Visible visible = Visible::of(z.T, z.S, lengths, b, z.causal);
  const Starts<HasStarts> starts = Starts<HasStarts>::of(firstKeys, z.T, b);
  const auto begins = starts.range(first, E::BM);
  const int end = visible.keys(min(first + E::BM, z.T) - 1), seenByAll = visible.keys(first), tiles = divUp(max(0, end - begins.least), E::BN);

  float rowShift[E::Rows], rowDelta[E::Rows];
  int seen[E::Rows];
#pragma unroll
  for (int i = 0; i < E::Rows; i++) {
    const int t = first + E::row(i);
    const int64_t at = ((int64_t)b * z.H + h) * roomFor(z.T) + t;
    rowShift[i] = t < z.T ? shift[at] : 0.f;
    rowDelta[i] = t < z.T ? delta[at] : 0.f;
    seen[i] = visible.keys(t);
  }
  typename E::template Accumulator<E::DK> sums = {};
  auto nothing = [](TileCoord, int, Barrier*) {};
  mainLoop<E, false, 0>(rows, q, dout, {h, first, b}, k, v, tiles, {{g, begins.least, b}, 0, 0x7fffffff}, nothing, [&](TileCoord coord, int stage, unsigned char* columns) {
    const int key = coord.row;
    if (key + E::BN > end) zeroRows<E, E::DK>(columns, end - key);
    typename E::Scores s, gradients;
    wgmmaScores<E>(s, gradients, rowsAt, advanceDescriptor(columnsAt, stage * (E::stageBytes / 16)));
#pragma unroll
    for (int i = 0; i < E::Rows; i++) {
#pragma unroll
      for (int j = 0; j < E::Columns; j++) E::at(s, i, j) = exp2Fast(E::at(s, i, j) * (z.scale * E::Unit) - rowShift[i]);
    }
    computeFirst(s.v);
    wgmmaWait<0>(gradients.v);
#pragma unroll
    for (int i = 0; i < E::Rows; i++) {
#pragma unroll
      for (int j = 0; j < E::Columns; j++) E::at(gradients, i, j) = (E::at(gradients, i, j) - rowDelta[i]) * E::at(s, i, j);
    }
    if (key + E::BN > seenByAll) {
#pragma unroll
      for (int i = 0; i < E::Rows; i++) {
#pragma unroll
        for (int j = 0; j < E::Columns; j++) E::at(gradients, i, j) = key + E::column(j) < seen[i] ? E::at(gradients, i, j) : 0.f;
      }
    }
    if (HasStarts && key < begins.most) {
#pragma unroll
      for (int i = 0; i < E::Rows; i++) {
        const int before = starts.from(first + E::row(i)) - key;
#pragma unroll
        for (int j = 0; j < E::Columns; j++) E::at(gradients, i, j) = E::column(j) < before ? 0.f : E::at(gradients, i, j);
      }
    }
    uint32_t ds[E::BN / 16][4];
    E::pack(ds, gradients);
    wgmmaFence(sums.v);
    const uint64_t across = advanceDescriptor(acrossAt, stage * (E::stageBytes / 16));
#pragma unroll
    for (int j = 0; j < E::BN; j += 16) wgmma<E::DK, true>(sums.v, ds[j / 16], mnMajorAt(across, E::BN, j, 0));
    wgmmaCommit();
    wgmmaWait<0>(sums.v);
  });

#pragma unroll
  for (int i = 0; i < E::Rows; i++) {
    const int t = first + E::row(i);
    storeRowIf<E, E::DK>(t < z.T, dq + (((int64_t)b * z.T + t) * z.H + h) * z.Dk, sums, i, z.Dk, z.scale);
  }
}

#define ATTENTION_FORWARD(name, Engine, HasStarts, PingPong)                                                                                                         \
  MOE_KERNEL((Engine::Threads, 1), moe_attention_fwd_sm90a_##name, (float* out, float* lse, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, const int* lengths, const int* starts, int T, int S, int H, int G, int Dk, int Dv, int causal, float scale)) { \
    attention<Engine, HasStarts, PingPong>(out, lse, q, k, v, lengths, starts, {T, S, H, G, Dk, Dv, causal, scale});                                                 \
  }
#define ATTENTION_KEYS(of, name, Engine, HasStarts, OfKeys, OfValues)                                                                                             \
  MOE_KERNEL((Engine::Threads, 1), moe_attention_bwd_##of##_sm90a_##name, (float* dk, float* dv, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap dout, const float* shift, const float* delta, const int* lengths, const int* starts, int T, int S, int H, int G, int Dk, int Dv, int causal, float scale)) { \
    keysBackward<Engine, HasStarts, OfKeys, OfValues>(dk, dv, q, k, v, dout, shift, delta, lengths, starts, {T, S, H, G, Dk, Dv, causal, scale});                 \
  }
#define ATTENTION_QUERIES(name, Engine, HasStarts)                                                                                                                \
  MOE_KERNEL((Engine::Threads, 1), moe_attention_bwd_queries_sm90a_##name, (float* dq, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap dout, const float* shift, const float* delta, const int* lengths, const int* starts, int T, int S, int H, int G, int Dk, int Dv, int causal, float scale)) { \
    queriesBackward<Engine, HasStarts>(dq, q, k, v, dout, shift, delta, lengths, starts, {T, S, H, G, Dk, Dv, causal, scale});                                    \
  }

// Forward is also compiled with pingpong scheduling (_pingpong), to compare both (bench cuda-sweep).
#define ATTENTION(name, Forward, Backward)                      \
  ATTENTION_FORWARD(name, Forward, false, false)                \
  ATTENTION_FORWARD(name##_starts, Forward, true, false)        \
  ATTENTION_FORWARD(name##_pingpong, Forward, false, true)         \
  ATTENTION_QUERIES(name, Backward, false)                      \
  ATTENTION_QUERIES(name##_starts, Backward, true)
#define ATTENTION_KEYS_TOGETHER(name, Backward)                 \
  ATTENTION_KEYS(keys, name, Backward, false, true, true)       \
  ATTENTION_KEYS(keys, name##_starts, Backward, true, true, true)
#define ATTENTION_KEYS_APART(name, Backward)                    \
  ATTENTION_KEYS(keys, name, Backward, false, true, false)      \
  ATTENTION_KEYS(keys, name##_starts, Backward, true, true, false) \
  ATTENTION_KEYS(values, name, Backward, false, false, true)    \
  ATTENTION_KEYS(values, name##_starts, Backward, true, false, true)

using Small = FlashHopper<64, 64, 128>;
using Medium = FlashHopper<128, 128, 128>;
using Large = FlashHopper<192, 128, 128>;
// Two stages have room for 80 keys, as in FlashAttention-3.
using Huge = FlashHopper<256, 256, 80>;
using SmallBackward = BackwardHopper<64, 64, 64>;
using MediumBackward = BackwardHopper<128, 128, 64>;
using LargeBackward = BackwardHopper<192, 128, 64>;
// The rows and three stages fill shared memory, and one gradient fills the registers.
using HugeBackward = BackwardHopper<256, 256, 32>;
ATTENTION(64_64, Small, SmallBackward)
ATTENTION(128_128, Medium, MediumBackward)
ATTENTION(192_128, Large, LargeBackward)
ATTENTION(256_256, Huge, HugeBackward)
ATTENTION_KEYS_TOGETHER(64_64, SmallBackward)
ATTENTION_KEYS_TOGETHER(128_128, MediumBackward)
ATTENTION_KEYS_TOGETHER(192_128, LargeBackward)
ATTENTION_KEYS_APART(256_256, HugeBackward)
