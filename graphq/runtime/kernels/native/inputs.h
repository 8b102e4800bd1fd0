// How each product takes its inputs: 32-bit words for UNIT_K codes, in the order in which decoded vectors hold them.



struct Float32Input {
  template <int B> static constexpr bool FUSED = false;
  using Input = float;
  using Sum = float;
  static constexpr int UNIT_K = 1;
  INLINE float input(float v) { return v; }
  INLINE float input(uint16_t v) { return bf16_to_float(v); }
  INLINE float input(int8_t v) { return v; }
  INLINE float number(float v) { return v; }
  INLINE uint32_t unit(const float *four, int u) { return load<uint32_t>(four + u); }
};

// Pairs of codes 0 and 2, then 1 and 3: what the bytes of a lane give when they are taken as 16-bit words.
struct Bfloat16Input {
  template <int B> static constexpr bool FUSED = false;
  using Input = uint16_t;
  using Sum = float;
  static constexpr int UNIT_K = 2;
  INLINE uint16_t input(float v) { return float_to_bf16(v); }
  INLINE uint16_t input(uint16_t v) { return v; }
  INLINE uint16_t input(int8_t v) { return float_to_bf16(v); }
  INLINE float number(uint16_t v) { return bf16_to_float(v); }
  INLINE uint32_t unit(const uint16_t *four, int u) { return four[u] | (uint32_t)four[u + 2] << 16; }
};

struct Int16Input {  // int8 codes as pairs of 16 bits, in the same order
  template <int B> static constexpr bool FUSED = false;
  using Input = int16_t;
  using Sum = int32_t;
  static constexpr int UNIT_K = 2;
  INLINE int16_t input(float) { return 0; }
  INLINE int16_t input(uint16_t) { return 0; }
  INLINE int16_t input(int8_t v) { return v; }
  INLINE int32_t number(int16_t v) { return v; }
  INLINE uint32_t unit(const int16_t *four, int u) { return (uint16_t)four[u] | (uint32_t)(uint16_t)four[u + 2] << 16; }
};

struct Int8Input {
  template <int B> static constexpr bool FUSED = false;
  using Input = int8_t;
  using Sum = int32_t;
  static constexpr int UNIT_K = 4;
  INLINE int8_t input(float) { return 0; }
  INLINE int8_t input(uint16_t) { return 0; }
  INLINE int8_t input(int8_t v) { return v; }
  INLINE int32_t number(int8_t v) { return v; }
  INLINE uint32_t unit(const int8_t *four, int) { return load<uint32_t>(four); }
};

INLINE V16 widened(const uint8_t *zero) {
  V16 z;
  for (int i = 0; i < LANES; i++) z[i] = (float)(int8_t)zero[i];
  return z;
}

INLINE V16 float_value(V16 acc, float sum, const uint8_t *zero) { return zero ? acc - widened(zero) * sum : acc; }

// Of sums of u x, u = code + 2^(bits-1): those of (code - zero)(x - x_zero). Sums wrap; the result fits.
INLINE V16 integer_value(int bits, I16 acc, int32_t sum, const uint8_t *zero, int8_t x_zero, const int32_t *sums) {
  acc -= (1 << (bits - 1)) * sum;
  if (zero) {
    I16 z;
    for (int i = 0; i < LANES; i++) z[i] = (int8_t)zero[i];
    acc -= z * sum;
  }
  if (sums) acc -= load<I16>(sums) * (int32_t)x_zero;
  return __builtin_convertvector(acc, V16);
}

// The byte vectors of a chunk as 32-bit lanes; other widths than 8 leave the bits above a code 0.
template <int B, class T = U16> INLINE void byte_vectors(const uint8_t *p, T *bytes) {
  constexpr int COUNT = chunk_k(B) / 4;
  if constexpr (B == 8) {
    bytes[0] = load<T>(p);
  } else {
    for (int j = 0; j < COUNT; j++) bytes[j] = T{};
    int shift = 0;
    if constexpr (B & 4) {
      for (int j = 0; j < COUNT; j++) bytes[j] |= (load<T>(p + j / 2 * 64) >> (4 * (j % 2))) & 0x0f0f0f0fu;
      p += COUNT / 2 * 64;
      shift = 4;
    }
    if constexpr (B & 2) {
      for (int j = 0; j < COUNT; j++) bytes[j] |= ((load<T>(p + j / 4 * 64) >> (2 * (j % 4))) & 0x03030303u) << shift;
      p += COUNT / 4 * 64;
      shift += 2;
    }
    if constexpr (B & 1) {
      for (int j = 0; j < COUNT; j++) bytes[j] |= ((load<T>(p + j / 8 * 64) >> (j % 8)) & 0x01010101u) << shift;
    }
  }
}
