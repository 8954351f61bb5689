// Products of 8-bit activations with packed 8-bit weights. The variant's `multiply_tile` gives exact
// 32-bit sums, so their order is free; the epilogue here is float arithmetic, element by element.

static int rows_of_tile(int rows_left, int tiles_left) {
#if defined(QUIRE_TILES_FILL)
  (void)tiles_left;  // AMX works in halves of 16 rows: full tiles first
  return rows_left < TILE_ROWS ? rows_left : TILE_ROWS;
#else
  return (rows_left + tiles_left - 1) / tiles_left;
#endif
}

// Dequantises the sums of half a panel.
struct Columns {
  Lanes scales, bias;
  const int32_t* corrections;

  QUIRE_INLINE Columns(const Linear& w, int column)
      : scales(load(w.scales + column)),
        bias(w.bias ? load(w.bias + column) : splat(0.0f)),
        corrections(w.corrections + column) {}

  QUIRE_INLINE Lanes finish(const int32_t* acc, float row_scale, bool biased) const {
    const Lanes y = from_difference(acc, corrections) * (splat(row_scale) * scales);
    return biased ? y + bias : y;
  }
};

QUIRE_INLINE Lanes silu(Lanes x) { return x / (splat(1.0f) + exponential(splat(0.0f) - x)); }

static void update_argmax(const Linear& w, Lanes a, Lanes b, int column, Argmax* argmax) {
  const Lanes least = splat(-__builtin_inff());
  const int left = w.outputs - column;  // beyond it there is padding
  if (left >= PANEL) {
    if (!above(larger(a, b), splat(argmax->value))) return;  // as a rule
  } else {
    a = between(0, left < LANES ? left : LANES, a, least);
    b = between(0, left < LANES ? 0 : left - LANES, b, least);
  }
  const float top = largest(larger(a, b));
  if (!(top > argmax->value)) return;
  float all[PANEL];
  store(all, a);
  store(all + LANES, b);
  for (int i = 0; i < PANEL; i++)
    if (all[i] == top) {
      argmax->value = top;
      argmax->id = column + i;
      return;
    }
}

// They are read when the head is done: until then they would only displace its weights from the caches.
static void keep_logits(const Linear& w, Lanes a, Lanes b, int column, float* logits) {
  if (w.outputs - column >= PANEL) {
    stream(logits + column, a);
    stream(logits + column + LANES, b);
    return;
  }
  float all[PANEL];
  store(all, a);
  store(all + LANES, b);
  memcpy(logits + column, all, (size_t)(w.outputs - column) * sizeof(float));
}

// Columns of one row, finished but for the epilogue, which is not HEAD.
template <Epilogue EPILOGUE>
QUIRE_INLINE void put_row(const Product& p, int panel, int row, Lanes a, Lanes b) {
  const int column = panel * PANEL;
  if (const float* addend = p.addends ? p.addends[row] : nullptr) {
    a = a + load(addend + column);
    b = b + load(addend + column + LANES);
  }
  const int to = EPILOGUE == Epilogue::ADD && p.out_rows ? p.out_rows[row] : row;
  float* out = p.out + (size_t)to * p.out_stride;
  if constexpr (EPILOGUE == Epilogue::STORE) {
    store(out + column, a);
    store(out + column + LANES, b);
  } else if constexpr (EPILOGUE == Epilogue::ADD) {
    store(out + column, load(out + column) + a);
    store(out + column + LANES, load(out + column + LANES) + b);
  } else {
    store(out + panel * LANES, silu(a) * b);
  }
}

template <Epilogue EPILOGUE>
static void finish_rows(const Product& p, int panel, int first, int count, const int32_t* acc, Argmax* argmax) {
  const Linear& w = *p.weight;
  const int column = panel * PANEL;
  const Columns left(w, column), right(w, column + LANES);
  const bool biased = w.bias != nullptr;
  for (int row = first; row < first + count; row++, acc += PANEL) {
    const Lanes a = left.finish(acc, p.codes.scales[row], biased);
    const Lanes b = right.finish(acc + LANES, p.codes.scales[row], biased);
    if constexpr (EPILOGUE == Epilogue::HEAD) {
      if (p.logits[row]) keep_logits(w, a, b, column, p.logits[row]);
      update_argmax(w, a, b, column, argmax + row);
    } else {
      put_row<EPILOGUE>(p, panel, row, a, b);
    }
  }
}

// How far a single tile prefetches: the more rows, the longer a line lasts, and the less a line that comes
// too early can displace. Measured on Zen 4 and Xeons of the fifth generation.
static size_t near_bytes(int rows) { return rows <= 5 ? 4096 : 8192; }

// One tile: prefetches a little ahead in the same stream. Several: only the first would wait for memory,
// so AHEAD_TILES of them prefetch shares of the next panel.
QUIRE_INLINE Ahead ahead_of(const Product& p, const int8_t* packed, int panel, int tile, int tiles) {
  constexpr size_t line_bytes = PANEL * 4;
  if (tiles == 1) return {packed + near_bytes(p.rows), line_bytes, nullptr, 0};  // no time for anything else
  const size_t panel_bytes = (size_t)p.weight->inputs_padded * PANEL;
  const int shares = tiles < AHEAD_TILES ? tiles : AHEAD_TILES;
  const int segment = p.first_segment + (panel * tiles + tile) * segments_of(*p.weight);
  if (tile >= shares) return {packed, 0, p.prefetch, segment};
  return {packed + panel_bytes + tile * panel_bytes / shares, line_bytes / shares, p.prefetch, segment};
}

// Rows of a panel whose sums are complete.
struct Sums {
  int panel, first, count;
  int32_t* acc;
};

// One of `parts` equal parts of them.
template <Epilogue EPILOGUE>
QUIRE_INLINE void finish_part(const Product& p, const Sums& sums, int part, int parts, Argmax* argmax) {
  const int from = sums.count * part / parts, to = sums.count * (part + 1) / parts;
  if (from < to) finish_rows<EPILOGUE>(p, sums.panel, sums.first + from, to - from, sums.acc + from * PANEL, argmax);
}

template <Epilogue EPILOGUE> static void multiply_panels(const Product& p, int first, int end, Argmax* argmax) {
  const Linear& w = *p.weight;
  const int tiles = (p.rows + TILE_ROWS - 1) / TILE_ROWS;
  alignas(64) int32_t acc[2][TILE_ROWS_MAX * PANEL];
  Sums last = {0, 0, 0, acc[1]};
  for (int panel = first; panel < end; panel++) {
    const int8_t* packed = w.packed + panel * (size_t)w.inputs_padded * PANEL;
    for (int row = 0, tile = 0; row < p.rows; tile++) {
      const Sums sums = {panel, row, rows_of_tile(p.rows - row, tiles - tile), acc[last.acc == acc[0]]};
      const auto multiply = [&](auto... beside) {
        multiply_tile(p.codes.rows + (size_t)row * p.codes.stride, p.codes.stride, sums.count, packed,
                      w.inputs_padded, ahead_of(p, packed, panel, tile, tiles), sums.acc, beside...);
      };
#if defined(QUIRE_TILES_FILL)
      // Its multiplier has a pipeline of its own: meanwhile the last sums are finished.
      multiply([&](int part, int parts) { finish_part<EPILOGUE>(p, last, part, parts, argmax); });
      last = sums;
#else
      multiply();
      finish_part<EPILOGUE>(p, sums, 0, 1, argmax);
#endif
      row += sums.count;
    }
  }
  finish_part<EPILOGUE>(p, last, 0, 1, argmax);
}

static void multiply(const Product* product, int first, int end, Argmax* argmax) {
  switch (product->epilogue) {
    case Epilogue::STORE: return multiply_panels<Epilogue::STORE>(*product, first, end, argmax);
    case Epilogue::ADD: return multiply_panels<Epilogue::ADD>(*product, first, end, argmax);
    case Epilogue::GATED: return multiply_panels<Epilogue::GATED>(*product, first, end, argmax);
    case Epilogue::HEAD: multiply_panels<Epilogue::HEAD>(*product, first, end, argmax); return drain();
  }
}
