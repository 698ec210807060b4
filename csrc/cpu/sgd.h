// torch.optim.SGD's update of n weights. quantize_cpu.cpp includes this once for each instruction set, as kernels.h.

// torch's operations in its order; each multiply-add is one rounding, as in torch's own kernels for AVX2 and AVX-512.
template <bool kMomentum>
void sgd_run(const Sgd& sgd, float* w, const float* g, float* m, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    float d = sgd.maximize ? -g[i] : g[i];
    d = sgd.weight_decay != 0.0f ? std::fma(w[i], sgd.weight_decay, d) : d;
    if constexpr (kMomentum) {
      m[i] = std::fma(d, sgd.undamped, m[i] * sgd.momentum);
      d = sgd.nesterov ? std::fma(m[i], sgd.momentum, d) : m[i];
    }
    w[i] = std::fma(d, -sgd.lr, w[i]);
  }
}

inline void sgd_update(const Sgd& sgd, float* w, const float* g, float* m, int64_t n) {
  m == nullptr ? sgd_run<false>(sgd, w, g, m, n) : sgd_run<true>(sgd, w, g, m, n);
}
