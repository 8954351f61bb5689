// A tile with AVX-512 VNNI. A panel line (4 inputs) is two registers; up to 12 rows share it, which makes 24
// sums in registers. With few rows it takes several lines at once instead, with sums of their own, because
// dpbusd has a latency of 4 to 5 cycles and two start per cycle.

constexpr int ZMM_ROWS = 12;

// What to prefetch during a segment, or null: first the beginnings of all regions, which are their keys,
// then what follows those. Every other segment is left to the weights.
static const uint8_t* piece_of(const Prefetch& prefetch, int segment) {
  const int piece = segment / 2;
  if (segment % 2 || piece >= 2 * prefetch.count) return nullptr;
  if (piece < prefetch.count) return prefetch.base + prefetch.regions[piece];
  return prefetch.base + prefetch.regions[piece - prefetch.count] + SEGMENT * 64;
}

template <int ROWS, int LINES, bool FETCHES>
static void multiply_rows(const uint8_t* codes, size_t stride, const int8_t* panel, int inputs_padded,
                          Ahead ahead, int32_t* acc) {
  __m512i left[LINES][ROWS], right[LINES][ROWS];
  QUIRE_UNROLL
  for (int line = 0; line < LINES; line++)
    QUIRE_UNROLL
    for (int r = 0; r < ROWS; r++) left[line][r] = right[line][r] = _mm512_setzero_si512();
  // Rows by threes: an address is then one of few pointers plus 0, 1 or 2 strides, and all of them
  // fit the registers.
  const uint8_t* thirds[(ROWS + 2) / 3];
  QUIRE_UNROLL
  for (int r = 0; r < ROWS; r += 3) thirds[r / 3] = codes + r * stride;
  for (int k = 0; k < inputs_padded;) {
    const int stop = k + 4 * SEGMENT < inputs_padded ? k + 4 * SEGMENT : inputs_padded;
    const uint8_t* piece = FETCHES ? piece_of(*ahead.prefetch, ahead.segment++) : nullptr;
    if (!piece) piece = (const uint8_t*)panel;  // cached already, and cheaper than a branch
    for (; k < stop; k += 4 * LINES) {
      QUIRE_UNROLL
      for (int line = 0; line < LINES; line++, panel += PANEL * 4) {
        _mm_prefetch((const char*)ahead.start, _MM_HINT_T1);
        // Of a share of the next panel this is the next line's; what is asked for twice is late less often.
        _mm_prefetch(FETCHES ? (const char*)piece : (const char*)ahead.start + 64, _MM_HINT_T1);
        ahead.start += ahead.step;
        piece += 64;
        const __m512i w_left = _mm512_loadu_si512(panel), w_right = _mm512_loadu_si512(panel + 64);
        QUIRE_UNROLL
        for (int r = 0; r < ROWS; r++) {
          int32_t four;
          memcpy(&four, thirds[r / 3] + r % 3 * stride + line * 4, 4);
          const __m512i x = _mm512_set1_epi32(four);
          left[line][r] = _mm512_dpbusd_epi32(left[line][r], x, w_left);
          right[line][r] = _mm512_dpbusd_epi32(right[line][r], x, w_right);
        }
      }
      QUIRE_UNROLL
      for (int r = 0; r < ROWS; r += 3) thirds[r / 3] += 4 * LINES;
    }
  }
  QUIRE_UNROLL
  for (int r = 0; r < ROWS; r++) {
    QUIRE_UNROLL
    for (int line = 1; line < LINES; line++) {
      left[0][r] = _mm512_add_epi32(left[0][r], left[line][r]);
      right[0][r] = _mm512_add_epi32(right[0][r], right[line][r]);
    }
    _mm512_storeu_si512(acc + r * PANEL, left[0][r]);
    _mm512_storeu_si512(acc + r * PANEL + 16, right[0][r]);
  }
}

template <int ROWS, int LINES>
static void multiply_some(const uint8_t* codes, size_t stride, const int8_t* panel, int inputs_padded,
                          Ahead ahead, int32_t* acc) {
  if (ahead.prefetch) multiply_rows<ROWS, LINES, true>(codes, stride, panel, inputs_padded, ahead, acc);
  else multiply_rows<ROWS, LINES, false>(codes, stride, panel, inputs_padded, ahead, acc);
}

static void multiply_zmm(const uint8_t* codes, size_t stride, int rows, const int8_t* panel, int inputs_padded,
                         Ahead ahead, int32_t* acc) {
  switch (rows) {
    case 1: return multiply_some<1, 4>(codes, stride, panel, inputs_padded, ahead, acc);
    case 2: return multiply_some<2, 4>(codes, stride, panel, inputs_padded, ahead, acc);
    case 3: return multiply_some<3, 2>(codes, stride, panel, inputs_padded, ahead, acc);
    case 4: return multiply_some<4, 2>(codes, stride, panel, inputs_padded, ahead, acc);
    case 5: return multiply_some<5, 1>(codes, stride, panel, inputs_padded, ahead, acc);
    case 6: return multiply_some<6, 1>(codes, stride, panel, inputs_padded, ahead, acc);
    case 7: return multiply_some<7, 1>(codes, stride, panel, inputs_padded, ahead, acc);
    case 8: return multiply_some<8, 1>(codes, stride, panel, inputs_padded, ahead, acc);
    case 9: return multiply_some<9, 1>(codes, stride, panel, inputs_padded, ahead, acc);
    case 10: return multiply_some<10, 1>(codes, stride, panel, inputs_padded, ahead, acc);
    case 11: return multiply_some<11, 1>(codes, stride, panel, inputs_padded, ahead, acc);
    default: return multiply_some<12, 1>(codes, stride, panel, inputs_padded, ahead, acc);
  }
}
