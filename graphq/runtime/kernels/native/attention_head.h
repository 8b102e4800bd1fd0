// Attention over the tokens of one key/value head, read once for all queries that share it: softmax by chunks of tokens,
// with the largest score so far (Milakov and Gimelshein, arXiv 1805.02867). Included in a namespace's file behind
// elementwise.h.

constexpr int64_t TOKENS = 16, CHUNK = 256;  // tokens whose scores are lanes; tokens between two rescalings

INLINE V16 joined(V16 a, V16 b) {  // sums of neighbours, first of a, then of b
#if defined(__clang__)
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
  return __builtin_shuffle(a, b, I16{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}) +
         __builtin_shuffle(a, b, I16{1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31});
#endif
}

// The sum of each of 16 vectors.
INLINE V16 sums_of(V16 *v) {
#pragma GCC unroll 4
  for (int count = 8; count; count /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < count; i++) v[i] = joined(v[2 * i], v[2 * i + 1]);
  return v[0];
}

// Rows of ``count`` tokens in float32: where they lie, or in ``wide``, in which those beyond the last are 0.
INLINE const float *rows_of(const void *p, int32_t type, int64_t at, int64_t stride, int64_t width, int64_t count,
                            float *wide, int64_t *step) {
  if (type == FLOAT32 && count == TOKENS) {
    *step = stride;
    return (const float *)p + at;
  }
  for (int64_t t = 0; t < count; t++)
    for (int64_t d = 0; d < width; d += LANES) {
      const V16 v = type == FLOAT32 ? numbers((const float *)p + at + t * stride + d)
                                    : numbers((const uint16_t *)p + at + t * stride + d);
      std::memcpy(wide + t * width + d, &v, sizeof v);
    }
  std::memset(wide + count * width, 0, (TOKENS - count) * width * 4);
  *step = width;
  return wide;
}

static void mask_scores(const Attention &a, int64_t at, int64_t count, float *scores) {
  const int64_t by = a.mask_token;
  const uint8_t *kept = (const uint8_t *)a.mask + at;
  if (a.mask_type == INT8) for (int64_t t = 0; t < count; t++) scores[t] += kept[t * by] ? 0 : -__builtin_inff();
  else if (a.mask_type == FLOAT32) for (int64_t t = 0; t < count; t++) scores[t] += ((const float *)a.mask)[at + t * by];
  else for (int64_t t = 0; t < count; t++) scores[t] += bf16_to_float(((const uint16_t *)a.mask)[at + t * by]);
}

int attention(const Attention &a, int64_t index) {
  const int64_t b = index / a.kv_heads, head = index % a.kv_heads, heads = a.heads / a.kv_heads;
  const int64_t rows = heads * a.queries, width = a.width, v_width = a.v_width;
  float *memory = (float *)scratch_alloc(4 * (rows * (width + v_width + CHUNK) + TOKENS * (width + v_width) + 2 * rows));
  if (!memory) return 1;
  float *q = memory, *y = q + rows * width, *scores = y + rows * v_width, *wide = scores + rows * CHUNK;
  float *v_wide = wide + TOKENS * width, *most = v_wide + TOKENS * v_width, *total = most + rows;
  for (int64_t r = 0; r < rows; r++) {  // head by head
    const int64_t at = b * a.q_batch + (head * heads + r / a.queries) * a.q_head + r % a.queries * a.q_row;
    load_block(a.q, a.type, at, width, q + r * width);
    for (int64_t d = 0; d < width; d++) q[r * width + d] *= (float)a.scale;
    most[r] = -__builtin_inff();
    total[r] = 0;
  }
  std::memset(y, 0, rows * v_width * 4);
  for (int64_t first = 0; first < a.tokens; first += CHUNK) {
    const int64_t left = a.tokens - first, count = left < CHUNK ? left : CHUNK;
    for (int64_t t = 0; t < count; t += TOKENS) {
      int64_t step;
      const int64_t some = count - t < TOKENS ? count - t : TOKENS;
      const float *k = rows_of(a.k, a.type, b * a.k_batch + head * a.k_head + (first + t) * a.k_row, a.k_row, width, some,
                               wide, &step);
      for (int64_t r = 0; r < rows; r++) {
        V16 sum[TOKENS];
#pragma GCC unroll 16
        for (int i = 0; i < TOKENS; i++) sum[i] = V16{};
        for (int64_t d = 0; d < width; d += LANES) {
          const V16 u = load<V16>(q + r * width + d);
#pragma GCC unroll 16
          for (int i = 0; i < TOKENS; i++) sum[i] += u * load<V16>(k + i * step + d);
        }
        const V16 found = sums_of(sum);
        std::memcpy(scores + r * CHUNK + t, &found, sizeof found);
      }
    }
    for (int64_t r = 0; r < rows; r++) {
      const int64_t padded = (count + TOKENS - 1) / TOKENS * TOKENS;
      float *own = scores + r * CHUNK, top = most[r], lanes[LANES];
      if (a.mask) {
        const int64_t at = b * a.mask_batch + (head * heads + r / a.queries) * a.mask_head + r % a.queries * a.mask_row;
        mask_scores(a, at + first * a.mask_token, count, own);
      }
      for (int64_t t = count; t < padded; t++) own[t] = -__builtin_inff();
      V16 tops = splat(top), sums{};
      for (int64_t t = 0; t < padded; t += LANES) {
        const V16 v = load<V16>(own + t);
        tops = v > tops ? v : tops;
      }
      std::memcpy(lanes, &tops, sizeof lanes);
      for (int i = 0; i < LANES; i++) top = lanes[i] > top ? lanes[i] : top;
      const float base = top == -__builtin_inff() ? 0 : top;  // so that what is left out has weight 0
      for (int64_t t = 0; t < padded; t++) own[t] = exp_of(own[t] - base);
      for (int64_t t = 0; t < padded; t += LANES) sums += load<V16>(own + t);
      if (top != most[r] && first) {
        const float by = exp_of(most[r] - base);
        total[r] *= by;
        for (int64_t d = 0; d < v_width; d++) y[r * v_width + d] *= by;
      }
      std::memcpy(lanes, &sums, sizeof lanes);
      for (int i = 0; i < LANES; i++) total[r] += lanes[i];
      most[r] = top;
    }
    for (int64_t t = 0; t < count; t += TOKENS) {
      int64_t step;
      const int64_t some = count - t < TOKENS ? count - t : TOKENS;
      const float *v = rows_of(a.v, a.type, b * a.v_batch + head * a.v_head + (first + t) * a.v_row, a.v_row, v_width, some,
                               v_wide, &step);
      for (int64_t r = 0; r < rows; r++) {
        const float *own = scores + r * CHUNK + t;
        for (int64_t d = 0; d < v_width;) {
          float *to = y + r * v_width + d;
          if (d + 4 * LANES <= v_width) {
            V16 sum[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sum[j] = load<V16>(to + j * LANES);
            for (int i = 0; i < TOKENS; i++)
#pragma GCC unroll 4
              for (int j = 0; j < 4; j++) sum[j] += own[i] * load<V16>(v + i * step + d + j * LANES);
            std::memcpy(to, sum, sizeof sum);
            d += 4 * LANES;
          } else {
            V16 sum = load<V16>(to);
            for (int i = 0; i < TOKENS; i++) sum += own[i] * load<V16>(v + i * step + d);
            std::memcpy(to, &sum, sizeof sum);
            d += LANES;
          }
        }
      }
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    if (total[r] != 0) for (int64_t d = 0; d < v_width; d++) y[r * v_width + d] /= total[r];  // else all is left out
    const int64_t at = ((b * a.queries + r % a.queries) * a.heads + head * heads + r / a.queries) * v_width;
    store_block(a.out, a.type, at, v_width, y + r * v_width);
  }
  scratch_free(memory);
  return 0;
}
