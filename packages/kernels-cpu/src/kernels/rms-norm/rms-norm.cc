// RMSNorm over rows and its gradient.
#include "../softmax/row-sums.h"

using namespace moe;

// y, rstd, x, weight, rows, length, eps
MOE_KERNEL(moe_rms_norm_fwd_f32) {
  float* y = args.ptr<float>();
  float* rstd = args.ptr<float>();
  const float* x = args.ptr<const float>();
  const float* weight = args.ptr<const float>();
  const int64_t rows = args.size(), n = args.size();
  const double eps = args.f64();
  parallel_for(rows, 8192 / std::max<int64_t>(1, n), [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; row++) {
      const float* from = x + row * n;
      float* to = y + row * n;
      const float squares = row_sum(n, [&](int64_t i, int count) {
        const f32v v = load_some(from + i, count);
        return v * v;
      });
      rstd[row] = static_cast<float>(1 / std::sqrt(static_cast<double>(squares) / static_cast<double>(n) + eps));
      const f32v factor = splat(rstd[row]);
      each_vector(n, [&](int64_t i, int count) {
        store_some(to + i, load_some(from + i, count) * factor * load_some(weight + i, count), count);
      });
    }
  });
}

// dx, dweight, x, weight, rstd, dy, rows, length
MOE_KERNEL(moe_rms_norm_bwd_f32) {
  float* dx = args.ptr<float>();
  float* dweight = args.ptr<float>();
  const float* x = args.ptr<const float>();
  const float* weight = args.ptr<const float>();
  const float* rstd = args.ptr<const float>();
  const float* dy = args.ptr<const float>();
  const int64_t rows = args.size(), n = args.size();
  // dweight is summed per chunk of rows, then over the chunks in order, so that its bits do not depend on the number of threads.
  const Chunks chunks(rows, std::max<int64_t>(8, 16384 / std::max<int64_t>(1, n)), 16);
  const int64_t stride = static_cast<int64_t>(round_up(static_cast<size_t>(n), 64));
  Scratch scratch(static_cast<size_t>(chunks.count * stride) * 4);
  float* partial = scratch.as<float>();
  parallel_tasks(chunks.count, [&](int64_t chunk, int) {
    float* own = partial + chunk * stride;
    std::memset(own, 0, static_cast<size_t>(n) * 4);
    for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); row++) {
      const float *xr = x + row * n, *dyr = dy + row * n;
      float* dxr = dx + row * n;
      const f32v r = splat(rstd[row]);
      const float dot = row_sum(n, [&](int64_t i, int count) {
        return load_some(dyr + i, count) * load_some(weight + i, count) * load_some(xr + i, count);
      });
      // mean(g * normal) with normal = x * r
      const f32v mean = splat(dot * rstd[row] / static_cast<float>(n));
      each_vector(n, [&](int64_t i, int count) {
        const f32v normal = load_some(xr + i, count) * r, d = load_some(dyr + i, count);
        store_some(dxr + i, (d * load_some(weight + i, count) - normal * mean) * r, count);
        store_some(own + i, fma(d, normal, load_some(own + i, count)), count);
      });
    }
  });
  parallel_for(
      n, 65536 / chunks.count,
      [&](int64_t begin, int64_t end, int) {
        each_vector(end - begin, [&](int64_t i, int count) {
          f32v total = zero();
          for (int64_t chunk = 0; chunk < chunks.count; chunk++) total += load_some(partial + chunk * stride + begin + i, count);
          store_some(dweight + begin + i, total, count);
        });
      },
      64);
}
