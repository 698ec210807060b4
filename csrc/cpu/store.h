// Stored scales, and codes side by side. compiled.h includes this once for each instruction set.

struct Storing {
  // Stores the scale of each block, as swalp_fx/codes/stored.py does. A power of two is its exponent plus `bias`, in a byte.
  // A real scale is a float. A two-level scale is the code of a float, beside one float for the tensor. An affine scale is a
  // float and the code of zero.
  __attribute__((noinline)) static void store_scales(const Numbers& n, const Coding& coding, const Found& found, int bias,
                                                     void* scales, void* second) {
    const auto blocks = static_cast<int64_t>(found.maxima.size());
    const uint32_t* maxima = found.maxima.data();
    auto* bytes = static_cast<uint8_t*>(scales);
    auto* floats = static_cast<float*>(scales);
    const float largest = n.largest();
    if (n.scale == ScaleKind::PowerOfTwo) {
      const SharedExponent exponent = n.exponent();
      for (int64_t i = 0; i < blocks; ++i) {
        const bool is_usual = exponent.is_normal<float>(maxima[i]);
        const int e = is_usual ? exponent.of_normal<float>(maxima[i]) : exponent.of<float>(maxima[i]);
        bytes[i] = static_cast<uint8_t>(e + bias);
      }
    } else if (n.scale == ScaleKind::Absmax) {
      for (int64_t i = 0; i < blocks; ++i) floats[i] = absmax_scale<float>(maxima[i], largest);
    } else if (n.scale == ScaleKind::TwoLevel) {
      const Grid inner = n.inner();
      const FloatElement<float, Saturates> element(inner);
      const float outer = *static_cast<float*>(second) = outer_scale<float>(inner, found.tensor_maximum, largest);
      for (int64_t i = 0; i < blocks; ++i) {
        const float of_block = inner_scale<float>(inner, maxima[i], outer, largest);
        bytes[i] = static_cast<uint8_t>(code_of<false>(element, of_block, of_block, 0u, coding, RoundNearest{}));
      }
    } else if (n.scale == ScaleKind::Affine) {
      for (int64_t i = 0; i < blocks; ++i) {
        const Moved<float> moved(n.grid, bit_cast<float>(maxima[i]), bit_cast<float>(found.negative[i]));
        floats[i] = moved.scale;
        const int zero = static_cast<int>(moved.below) + coding.first;
        const auto code = static_cast<uint16_t>(static_cast<uint32_t>(zero) & ((1u << coding.bits) - 1));
        if (coding.bits > 8) {
          static_cast<uint16_t*>(second)[i] = code;
        } else {
          static_cast<uint8_t*>(second)[i] = static_cast<uint8_t>(code);
        }
      }
    }
  }

  // The low `bits` of eight bytes, side by side in the lowest bits.
  static uint64_t close_up(uint64_t eight, int bits) {
    const int unused = 8 - bits;
    eight &= uint64_t{0x0101010101010101} * ((1u << bits) - 1);
    eight = (eight & 0x00FF00FF00FF00FF) | (eight & 0xFF00FF00FF00FF00) >> unused;
    eight = (eight & 0x0000FFFF0000FFFF) | (eight & 0xFFFF0000FFFF0000) >> 2 * unused;
    return (eight & 0x00000000FFFFFFFF) | (eight & 0xFFFFFFFF00000000) >> 4 * unused;
  }

  // n codes of `bits` bits, one a byte or one a word, into bytes without gaps.
  __attribute__((noinline)) static void pack_codes(const uint8_t* codes, int64_t n, int bits, uint8_t* packed) {
    if (bits == 4) {  // two fill a byte, so that no bits go on in the next one
      for (int64_t i = 0; i < n / 2; ++i) packed[i] = static_cast<uint8_t>((codes[2 * i] & 15) | codes[2 * i + 1] << 4);
      if (n % 2 != 0) packed[n / 2] = codes[n - 1] & 15;
      return;
    }
    constexpr int64_t kWords = 256;
    uint64_t words[kWords];
    uint8_t* const end = packed + (n * bits + 7) / 8;
    for (int64_t done = 0; done < n; done += 8 * kWords) {
      const int64_t count = std::min(n - done, 8 * kWords), whole = (count + 7) / 8;
      words[whole - 1] = 0;
      memcpy(words, codes + done, count);
      for (int64_t i = 0; i < whole; ++i) words[i] = close_up(words[i], bits);
      int64_t i = 0;
      for (; i < whole && end - packed >= 8; ++i, packed += bits) memcpy(packed, &words[i], 8);
      for (; i < whole; ++i, packed += bits) memcpy(packed, &words[i], std::min<int64_t>(bits, end - packed));
    }
  }

  __attribute__((noinline)) static void pack_codes(const uint16_t* codes, int64_t n, int bits, uint8_t* packed) {
    uint32_t left = 0;  // bits that are not written yet
    int count = 0;
    for (int64_t i = 0; i < n; ++i) {
      left |= (codes[i] & ((1u << bits) - 1)) << count;
      for (count += bits; count >= 8; count -= 8, left >>= 8) *packed++ = static_cast<uint8_t>(left);
    }
    if (count > 0) *packed = static_cast<uint8_t>(left);
  }
};
