// Flash attention on Hopper, forward (after Shah et al. 2024) and backward. Legend as in attention.cu; features lie
// padded in q [B, T, H * DK], k [B, S, G * DK], v [B, S, G * DV] and dout [B, T, H * DV].
#include "flash-hopper.cuh"

/// Zeros for the rows from `first` on of a tile of BN rows, by all threads of the block: they are behind the end of the sequence and may be anything, and 0
/// times that need not be 0.
template <class E, int D>
MOE_DEVICE void clearRows(unsigned char* tile, int first) {
  for (int i = threadIdx.x; i < (E::BN - first) * (D / 8); i += E::Threads) {
    const int row = first + i / (D / 8), chunk = i % (D / 8);
    *(uint4*)(tile + (chunk / 8 * E::BN + row) * 128 + chunk % 8 * 16) = make_uint4(0, 0, 0, 0);
  }
  fenceOperands();
  __syncthreads();
}

/// Two warpgroups of 64 queries each, against BN keys.
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

/// One block: BM queries of head blockIdx.y of batch blockIdx.z, all keys that they see, BN at a time. Products with values are one tile behind those with keys,
/// so that the tensor cores multiply while exponentials are computed. With Turns the warpgroups ask for products one after the other, so that one's exponentials
/// fall into the other's products.
template <class E, bool Some, bool Turns = false>
MOE_DEVICE void attention(float* out, float* lse, const TensorMap& q, const TensorMap& k, const TensorMap& v, const int* lengths, const int* firstKeys, Sizes z) {
  MOE_DYNAMIC_SHARED(dynamic);
  MOE_SHARED(Barrier, ready, [1]);
  MOE_SHARED(Barrier, barriers, [4][E::Stages]);
  MOE_SHARED(Barrier, turns, [2]);
  Barrier *const fullKeys = kept(barriers[0]), *const emptyKeys = fullKeys + E::Stages, *const fullValues = emptyKeys + E::Stages, *const emptyValues = fullValues + E::Stages;
  unsigned char* const queries = kept(dynamic + (-sharedAddress(dynamic) & 1023));
  unsigned char* const keys = queries + E::bytesQ;
  unsigned char* const values = keys + E::Stages * E::bytesK;

  // The last queries see the most keys: they begin first.
  const int b = blockIdx.z, h = blockIdx.y, g = h / (z.H / z.G), first = (gridDim.x - 1 - blockIdx.x) * E::BM;
  const Visible visible = Visible::of(z.T, z.S, lengths, b, z.causal);
  const Starts<Some> starts = Starts<Some>::of(firstKeys, z.T, b);
  const auto begins = starts.range(first, E::BM);
  const int tiles = divUp(max(0, visible.keys(min(first + E::BM, z.T) - 1) - begins.least), E::BN), seenByAll = visible.keys(first);
  const int warp = __shfl_sync(wholeWarp, (int)threadIdx.x / 32, 0), group = warp / 4, lane = threadIdx.x % 32;
  auto stage = [](int t) { return t % E::Stages; };
  auto parity = [](int t) { return t / E::Stages & 1; };
  // By one thread: nobody needs the tile that lay there.
  auto loadKeys = [&](int t) {
    if (t >= tiles) return;
    Barrier* const full = &fullKeys[stage(t)];
    arriveAndExpect(full, E::bytesK);
    for (int d = 0; d < E::DK; d += 64) copyBox(keys + stage(t) * E::bytesK + d * E::BN * 2, k, full, g * E::DK + d, begins.least + t * E::BN, b);
  };
  auto loadValues = [&](int t) {
    if (t >= tiles) return;
    Barrier* const full = &fullValues[stage(t)];
    arriveAndExpect(full, E::bytesV);
    for (int d = 0; d < E::DV; d += 64) copyBox(values + stage(t) * E::bytesV + d * E::BN * 2, v, full, g * E::DV + d, begins.least + t * E::BN, b);
  };
  if (threadIdx.x == 0) {
    initBarrier(ready, 1);
    for (int s = 0; s < E::Stages; s++) {
      initBarrier(&fullKeys[s], 1);
      initBarrier(&fullValues[s], 1);
      initBarrier(&emptyKeys[s], E::Warps); // one arrival of each warp
      initBarrier(&emptyValues[s], E::Warps);
    }
    for (int i = 0; Turns && i < 2; i++) initBarrier(&turns[i], E::Warps / 2);
    fenceBarriers();
    if (tiles > 0) {
      arriveAndExpect(ready, E::bytesQ);
      for (int d = 0; d < E::DK; d += 64) copyBox(queries + d * E::BM * 2, q, ready, h * E::DK + d, first, b);
    }
    loadKeys(0);
    loadValues(0);
    loadKeys(1);
  }
  __syncthreads();

  typename E::Scores s;
  typename E::template Sums<E::DV> sums = {};
  uint32_t p[E::BN / 16][4];
  OnlineSoftmax<E> softmax;
  OnlineSoftmax<E>::begin(softmax);
  const uint64_t queriesAt = kept(operandAt(queries + group * 64 * 128, 0)), keysAt = kept(operandAt(keys, 0)), valuesAt = kept(operandAcrossTile(values, E::BN));
  auto multiplyKeys = [&](int t) {
    const uint64_t own = further(queriesAt), tile = further(keysAt, stage(t) * (E::bytesK / 16));
#pragma unroll
    for (int d = 0; d < E::DK; d += 16) multiplyGroup<E::BN>(s.v, operandOf(own, E::BM, 0, d), operandOf(tile, E::BN, 0, d));
    commitProducts();
  };
  auto multiplyValues = [&](int t) {
    const uint64_t tile = further(valuesAt, stage(t) * (E::bytesV / 16));
#pragma unroll
    for (int j = 0; j < E::BN; j += 16) multiplyGroup<E::DV, true>(sums.v, p[j / 16], operandAcrossOf(tile, E::BN, j, 0));
    commitProducts();
  };
  auto exponentials = [&](int t) {
    const int key = begins.least + t * E::BN;
    if (key + E::BN > seenByAll) {
#pragma unroll
      for (int i = 0; i < E::Rows; i++) {
        const int left = visible.keys(first + E::row(i)) - key - E::column(0);
#pragma unroll
        for (int j = 0; j < E::Columns; j++) E::at(s, i, j) = E::sumStep(j) < left ? E::at(s, i, j) : -infinity();
      }
    }
    if (Some && key < begins.most) {
#pragma unroll
      for (int i = 0; i < E::Rows; i++) {
        const int before = starts.from(first + E::row(i)) - key - E::column(0);
#pragma unroll
        for (int j = 0; j < E::Columns; j++) E::at(s, i, j) = E::sumStep(j) < before ? -infinity() : E::at(s, i, j);
      }
    }
    return OnlineSoftmax<E>::exponentials(softmax, s, z.scale * E::Unit);
  };

  // The first turn of all is the first warpgroup's.
  auto waitForTurn = [&](int t) {
    if (Turns) wait(&turns[group], (t + 1 - group) & 1);
  };
  auto endTurn = [&] {
    if (!Turns) return;
    __syncwarp();
    if (lane == 0) arrive(&turns[1 - group]);
  };

  if (tiles > 0) {
    wait(ready, 0);
    wait(&fullKeys[0], 0);
    E::clear(s);
    waitForTurn(0);
    fenceProducts(s.v);
    multiplyKeys(0);
    endTurn();
    waitProducts<0>(s.v);
    if (lane == 0) arrive(&emptyKeys[0]);
    auto shrink = exponentials(0);
    E::pack(p, s);
    for (int t = 1; t < tiles; t++) {
      wait(&fullKeys[stage(t)], parity(t));
      E::clear(s);
      waitForTurn(t);
      fenceProducts(s.v);
      multiplyKeys(t);
      // While these products are on their way.
      OnlineSoftmax<E>::template apply<E::DV>(shrink, sums);
      wait(&fullValues[stage(t - 1)], parity(t - 1));
      fenceProducts(sums.v);
      multiplyValues(t - 1);
      endTurn();
      // The whole warp waits: where one thread does, the compiler has what is the same for all in registers of each.
      if (warp == 0) {
        if (t + 1 < tiles) wait(&emptyKeys[stage(t + 1)], parity(t + 1) ^ 1);
        if (lane == 0) loadKeys(t + 1);
        wait(&emptyValues[stage(t)], parity(t) ^ 1);
        if (lane == 0) loadValues(t);
      }
      __syncwarp(); // the wait below is the whole warp's
      waitProducts<1>(s.v);
      holdSums(s.v);
      if (lane == 0) arrive(&emptyKeys[stage(t)]);
      shrink = exponentials(t);
      computeFirst(softmax.total);
      waitProducts<0>(sums.v);
      if (lane == 0) arrive(&emptyValues[stage(t - 1)]);
      E::pack(p, s);
    }
    OnlineSoftmax<E>::template apply<E::DV>(shrink, sums);
    const int last = tiles - 1, left = visible.limit - begins.least - last * E::BN;
    wait(&fullValues[stage(last)], parity(last));
    if (left < E::BN && visible.limit < z.S) clearRows<E, E::DV>(values + stage(last) * E::bytesV, left);
    fenceProducts(sums.v);
    multiplyValues(last);
    waitProducts<0>(sums.v);
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

/// What is kept of a sequence's queries has room for a multiple of 64.
MOE_DEVICE int roomFor(int queries) { return divUp(queries, 64) * 64; }

/// Of each query: its log sum exp in Unit, and delta = sum(dout out). One warp each; zeros behind the last query, as far as there is room.
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

/// Backward, a block has 128 rows, 64 to a warpgroup, and sees all columns, BN at a time: keys against queries for the gradients of keys and values,
/// queries against keys for those of queries. Either way the products that give scores take DK and DV features of rows and columns.
template <int DK_, int DV_, int BN>
struct BackwardHopper : WarpgroupTile<BN> {
  static constexpr int BM = 128, DK = DK_, DV = DV_, Stages = 3, Threads = 256, Warps = 8;
  static constexpr int rowBytes = BM * (DK + DV) * 2, stageBytes = BN * (DK + DV) * 2;
  MOE_DEVICE int row(int i) { return threadIdx.x / 128 * 64 + WarpgroupTile<BN>::groupRow(i); }
};

/// A row or a column of tiles in memory: its head, its first row, its batch.
struct Place {
  int head, row, batch;
};
/// Tiles of BN rows from `place` on, head by head if they end before the matrix does.
template <int BN>
struct Places {
  Place place;
  int begin, end;
  __device__ __forceinline__ Place next() {
    const Place now = place;
    place.row += BN;
    if (place.row >= end) place.row = begin, place.head++;
    return now;
  }
};

/// Copies the block's rows (with OnlyK their features of keys alone) and, some stages ahead, its tiles of columns, each the next of `places`, and `MoreBytes` that
/// `copyMore(place, stage, barrier)` asks for. `step(place, stage, columns)` is called when they are there, and may return when all its products are done.
template <class E, bool OnlyK, int MoreBytes, class CopyMore, class Step>
MOE_DEVICE void forTiles(unsigned char* rows, const TensorMap& rowsK, const TensorMap& rowsV, Place place, const TensorMap& columnsK, const TensorMap& columnsV, int tiles, Places<E::BN> places, CopyMore copyMore, Step step) {
  MOE_SHARED(Barrier, ready, [1]);
  MOE_SHARED(Barrier, barriers, [2][E::Stages]);
  Barrier *const full = kept(barriers[0]), *const empty = full + E::Stages;
  unsigned char* const stages = rows + E::rowBytes;
  const int warp = __shfl_sync(wholeWarp, (int)threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    initBarrier(ready, 1);
    for (int s = 0; s < E::Stages; s++) {
      initBarrier(&full[s], 1);
      initBarrier(&empty[s], E::Warps);
    }
    fenceBarriers();
    if (tiles > 0) {
      arriveAndExpect(ready, OnlyK ? E::BM * E::DK * 2 : E::rowBytes);
      for (int d = 0; d < E::DK; d += 64) copyBox(rows + d * E::BM * 2, rowsK, ready, place.head * E::DK + d, place.row, place.batch);
      for (int d = 0; d < E::DV && !OnlyK; d += 64) copyBox(rows + (E::DK + d) * E::BM * 2, rowsV, ready, place.head * E::DV + d, place.row, place.batch);
    }
  }
  // By the first warp: nobody needs the tile that lay there.
  Places<E::BN> ahead = places;
  auto load = [&](int stage) {
    const Place from = ahead.next();
    if (lane > 0) return;
    unsigned char* const to = stages + stage * E::stageBytes;
    arriveAndExpect(&full[stage], E::stageBytes + MoreBytes);
    copyMore(from, stage, &full[stage]);
    for (int d = 0; d < E::DK; d += 64) copyBox(to + d * E::BN * 2, columnsK, &full[stage], from.head * E::DK + d, from.row, from.batch);
    for (int d = 0; d < E::DV; d += 64) copyBox(to + (E::DK + d) * E::BN * 2, columnsV, &full[stage], from.head * E::DV + d, from.row, from.batch);
  };
  for (int t = 0; warp == 0 && t < min(tiles, E::Stages); t++) load(t);
  __syncthreads();
  if (tiles > 0) wait(ready, 0);
  for (int t = 0, stage = 0, parity = 0; t < tiles; t++) {
    wait(&full[stage], parity);
    step(places.next(), stage, stages + stage * E::stageBytes);
    if (MoreBytes > 0) fenceOperands(); // threads have read them, and the copy engine writes there again
    __syncwarp();
    if (lane == 0) arrive(&empty[stage]);
    // The other warpgroup is hardly more than a tile behind. The whole warp waits: where one thread does, the compiler has what is the same for all in registers of each.
    const int before = stage > 0 ? stage - 1 : E::Stages - 1;
    if (warp == 0 && t > 0 && t - 1 + E::Stages < tiles) {
      wait(&empty[before], stage > 0 ? parity : parity ^ 1);
      load(before);
    }
    __syncwarp();
    if (++stage == E::Stages) stage = 0, parity ^= 1;
  }
}

/// Scores of this warpgroup's rows and a tile of columns, and unless OnlyK with their features of values likewise the gradients of the probabilities, which are a group of their own and may
/// still be on their way.
template <class E, bool OnlyK = false>
MOE_DEVICE void multiplyTiles(typename E::Scores& s, typename E::Scores& gradients, uint64_t rows, uint64_t columns) {
  const uint64_t rowsK = further(rows), columnsK = further(columns), rowsV = further(rows, E::DK * E::BM / 8), columnsV = further(columns, E::DK * E::BN / 8);
  fenceProducts(s.v);
  if (!OnlyK) fenceProducts(gradients.v);
  multiplyGroup<E::BN, false, false, true>(s.v, rowsK, columnsK);
#pragma unroll
  for (int d = 16; d < E::DK; d += 16) multiplyGroup<E::BN>(s.v, operandOf(rowsK, E::BM, 0, d), operandOf(columnsK, E::BN, 0, d));
  commitProducts();
  if (OnlyK) {
    waitProducts<0>(s.v);
    return;
  }
  multiplyGroup<E::BN, false, false, true>(gradients.v, rowsV, columnsV);
#pragma unroll
  for (int d = 16; d < E::DV; d += 16) multiplyGroup<E::BN>(gradients.v, operandOf(rowsV, E::BM, 0, d), operandOf(columnsV, E::BN, 0, d));
  commitProducts();
  waitProducts<1>(s.v);
  holdSums(s.v);
}

/// Gradients of 128 keys and values of key head blockIdx.y, or of those that are asked for. The heads that share the key head come one after the other.
template <class E, bool Some, bool OfKeys, bool OfValues>
MOE_DEVICE void keysBackward(float* dk, float* dv, const TensorMap& q, const TensorMap& k, const TensorMap& v, const TensorMap& dout, const float* shift, const float* delta, const int* lengths, const int* firstKeys, Sizes z) {
  MOE_DYNAMIC_SHARED(dynamic);
  MOE_SHARED(__align__(16) float, perQuery, [E::Stages][2][E::BN]); // log sum exp, delta
  unsigned char* const rows = kept(dynamic + (-sharedAddress(dynamic) & 1023));
  const uint64_t rowsAt = kept(operandAt(rows + threadIdx.x / 128 * 64 * 128, 0)), columnsAt = kept(operandAt(rows + E::rowBytes, 0));
  const uint64_t acrossAt = kept(operandAcrossTile(rows + E::rowBytes, E::BN));
  const int b = blockIdx.z, g = blockIdx.y, first = blockIdx.x * E::BM, shares = z.H / z.G;
  const Visible visible = Visible::of(z.T, z.S, lengths, b, z.causal);
  const Starts<Some> starts = Starts<Some>::of(firstKeys, z.T, b);
  // Tiles of queries of each head, from the first query that sees a key of this block to the last.
  const int begin = visible.firstQuery(first) / E::BN * E::BN, end = starts.template endOfQueries<E::Threads>(begin, first + E::BM);
  const int perHead = first < visible.limit ? max(0, divUp(end - begin, E::BN)) : 0;
  auto copyQueries = [&](Place from, int stage, Barrier* barrier) {
    const int64_t at = ((int64_t)b * z.H + from.head) * roomFor(z.T) + from.row;
    copyBytes(perQuery[stage][0], shift + at, E::BN * 4, barrier);
    copyBytes(perQuery[stage][1], delta + at, E::BN * 4, barrier);
  };

  typename E::template Sums<E::DK> sumsK = {};
  typename E::template Sums<E::DV> sumsV = {};
  forTiles<E, !OfKeys, 2 * E::BN * 4>(rows, k, v, {g, first, b}, q, dout, perHead * shares, {{g * shares, begin, b}, begin, begin + perHead * E::BN}, copyQueries, [&](Place place, int stage, const unsigned char*) {
    typename E::Scores s, gradients;
    multiplyTiles<E, !OfKeys>(s, gradients, rowsAt, further(columnsAt, stage * (E::stageBytes / 16)));
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
    if (OfKeys) waitProducts<0>(gradients.v);
#pragma unroll
    for (int j = 0; j < E::Columns && OfKeys; j += 2) {
      const float2 delta = ofQuery(1, j);
#pragma unroll
      for (int i = 0; i < E::Rows; i++) {
        E::at(gradients, i, j) -= delta.x;
        E::at(gradients, i, j + 1) -= delta.y;
      }
    }
    if (place.row + E::BN > z.T || first + E::BM > visible.keys(place.row)) {
#pragma unroll
      for (int j = 0; j < E::Columns; j++) {
        const int query = place.row + E::column(j), seen = query < z.T ? visible.keys(query) : 0;
#pragma unroll
        for (int i = 0; i < E::Rows; i++) {
          const bool sees = first + E::row(i) < seen;
          E::at(s, i, j) = sees ? E::at(s, i, j) : 0.f;
          if (OfKeys) E::at(gradients, i, j) = sees ? E::at(gradients, i, j) : 0.f;
        }
      }
    }
    if (starts.anyBehind(place.row, E::BN, first)) {
#pragma unroll
      for (int j = 0; j < E::Columns; j++) {
        const int before = starts.from(place.row + E::column(j)) - first;
#pragma unroll
        for (int i = 0; i < E::Rows; i++) E::at(s, i, j) = E::row(i) < before ? 0.f : E::at(s, i, j);
      }
    }
#pragma unroll
    for (int i = 0; i < E::BN / 2 && OfKeys; i++) gradients.v[i] *= s.v[i];
    uint32_t p[E::BN / 16][4], ds[E::BN / 16][4];
    if (OfValues) E::pack(p, s);
    if (OfKeys) E::pack(ds, gradients);
    if (OfValues) fenceProducts(sumsV.v);
    if (OfKeys) fenceProducts(sumsK.v);
    const uint64_t acrossK = further(acrossAt, stage * (E::stageBytes / 16)), acrossV = further(acrossK, E::DK * E::BN / 8);
#pragma unroll
    for (int t = 0; t < E::BN && OfValues; t += 16) multiplyGroup<E::DV, true>(sumsV.v, p[t / 16], operandAcrossOf(acrossV, E::BN, t, 0));
#pragma unroll
    for (int t = 0; t < E::BN && OfKeys; t += 16) multiplyGroup<E::DK, true>(sumsK.v, ds[t / 16], operandAcrossOf(acrossK, E::BN, t, 0));
    commitProducts();
    waitProducts<0>(s.v);
    if (OfValues) holdSums(sumsV.v);
    if (OfKeys) holdSums(sumsK.v);
  });

#pragma unroll
  for (int i = 0; i < E::Rows; i++) {
    const int key = first + E::row(i);
    const int64_t at = ((int64_t)b * z.S + key) * z.G + g;
    if (OfKeys) storeRowIf<E, E::DK>(key < z.S, dk + at * z.Dk, sumsK, i, z.Dk, z.scale);
    if (OfValues) storeRowIf<E, E::DV>(key < z.S, dv + at * z.Dv, sumsV, i, z.Dv, 1.f);
  }
}

/// Gradient of 128 queries of head blockIdx.y.
template <class E, bool Some>
MOE_DEVICE void queriesBackward(float* dq, const TensorMap& q, const TensorMap& k, const TensorMap& v, const TensorMap& dout, const float* shift, const float* delta, const int* lengths, const int* firstKeys, Sizes z) {
  MOE_DYNAMIC_SHARED(dynamic);
  unsigned char* const rows = kept(dynamic + (-sharedAddress(dynamic) & 1023));
  const uint64_t rowsAt = kept(operandAt(rows + threadIdx.x / 128 * 64 * 128, 0)), columnsAt = kept(operandAt(rows + E::rowBytes, 0));
  const uint64_t acrossAt = kept(operandAcrossTile(rows + E::rowBytes, E::BN));
  const int b = blockIdx.z, h = blockIdx.y, g = h / (z.H / z.G), first = (gridDim.x - 1 - blockIdx.x) * E::BM;
  const Visible visible = Visible::of(z.T, z.S, lengths, b, z.causal);
  const Starts<Some> starts = Starts<Some>::of(firstKeys, z.T, b);
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
  typename E::template Sums<E::DK> sums = {};
  auto nothing = [](Place, int, Barrier*) {};
  forTiles<E, false, 0>(rows, q, dout, {h, first, b}, k, v, tiles, {{g, begins.least, b}, 0, 0x7fffffff}, nothing, [&](Place place, int stage, unsigned char* columns) {
    const int key = place.row;
    if (key + E::BN > end) clearRows<E, E::DK>(columns, end - key);
    typename E::Scores s, gradients;
    multiplyTiles<E>(s, gradients, rowsAt, further(columnsAt, stage * (E::stageBytes / 16)));
#pragma unroll
    for (int i = 0; i < E::Rows; i++) {
#pragma unroll
      for (int j = 0; j < E::Columns; j++) E::at(s, i, j) = exp2Fast(E::at(s, i, j) * (z.scale * E::Unit) - rowShift[i]);
    }
    computeFirst(s.v);
    waitProducts<0>(gradients.v);
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
    if (Some && key < begins.most) {
#pragma unroll
      for (int i = 0; i < E::Rows; i++) {
        const int before = starts.from(first + E::row(i)) - key;
#pragma unroll
        for (int j = 0; j < E::Columns; j++) E::at(gradients, i, j) = E::column(j) < before ? 0.f : E::at(gradients, i, j);
      }
    }
    uint32_t ds[E::BN / 16][4];
    E::pack(ds, gradients);
    fenceProducts(sums.v);
    const uint64_t across = further(acrossAt, stage * (E::stageBytes / 16));
#pragma unroll
    for (int j = 0; j < E::BN; j += 16) multiplyGroup<E::DK, true>(sums.v, ds[j / 16], operandAcrossOf(across, E::BN, j, 0));
    commitProducts();
    waitProducts<0>(sums.v);
  });

#pragma unroll
  for (int i = 0; i < E::Rows; i++) {
    const int t = first + E::row(i);
    storeRowIf<E, E::DK>(t < z.T, dq + (((int64_t)b * z.T + t) * z.H + h) * z.Dk, sums, i, z.Dk, z.scale);
  }
}

#define ATTENTION_FORWARD(name, Engine, Some, Turns)                                                                                                         \
  MOE_KERNEL((Engine::Threads, 1), moe_attention_fwd_sm90a_##name, (float* out, float* lse, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, const int* lengths, const int* starts, int T, int S, int H, int G, int Dk, int Dv, int causal, float scale)) { \
    attention<Engine, Some, Turns>(out, lse, q, k, v, lengths, starts, {T, S, H, G, Dk, Dv, causal, scale});                                                 \
  }
#define ATTENTION_KEYS(of, name, Engine, Some, OfKeys, OfValues)                                                                                             \
  MOE_KERNEL((Engine::Threads, 1), moe_attention_bwd_##of##_sm90a_##name, (float* dk, float* dv, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap dout, const float* shift, const float* delta, const int* lengths, const int* starts, int T, int S, int H, int G, int Dk, int Dv, int causal, float scale)) { \
    keysBackward<Engine, Some, OfKeys, OfValues>(dk, dv, q, k, v, dout, shift, delta, lengths, starts, {T, S, H, G, Dk, Dv, causal, scale});                 \
  }
#define ATTENTION_QUERIES(name, Engine, Some)                                                                                                                \
  MOE_KERNEL((Engine::Threads, 1), moe_attention_bwd_queries_sm90a_##name, (float* dq, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap dout, const float* shift, const float* delta, const int* lengths, const int* starts, int T, int S, int H, int G, int Dk, int Dv, int causal, float scale)) { \
    queriesBackward<Engine, Some>(dq, q, k, v, dout, shift, delta, lengths, starts, {T, S, H, G, Dk, Dv, causal, scale});                                    \
  }

// Forward also with turns, to be measured beside those without (bench cuda-sweep).
#define ATTENTION(name, Forward, Backward)                      \
  ATTENTION_FORWARD(name, Forward, false, false)                \
  ATTENTION_FORWARD(name##_starts, Forward, true, false)        \
  ATTENTION_FORWARD(name##_turns, Forward, false, true)         \
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
// 80 keys are what two stages leave room for, as in FlashAttention-3.
using Huge = FlashHopper<256, 256, 80>;
using SmallBackward = BackwardHopper<64, 64, 64>;
using MediumBackward = BackwardHopper<128, 128, 64>;
using LargeBackward = BackwardHopper<192, 128, 64>;
// Rows and three stages fill shared memory, and one gradient the registers.
using HugeBackward = BackwardHopper<256, 256, 32>;
ATTENTION(64_64, Small, SmallBackward)
ATTENTION(128_128, Medium, MediumBackward)
ATTENTION(192_128, Large, LargeBackward)
ATTENTION(256_256, Huge, HugeBackward)
ATTENTION_KEYS_TOGETHER(64_64, SmallBackward)
ATTENTION_KEYS_TOGETHER(128_128, MediumBackward)
ATTENTION_KEYS_TOGETHER(192_128, LargeBackward)
ATTENTION_KEYS_APART(256_256, HugeBackward)
