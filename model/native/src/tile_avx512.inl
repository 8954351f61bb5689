// multiply_tile with AVX-512 VNNI. A panel line (4 inputs) is two registers; up to 12 rows share it,
// which makes 24 sums in registers. Few rows take several lines at once instead, with sums of their
// own, because dpbusd takes 4 to 5 cycles and two may start in each.

constexpr int TILE_ROWS = 12;

template <int ROWS, int LINES>
static void multiply_rows(const uint8_t* codes, size_t stride, const int8_t* panel, int inputs_padded,
                          Ahead ahead, int32_t* acc) {
  __m512i left[LINES][ROWS], right[LINES][ROWS];
  QUIRE_UNROLL
  for (int line = 0; line < LINES; line++)
    QUIRE_UNROLL
    for (int r = 0; r < ROWS; r++) left[line][r] = right[line][r] = _mm512_setzero_si512();
  for (int k = 0; k < inputs_padded; k += 4 * LINES)
    QUIRE_UNROLL
    for (int line = 0; line < LINES; line++, panel += PANEL * 4) {
      _mm_prefetch((const char*)ahead.start, _MM_HINT_T0);
      _mm_prefetch((const char*)ahead.start + 64, _MM_HINT_T0);
      ahead.start += ahead.step;
      const __m512i w_left = _mm512_loadu_si512(panel), w_right = _mm512_loadu_si512(panel + 64);
      QUIRE_UNROLL
      for (int r = 0; r < ROWS; r++) {
        int32_t four;
        memcpy(&four, codes + r * stride + k + line * 4, 4);
        const __m512i x = _mm512_set1_epi32(four);
        left[line][r] = _mm512_dpbusd_epi32(left[line][r], x, w_left);
        right[line][r] = _mm512_dpbusd_epi32(right[line][r], x, w_right);
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

static void multiply_tile(const uint8_t* codes, size_t stride, int rows, const int8_t* panel, int inputs_padded,
                          Ahead ahead, int32_t* acc) {
  switch (rows) {
    case 1: return multiply_rows<1, 4>(codes, stride, panel, inputs_padded, ahead, acc);
    case 2: return multiply_rows<2, 4>(codes, stride, panel, inputs_padded, ahead, acc);
    case 3: return multiply_rows<3, 2>(codes, stride, panel, inputs_padded, ahead, acc);
    case 4: return multiply_rows<4, 2>(codes, stride, panel, inputs_padded, ahead, acc);
    case 5: return multiply_rows<5, 1>(codes, stride, panel, inputs_padded, ahead, acc);
    case 6: return multiply_rows<6, 1>(codes, stride, panel, inputs_padded, ahead, acc);
    case 7: return multiply_rows<7, 1>(codes, stride, panel, inputs_padded, ahead, acc);
    case 8: return multiply_rows<8, 1>(codes, stride, panel, inputs_padded, ahead, acc);
    case 9: return multiply_rows<9, 1>(codes, stride, panel, inputs_padded, ahead, acc);
    case 10: return multiply_rows<10, 1>(codes, stride, panel, inputs_padded, ahead, acc);
    case 11: return multiply_rows<11, 1>(codes, stride, panel, inputs_padded, ahead, acc);
    default: return multiply_rows<12, 1>(codes, stride, panel, inputs_padded, ahead, acc);
  }
}
