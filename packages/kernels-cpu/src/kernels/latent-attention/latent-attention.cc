// moe-isa: baseline avx2 avx512 avx512bf16 bf16
// Absorbed multi-head latent attention for decoding (DeepSeek-V2 report 2.1.2): one key head for all heads, values are the first
// features of the keys. Heads run along the lanes, so every row of the cache is read once per block of heads. The cache is f32 or bf16.
#include "../attention/attend.h"

using namespace moe;

namespace {

// out, q, cache, lengths, B, T, S, H, C, valueDim, scale, 1 for a bf16 cache, pages [B][S / page] or nullptr, keys per page
template <class Op>
void latent(Args& args) {
  Attention a{};
  a.out = args.ptr<float>();
  a.q = args.ptr<const float>();
  const void* cache = args.ptr<const void>();
  a.lengths = args.ptr<const int32_t>();
  a.B = args.size();
  a.T = args.size();
  a.S = args.size();
  a.H = args.size();
  a.Dk = args.size();
  a.Dv = args.size();
  a.scale = args.f32();
  if (args.size() == 1) {
    a.rows16 = static_cast<const uint16_t*>(cache);
  } else {
    a.k = a.v = static_cast<const float*>(cache);
  }
  a.pages = args.ptr<const int32_t>();
  a.page_keys = args.size();
  a.G = 1;
  a.k_stride = a.v_stride = a.Dk;
  a.k_batch = a.v_batch = a.pages ? 0 : a.S * a.Dk;
  a.causal = true;
  attention_forward<Op>(a);
}

}  // namespace

MOE_KERNEL(moe_latent_attention_f32) { latent<F32Product>(args); }
#if defined(MOE_BF16_PRODUCTS)
MOE_KERNEL(moe_latent_attention_bf16) { latent<Bf16Product>(args); }
#else
MOE_KERNEL(moe_latent_attention_bf16) { latent<F32Product>(args); }
#endif
