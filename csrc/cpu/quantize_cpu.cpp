// The ops on the CPU: which elements a thread takes, and which instructions it has.
#include <atomic>
#include <utility>

#include "../plan.h"
#include "instructions.h"

namespace swalp_fx {
namespace {

const Instructions& best_instructions() {
#ifdef SWALP_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return avx512_instructions();
  }
  if (__builtin_cpu_supports("avx2")) return avx2_instructions();
#endif
  return portable_instructions();
}

const Instructions& kBest = best_instructions();

// Calls f with the best instructions, and with the portable ones if those have not what is called.
template <class F>
void with_instructions(const F& f) {
  if (!f(kBest)) f(portable_instructions());
}

struct Cpu {
  static constexpr Gaps most_gaps = Gaps::Some;

  static void run(const Numbers& format, const Cover& cover, const Tensor& x, Tensor& y, const Drawing& drawing) {
    run_at(format, cover, x.scalar_type(), x.const_data_ptr(), y.mutable_data_ptr(), drawing);
  }

  // A list of tensors, in one loop.
  static void in_place(std::vector<Call<Cpu>>& calls) {
    const auto in_place = [&](size_t i, const Cover& piece) { calls[i].dense ? calls[i].in_place(piece) : calls[i].in_place(); };
    for_each_piece(calls.size(), [&](size_t i) -> const Call<Cpu>& { return calls[i]; }, in_place);
  }

  template <class Forms>
  static void register_more(torch::stable::detail::StableLibrary& m) {
    m.impl("quantize_update_", TORCH_BOX(&CpuForms<Forms>::update));
    m.impl("quantize_code_plan", TORCH_BOX(&CpuForms<Forms>::code_plan));
  }

  struct PlanOf final : Plan {
    Numbers format;
    Cover cover;
    ScalarType type;
    Drawing drawing;
    static constexpr bool dense = true;

    explicit PlanOf(const Call<Cpu>& call)
        : format(call.format), cover(call.cover), type(call.x.scalar_type()), drawing(call.drawing) {
      drawing.key.reset();
    }

    void round(const void* from, void* to, uint64_t key, uint64_t stream) const override {
      Drawing drawn = drawing;
      drawn.random.key = key;
      drawn.random.stream = stream;
      check_memory(from);
      if (!cover.layouts.empty()) run_at(format, cover, type, from, to, drawn);
    }

    // If scales are powers of two, every rounding keeps the numbers that rounding to nearest keeps.
    bool keeps(const void* from) const override {
      if (!format.is_exact()) return false;
      check_memory(from);
      std::atomic<bool> kept = steps_in_piece(*this) > 0 || cover.layouts.empty();
      if (!kept) return false;
      for_each_piece(1, [&](size_t) -> const PlanOf& { return *this; }, [&](size_t, const Cover& piece) {
        if (kept && !keeps_piece(piece, from)) kept = false;
      });
      return kept;
    }

   private:
    // The sizes and strides are the plan's, but the tensor may have no memory.
    void check_memory(const void* x) const {
      require(cover.layouts.empty() || x != nullptr, kOp, kNoMemory);
    }

    bool keeps_piece(const Cover& piece, const void* from) const {
      bool changed = false;
      with_scalar(type, [&](auto zero) { changed = format.magnitude_bits() > Ieee<Compute<decltype(zero)>>::mantissa; });
      if (changed) return false;
      with_instructions([&](const Instructions& isa) { return isa.look(format, piece, type, from, &changed); });
      return !changed;
    }
  };

  struct CodesOf final : CodePlan {
    Numbers format;
    Cover cover;
    Drawing drawing;
    Coding coding;
    int bias;  // of a scale's exponent

    CodesOf(const Call<Cpu>& call, const std::vector<int64_t>& given)
        : format(call.format), cover(call.cover), drawing(call.drawing) {
      const auto at = [&](size_t i) { return static_cast<int>(given[i]); };
      coding = {at(0), at(1) != 0, at(2) != 0, at(3), at(4), at(5)};
      bias = at(6);
      constexpr ScalarType types[] = {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16};
      format.most = most_of(types[at(7)]);
      drawing.key.reset();
    }

    bool write(const void* x, void* packed, void* scales, void* second, uint64_t key, uint64_t stream) const override {
      Random random = drawing.random;
      random.key = key;
      random.stream = stream;
      require(x != nullptr, kOp, kNoMemory);
      const auto* from = static_cast<const float*>(x);
      return is_wide() ? write_as<uint16_t>(from, packed, scales, second, random)
                       : write_as<uint8_t>(from, packed, scales, second, random);
    }

   private:
    bool is_wide() const {
      bool is_common = false;
      with_rounding<float>(drawing.rounding, drawing.random.bits, format.magnitude_bits(),
                           [&](const auto& round) { is_common = kIsCommon<std::decay_t<decltype(round)>>; });
      return coding.bits > 8 || !is_common;
    }

    // A code fills the low bits of a Code.
    template <class Code>
    bool write_as(const float* x, void* packed, void* scales, void* second, const Random& random) const {
      const int64_t n = cover.numel();
      const bool is_packed = coding.bits == 8 * sizeof(Code);
      const std::unique_ptr<Code[]> room(is_packed ? nullptr : new Code[n]);
      Code* const codes = is_packed ? static_cast<Code*>(packed) : room.get();
      Drawing drawn = drawing;
      drawn.random = random;
      Found found;
      with_instructions([&](const Instructions& isa) {
        return isa.encode(format, cover, x, codes, sizeof(Code) > 1, coding, &found, drawn);
      });
      if (!found.finite) return false;
      // A NaN of what overflows may have the code of -0, and then comes without zeros of that code.
      const auto minus_zero = static_cast<Code>(1 << (coding.bits - 1));
      if (!coding.has_signed_zero && format.grid.beyond != Beyond::Nan) std::replace(codes, codes + n, minus_zero, Code{0});
      kBest.store_scales(format, coding, found, bias, scales, second);
      if (is_packed) return true;
      torch::stable::parallel_for(0, (n + 7) / 8, Boxes::kGrain / 8, [&](int64_t begin, int64_t end) {
        const int64_t first = 8 * begin, count = std::min(8 * end, n) - first;
        auto* const to = static_cast<uint8_t*>(packed) + begin * coding.bits;
        if constexpr (sizeof(Code) > 1) {
          kBest.pack_words(codes + first, count, coding.bits, to);
        } else {
          kBest.pack_bytes(codes + first, count, coding.bits, to);
        }
      });
      return true;
    }
  };

 private:
  // Calls f(index of a call, cover of a piece), on every thread, for pieces of about kGrain elements and of whole blocks. A
  // tensor that cannot be cut into such pieces comes first, whole, and f has all threads for it. call(index): the call.
  template <class CallOf, class F>
  static void for_each_piece(size_t count, const CallOf& call, const F& f) {
    if (count == 1 && call(0).cover.numel() <= Boxes::kGrain) {
      if (call(0).cover.numel() > 0) f(0, call(0).cover);
      return;
    }
    struct Piece {
      size_t call;
      int64_t begin, end;  // of the outermost loop
    };
    std::vector<Piece> pieces;
    std::vector<int64_t> begins;
    int64_t numel = 0;
    for (size_t i = 0; i < count; ++i) {
      const Cover& cover = call(i).cover;
      const int64_t steps = steps_in_piece(call(i));
      if (steps == 0 && cover.numel() > 0) f(i, cover);
      if (steps == 0) continue;
      const int64_t size = outermost(cover);
      for (int64_t begin = 0; begin < size; begin += steps) {
        pieces.push_back({i, begin, std::min(size, begin + steps)});
        begins.push_back(numel + cover.numel() / size * begin);
      }
      numel += cover.numel();
    }
    torch::stable::parallel_for(0, numel, Boxes::kGrain, [&](int64_t begin, int64_t end) {
      const auto first = std::lower_bound(begins.begin(), begins.end(), begin);
      const auto last = std::lower_bound(first, begins.end(), end);
      for (auto at = first; at != last; ++at) {
        const Piece& piece = pieces[at - begins.begin()];
        f(piece.call, part_of(call(piece.call).cover, piece.begin, piece.end));
      }
    });
  }

  static int64_t outermost(const Cover& cover) {
    const Layout& layout = cover.layouts.front();
    return layout.rank > 0 ? layout.dims[0].size : 1;
  }

  // Steps of a call's outermost loop that make a piece; 0 if it has to be done whole, by all threads.
  template <class OneCall>
  static int64_t steps_in_piece(const OneCall& call) {
    const Shared shared = call.format.shared();
    const Cover& cover = call.cover;
    if (!call.dense || cover.layouts.empty()) return 0;
    const Layout& layout = cover.layouts.front();
    const int64_t size = outermost(cover), step = layout.numel / size;
    if (cover.layouts.size() == 1 && layout.rank > 0 && step <= Boxes::kWholeRow && draws_apart(call.drawing, layout)) {
      // No block reaches from one step into another, and the blocks of a piece have consecutive numbers.
      const bool apart = shared == Shared::Block && layout.dims[0].step.block * size == cover.blocks;
      if (apart || shared == Shared::Nothing) return std::max<int64_t>(1, Boxes::kGrain / step);
    }
    return cover.numel() <= Boxes::kGrain ? size : 0;
  }

  // Whether each step of the outermost loop has random bits of its own: row-major neighbours lie among neighbours in memory.
  static bool draws_apart(const Drawing& drawing, const Layout& layout) {
    return drawing.rounding != Rounding::Stochastic ||
           std::all_of(layout.dims, layout.dims + layout.rank,
                       [&](const Dim& d) { return d.step.index <= layout.dims[0].step.index; });
  }

  // The elements from step `begin` to `end` of the outermost loop, which lie side by side.
  static Cover part_of(const Cover& cover, int64_t begin, int64_t end) {
    Cover part = cover;
    if (end - begin == outermost(cover)) return part;
    Layout& layout = part.layouts.front();
    layout.numel = layout.numel / layout.dims[0].size * (end - begin);
    layout.dims[0].advance(layout.first, begin);
    layout.dims[0].size = end - begin;
    layout.first.block = 0;
    part.blocks = std::max<int64_t>(1, layout.dims[0].step.block * (end - begin));
    return part;
  }

  // The forms that the CPU alone has.
  template <class Forms>
  struct CpuForms;

  static constexpr int64_t kNotRounded = -1;  // in the place of what a role adds to a stream

  template <class Device, class... N>
  struct CpuForms<Forms<Device, N...>> {
    // An optimizer's step in one pass. A thread rounds a piece of the gradients, updates the weights, and rounds them while they
    // are in its cache. If there are masters, they are updated, and the weights are rounded copies of them. False if the
    // tensors are not as it needs them; then none has changed, nor if the call is dry.
    static bool update(int64_t kernel, std::vector<double> given, std::vector<Tensor> weights, std::vector<Tensor> gradients,
                       std::vector<Tensor> states, std::vector<Tensor> masters, N... format, Dims dims, Dims sizes,
                       int64_t rounding, int64_t bits, Key key, std::vector<int64_t> streams, std::vector<int64_t> roles,
                       bool dry) {
      const Update step{kernel, std::vector<float>(given.begin(), given.end())};
      const size_t count = weights.size(), of_each = count == 0 ? 0 : states.size() / count;
      check_update(step, count, of_each, gradients.size(), states.size(), masters.size(), streams.size(), roles.size());
      std::vector<Tensor> all = weights;
      for (const auto* more : {&gradients, &states, &masters}) all.insert(all.end(), more->begin(), more->end());
      if (share_memory(all)) return false;
      const Numbers n = numbers(format...);
      std::vector<Call<Cpu>> layouts;  // neighbours in the list that are alike have one
      std::vector<Item> items;
      for (size_t i = 0; i < count; ++i) {
        const Tensor& weight = weights[i];
        if (i == 0 || !are_alike(weight, weights[i - 1])) {
          if (!is_stepped(weight)) return false;
          layouts.emplace_back(weight, n, dims, sizes, rounding, bits, key, 0);
          if (!layouts.back().dense) return false;
          layouts.back().drawing.key.reset();
        }
        bool fits = true;
        const auto memory = [&](Tensor& x) {
          fits = fits && are_alike(x, weight) && (x.numel() == 0 || x.const_data_ptr() != nullptr);
          return fits ? static_cast<float*>(x.mutable_data_ptr()) : nullptr;
        };
        Item item{layouts.size() - 1, memory(weights[i]), {}, static_cast<uint64_t>(streams[i])};
        item.at.w = masters.empty() ? item.weight : memory(masters[i]);
        item.at.g = memory(gradients[i]);
        for (size_t k = 0; k < of_each; ++k) item.at.states[k] = memory(states[i * of_each + k]);
        if (!fits) return false;
        items.push_back(item);
      }
      if (dry) return true;
      const auto layout_of = [&](size_t i) -> const Call<Cpu>& { return layouts[items[i].layout]; };
      for_each_piece(count, layout_of, [&](size_t i, const Cover& piece) {
        const Item& item = items[i];
        const auto round = [&](size_t role, float* x) {
          if (roles[role] == kNotRounded) return;
          Drawing drawn = layout_of(i).drawing;
          drawn.random.stream = static_cast<uint64_t>(roles[role]) + item.stream;
          run_at(layout_of(i).format, piece, ScalarType::Float, x, x, drawn);
        };
        round(1, item.at.g);
        step_piece(step, piece, item);
        for (size_t k = 0; k < of_each; ++k) round(2 + k, item.at.states[k]);
        round(0, item.weight);
      });
      return true;
    }

    // The address of a plan of codes, for the caller to delete.
    static int64_t code_plan(Tensor x, N... format, Dims dims, Dims sizes, int64_t rounding, int64_t bits, Key key,
                             std::vector<int64_t> coding) {
      const Call<Cpu> call(std::move(x), numbers(format...), dims, sizes, rounding, bits, key, 0);
      const bool is_row_major = call.x.scalar_type() == ScalarType::Float && call.x.is_contiguous();
      require(is_row_major, kOp, "x must be contiguous float32, to have codes; convert it first");
      require(coding.size() == 8, kOp, "coding has ", coding.size(), " numbers; give it 8");
      check_range(kOp, "bits of a code", coding[0], 1, 16);
      check_range(kOp, "dtype of a code", coding[7], 0, 2);
      return reinterpret_cast<int64_t>(new CodesOf(call, coding));
    }

    static void check_update(const Update& step, size_t weights, size_t of_each, size_t gradients, size_t states,
                             size_t masters, size_t streams, size_t roles) {
      const std::optional<Takes> takes = kBest.takes(step.kernel);
      require(takes.has_value(), kOp, "there is no kernel ", step.kernel);
      require(step.numbers.size() == takes->numbers, kOp, "the update has ", step.numbers.size(), " numbers; give it ",
              takes->numbers);
      require(weights == 0 || (of_each >= takes->fewest_states && of_each <= takes->most_states), kOp, "a weight has ", of_each,
              " states; give it ", takes->fewest_states, " to ", takes->most_states);
      const bool one_each = gradients == weights && states == of_each * weights && streams == weights;
      require(one_each && (masters == 0 || masters == weights), kOp, weights, " weights but ", gradients, " gradients, ",
              states, " states, ", masters, " masters and ", streams, " streams; give each weight one");
      require(roles == 2 + of_each, kOp, roles, " roles; give the weight, the gradient and each state one");
    }

    // Whether an update takes x, as far as it alone says.
    static bool is_stepped(const Tensor& x) { return x.scalar_type() == ScalarType::Float && (x.numel() == 0 || is_dense(x)); }

    static bool are_alike(const Tensor& x, const Tensor& y) {
      bool alike = x.scalar_type() == y.scalar_type() && x.dim() == y.dim();
      for (int64_t d = 0; alike && d < x.dim(); ++d) alike = x.size(d) == y.size(d) && x.stride(d) == y.stride(d);
      return alike;
    }
  };

  // A weight in an update. `at.w` is its master, or its own memory.
  struct Item {
    size_t layout;
    float* weight;
    Stepped at;
    uint64_t stream;
  };

  // The update of the elements that `piece`, which has no gaps, covers.
  static void step_piece(const Update& step, const Cover& piece, const Item& item) {
    const int64_t first = piece.layouts.front().first.memory;
    torch::stable::parallel_for(0, piece.numel(), Boxes::kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t at = first + begin, n; at < first + end; at += n) {
        n = std::min(first + end - at, Boxes::kMost);
        const Stepped here = item.at.from(at, Room::of_thread().of<float>());
        kBest.update(step, here, n);
        if (item.weight != item.at.w) std::copy(here.w, here.w + n, item.weight + at);
      }
    });
  }

  static void run_at(const Numbers& format, const Cover& cover, ScalarType type, const void* x, void* y,
                     const Drawing& drawing) {
    with_instructions([&](const Instructions& isa) { return isa.round(format, cover, type, x, y, drawing); });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(swalp_fx, CPU, m) { register_ops<Cpu>(m); }

}  // namespace swalp_fx
