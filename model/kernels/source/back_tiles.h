// The way back through a product in tiles, written once for all instruction sets. Included behind
// tiles.h, or into a namespace that has what that asks for: Lanes, kTileRows, tile_outputs, fetch.
//
// A tile keeps sums of some rows and columns in registers and walks down a block of W, which the
// tiles of other rows then find in the cache.

// Rows of W between one that is worked on and one that is asked for.
inline constexpr std::int64_t kRowsAhead = 16;
inline constexpr int kTileColumns = tile_outputs(kTileRows);

template <int Rows, int Columns, typename Weight>
inline void add_rows(const BackPart<Weight>& part, std::int64_t row, std::int64_t column,
                     std::int64_t first, std::int64_t last) {
  const std::int64_t width = part.in_width;
  const Weight* weight = part.weight + column;
  const float* y = part.y + row * part.out_width;
  float* x = part.x + row * width + column;
  // A product with one is exact, so what follows is a sum with one rounding.
  const Lanes one = Lanes::broadcast(1.0f);
  Lanes sums[Rows][Columns];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) sums[r][c] = Lanes::zero();
  }
  const auto ahead = static_cast<std::uintptr_t>(kRowsAhead * width) * sizeof(Weight);
  for (std::int64_t out = first; out < last; ++out) {
    const Weight* own = weight + out * width;
    Lanes weights[Columns];
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) {
      weights[c] = Lanes::load(own + c * kLanes);
      fetch(reinterpret_cast<std::uintptr_t>(own + c * kLanes) + ahead);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Lanes value = Lanes::broadcast(y[r * part.out_width + out]);
#pragma GCC unroll 8
      for (int c = 0; c < Columns; ++c) sums[r][c].add_product(value, weights[c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) {
      float* to = x + r * width + c * kLanes;
      if (first > 0) sums[r][c].add_product(one, Lanes::load(to));
      sums[r][c].store(to);
    }
  }
}

// The last places of a row, where they are fewer than lanes.
template <typename Weight>
void add_rows_at_end(const BackPart<Weight>& part, std::int64_t row, std::int64_t column, int count,
                     std::int64_t first, std::int64_t last) {
  float* x = part.x + row * part.in_width + column;
  Lanes sums = Lanes::zero();
  for (std::int64_t out = first; out < last; ++out) {
    sums.add_product(Lanes::broadcast(part.y[row * part.out_width + out]),
                     Lanes::load_first(part.weight + out * part.in_width + column, count));
  }
  if (first > 0) sums.add_product(Lanes::broadcast(1.0f), Lanes::load_first(x, count));
  sums.store_first(x, count);
}

template <int Rows, int Columns = kTileColumns, typename Weight>
void add_rows_of(std::int64_t columns, const BackPart<Weight>& part, std::int64_t row,
                 std::int64_t column, std::int64_t first, std::int64_t last) {
  if constexpr (Columns > 0) {
    if (columns == Columns)
      add_rows<Rows, Columns>(part, row, column, first, last);
    else
      add_rows_of<Rows, Columns - 1>(columns, part, row, column, first, last);
  }
}

template <int Rows = kTileRows, typename Weight>
void add_rows_to(std::int64_t rows, const BackPart<Weight>& part, std::int64_t row,
                 std::int64_t first, std::int64_t last) {
  if constexpr (Rows > 0) {
    if (rows < Rows) return add_rows_to<Rows - 1>(rows, part, row, first, last);
    std::int64_t column = part.begin;
    while (column + kLanes <= part.end) {
      const std::int64_t whole = (part.end - column) / kLanes;
      const std::int64_t columns = whole < kTileColumns ? whole : kTileColumns;
      add_rows_of<Rows>(columns, part, row, column, first, last);
      column += columns * kLanes;
    }
    const int left = static_cast<int>(part.end - column);
    for (int r = 0; left > 0 && r < Rows; ++r)
      add_rows_at_end(part, row + r, column, left, first, last);
  }
}

template <typename Weight>
void multiply_back(const BackPart<Weight>& part) {
  for (std::int64_t first = 0; first < part.out_width; first += kDepth) {
    const std::int64_t last = first + kDepth < part.out_width ? first + kDepth : part.out_width;
    for (std::int64_t row = 0; row < part.rows; row += kTileRows) {
      const std::int64_t left = part.rows - row;
      add_rows_to(left < kTileRows ? left : kTileRows, part, row, first, last);
    }
  }
}
