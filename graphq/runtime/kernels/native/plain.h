// What linears with weights as they are have in common. Included in a namespace's file.

INLINE void put(const PlainCall &c, int64_t row, int64_t n, float v) {
  if (c.bias) v += c.bias_type == FLOAT32 ? ((const float *)c.bias)[n] : bf16_to_float(((const uint16_t *)c.bias)[n]);
  if (c.y_type == FLOAT32) ((float *)c.y)[row * c.n + n] = v;
  else ((uint16_t *)c.y)[row * c.n + n] = float_to_bf16(v);
}
