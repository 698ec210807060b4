// The updates of optimizers. compiled.h includes this once for each instruction set, as kernels.h.
//
// Each makes torch's operations in torch's order. A multiply-add is one rounding, as in torch's own kernels for AVX2 and
// AVX-512. Its numbers are those of a row of KERNELS in swalp_fx/optimizer/kernels.py, in their order there.

// torch.optim.SGD. States: the momentum, or none.
struct Sgd {
  static constexpr size_t kNumbers = 6, kFewestStates = 0, kMostStates = 1;
  float lr, momentum, undamped, weight_decay;  // undamped: 1 - dampening
  bool nesterov, maximize;

  explicit Sgd(const float* x)
      : lr(x[0]), momentum(x[1]), undamped(x[2]), weight_decay(x[3]), nesterov(x[4] != 0), maximize(x[5] != 0) {}

  void operator()(const Stepped& at, int64_t n) const {
    at.states[0] == nullptr ? run<false>(at.w, at.g, nullptr, n) : run<true>(at.w, at.g, at.states[0], n);
  }

 private:
  template <bool kMomentum>
  void run(float* w, const float* g, float* m, int64_t n) const {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      float d = maximize ? -g[i] : g[i];
      d = weight_decay != 0.0f ? std::fma(w[i], weight_decay, d) : d;
      if constexpr (kMomentum) {
        m[i] = std::fma(d, undamped, m[i] * momentum);
        d = nesterov ? std::fma(m[i], momentum, d) : m[i];
      }
      w[i] = std::fma(d, -lr, w[i]);
    }
  }
};

// torch.optim.Adam and AdamW. States: the mean of the gradients, and that of their squares.
struct Adam {
  static constexpr size_t kNumbers = 9, kFewestStates = 2, kMostStates = 2;
  float kept, weight_decay;  // kept: of the weight, by decoupled decay
  float toward_gradient, kept_square, toward_square;
  float root_correction, eps, step;
  bool maximize;

  explicit Adam(const float* x)
      : kept(x[0]), weight_decay(x[1]), toward_gradient(x[2]), kept_square(x[3]), toward_square(x[4]),
        root_correction(x[5]), eps(x[6]), step(x[7]), maximize(x[8] != 0) {}

  void operator()(const Stepped& at, int64_t n) const {
    float *const m = at.states[0], *const v = at.states[1], *const root = at.room;
    const bool is_near = std::abs(toward_gradient) < 0.5f;  // lerp starts from the nearer end
    const float along = is_near ? toward_gradient : toward_gradient - 1.0f;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      float d = maximize ? -at.g[i] : at.g[i];
      d = weight_decay != 0.0f ? std::fma(at.w[i], weight_decay, d) : d;
      m[i] = std::fma(along, d - m[i], is_near ? m[i] : d);
      root[i] = v[i] = std::fma(toward_square * d, d, v[i] * kept_square);
    }
    square_root(root, n);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      at.w[i] = at.w[i] * kept + step * m[i] / (root[i] / root_correction + eps);
    }
  }
};

// Calls f with the type of an update, by its place in KERNELS; false if there is none.
template <class F>
bool with_update(int64_t kernel, const F& f) {
  switch (kernel) {
    case 0:
      return f(std::type_identity<Sgd>()), true;
    case 1:
      return f(std::type_identity<Adam>()), true;
    default:
      return false;
  }
}

inline void update(const Update& step, const Stepped& at, int64_t n) {
  with_update(step.kernel, [&](auto kind) { typename decltype(kind)::type(step.numbers.data())(at, n); });
}
