// Products in GCC's vector extensions, which the compiler cuts into what the target has. Included in a namespace's file
// after the target is chosen.


template <bool TABLE> struct GenericFloat32 : Float32Input {
  using Vec = V16;
  using Acc = V16;
  static constexpr int MAX_M = 4, SUPER = 64, DIRECT = 0;
  template <int B> static constexpr int SPLIT = 1;
  template <int B> static constexpr bool has = !TABLE || B == 4 || B == 6 || B == 8;
  struct Tables { const float *table; explicit Tables(const Weight &w) : table(w.table) {} };
  INLINE V16 zero() { return V16{}; }
  INLINE V16 add(V16 a, V16 b) { return a + b; }
  INLINE V16 mac(V16 acc, V16 v, const uint32_t *x) { return acc + v * load<float>(x); }
  INLINE V16 value(const Weight &, V16 acc, float sum, const uint8_t *zero, int8_t, const int32_t *) {
    return float_value(acc, sum, zero);
  }
  template <int B> static __attribute__((noinline)) void decode(const uint8_t *p, const Tables &tables, V16 *out) {
    constexpr int COUNT = chunk_k(B) / 4;
    U16 bytes[COUNT];
    byte_vectors<B>(p, bytes);
    for (int j = 0; j < COUNT; j++)
      for (int i = 0; i < 4; i++) {
        const U16 code = (bytes[j] >> (8 * i)) & 255u;
        if constexpr (TABLE) {
          V16 v;
          for (int l = 0; l < LANES; l++) v[l] = tables.table[code[l]];
          out[4 * j + i] = v;
        } else {
          out[4 * j + i] = __builtin_convertvector((I16)code, V16) - (float)(1 << (B - 1));
        }
      }
  }
};

struct GenericInt8 : Int16Input {
  using Vec = I16;
  using Acc = I16;
  static constexpr int MAX_M = 4, SUPER = 64, DIRECT = 0;
  template <int B> static constexpr int SPLIT = 1;
  template <int B> static constexpr bool has = true;
  struct Tables { explicit Tables(const Weight &) {} };
  INLINE I16 zero() { return I16{}; }
  INLINE I16 add(I16 a, I16 b) { return a + b; }
  INLINE I16 mac(I16 acc, I16 v, const uint32_t *x) {
#ifdef GENERIC_AVX2
    const __m256i both = _mm256_set1_epi32((int)*x);
    union { I16 whole; __m256i half[2]; } a{v};
    a.half[0] = _mm256_madd_epi16(a.half[0], both);
    a.half[1] = _mm256_madd_epi16(a.half[1], both);
    return acc + a.whole;
#else
    return acc + (v & 0xffff) * (int32_t)(int16_t)*x + (v >> 16) * ((int32_t)*x >> 16);
#endif
  }
  INLINE V16 value(const Weight &w, I16 acc, int32_t sum, const uint8_t *zero, int8_t x_zero, const int32_t *sums) {
    return integer_value(w.bits, acc, sum, zero, x_zero, sums);
  }
  template <int B> static __attribute__((noinline)) void decode(const uint8_t *p, const Tables &, I16 *out) {
    constexpr int COUNT = chunk_k(B) / 4;
    U16 bytes[COUNT];
    byte_vectors<B>(p, bytes);
    for (int j = 0; j < COUNT; j++) {
      out[2 * j] = (I16)(bytes[j] & 0x00ff00ffu);
      out[2 * j + 1] = (I16)((bytes[j] >> 8) & 0x00ff00ffu);
    }
  }
};

int float32(const Call &call, int64_t threads) {
  return call.weight->is_integer ? Engine<GenericFloat32<false>>::run(call, threads)
                                 : Engine<GenericFloat32<true>>::run(call, threads);
}
int int8(const Call &call, int64_t threads) { return Engine<GenericInt8>::run(call, threads); }
