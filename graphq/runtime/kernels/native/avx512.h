// Decoders to bfloat16 in AVX-512: every value of a code of up to 8 bits is one. Included in a namespace.

INLINE __m512i raw(const uint8_t *p) { return _mm512_loadu_si512(p); }

// bfloat16 of 32 codes, those in the low bits of 16-bit words. Tables repeat what more bits would find.
struct Words {
  __m512i t[8];
  explicit Words(const Weight &w) {
    const int count = 1 << w.bits;
    uint16_t all[256];
    for (int i = 0; i < 256; i++) {
      uint32_t u;
      std::memcpy(&u, w.table + i % count, 4);
      all[i] = (uint16_t)(u >> 16);
    }
    for (int i = 0; i < 8; i++) t[i] = _mm512_loadu_si512(all + 32 * i);
  }
  template <int B> __attribute__((always_inline)) __m512i find(__m512i codes) const {
    if constexpr (B <= 5) return _mm512_permutexvar_epi16(codes, t[0]);
    const __m512i a = _mm512_permutex2var_epi16(t[0], codes, t[1]);
    if constexpr (B == 6) return a;
    const __mmask32 bit6 = _mm512_movepi16_mask(_mm512_slli_epi16(codes, 9));
    const __m512i low = _mm512_mask_blend_epi16(bit6, a, _mm512_permutex2var_epi16(t[2], codes, t[3]));
    if constexpr (B == 7) return low;
    const __mmask32 bit7 = _mm512_movepi16_mask(_mm512_slli_epi16(codes, 8));
    const __m512i high = _mm512_mask_blend_epi16(bit6, _mm512_permutex2var_epi16(t[4], codes, t[5]),
                                                 _mm512_permutex2var_epi16(t[6], codes, t[7]));
    return _mm512_mask_blend_epi16(bit7, low, high);
  }
};

// A chunk's codes as pairs of bfloat16: of each byte vector codes 0 and 2, then 1 and 3.
template <int B> INLINE void pairs_of(const uint8_t *p, const Words &words, __m512i *out) {
  if constexpr (B == 2 || B == 4) {  // what stands above a code in its word is not looked at
    const __m512i v = raw(p);
#pragma GCC unroll 4
    for (int j = 0; j < chunk_k(B) / 4; j++) {
      out[2 * j] = words.find<B>(_mm512_srli_epi16(v, B * j));
      out[2 * j + 1] = words.find<B>(_mm512_srli_epi16(v, B * j + 8));
    }
  } else {
    U16 bytes[chunk_k(B) / 4];
    byte_vectors<B>(p, bytes);
#pragma GCC unroll 8
    for (int j = 0; j < chunk_k(B) / 4; j++) {
      out[2 * j] = words.find<B>((__m512i)bytes[j]);
      out[2 * j + 1] = words.find<B>(_mm512_srli_epi16((__m512i)bytes[j], 8));
    }
  }
}
