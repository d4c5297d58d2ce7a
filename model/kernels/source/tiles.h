// The product in tiles, written once for all instruction sets. Included into a namespace that has
//
//   kTileRows               rows of the largest tile
//   tile_outputs(rows)      outputs of a tile of that many rows: what the registers hold
//   Lanes                   sixteen partial sums: zero(), load(p), load_first(p, count),
//                           add_product(x, w)
//   store_sums(sums, y, n)  halves the partial sums and writes one number for each row and output
//   fetch(address)          asks memory for a line
//
// A tile keeps its partial sums in registers and walks once along its rows of x and of W:
//
//              x  [rows, in]                 W  [out, in]
//           +----------------+            +----------------+
//   tile    |>>>>>>>>>>>>>>>>|  4 rows    |>>>>>>>>>>>>>>>>|  6 outputs
//           +----------------+            |  next tile     |  <- fetched meanwhile
//
// More rows than a tile has take turns at a block of W, which then stays in the cache; each turn
// fetches its share of the next block, so that memory is never idle.

// Memory that tiles ask for while they compute: one range, and then what comes after the part.
class Ahead {
 public:
  Ahead(Memory range, Memory after) : range_(range), after_(after) { asked_up_to(range.begin); }
  std::uintptr_t next() const { return range_.begin; }
  void asked_up_to(std::uintptr_t line) {
    range_.begin = line < range_.end ? line : range_.end;
    if (range_.begin != range_.end || after_.begin == after_.end) return;
    range_ = after_;
    after_ = {};
  }

 private:
  Memory range_;
  Memory after_;
};

inline constexpr int kLineBytes = 64;

template <int Rows, int Outputs, int Turns, typename Weight>
inline void multiply_tile(const Part<Weight>& part, std::int64_t row, std::int64_t output,
                          Ahead& ahead) {
  constexpr int kLines =
      (Outputs * kLanes * int{sizeof(Weight)} + kLineBytes * Turns - 1) / (kLineBytes * Turns);
  const std::int64_t width = part.in_width;
  const float* x = part.x + row * width;
  const Weight* weight = part.weight + output * width;
  Lanes sums[Rows][Outputs];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int o = 0; o < Outputs; ++o) sums[r][o] = Lanes::zero();
  }
  std::uintptr_t line = ahead.next();
  std::int64_t place = 0;
  for (; place + kLanes <= width; place += kLanes) {
    Lanes weights[Outputs];
#pragma GCC unroll 8
    for (int o = 0; o < Outputs; ++o) weights[o] = Lanes::load(weight + o * width + place);
#pragma GCC unroll 8
    for (int i = 0; i < kLines; ++i) fetch(line + i * kLineBytes);
    line += kLines * kLineBytes;
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Lanes values = Lanes::load(x + r * width + place);
#pragma GCC unroll 8
      for (int o = 0; o < Outputs; ++o) sums[r][o].add_product(values, weights[o]);
    }
  }
  if (place < width) {
    const int count = static_cast<int>(width - place);
    Lanes weights[Outputs];
#pragma GCC unroll 8
    for (int o = 0; o < Outputs; ++o)
      weights[o] = Lanes::load_first(weight + o * width + place, count);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Lanes values = Lanes::load_first(x + r * width + place, count);
#pragma GCC unroll 8
      for (int o = 0; o < Outputs; ++o) sums[r][o].add_product(values, weights[o]);
    }
  }
  ahead.asked_up_to(line);
  store_sums<Rows, Outputs>(sums, part.y + row * part.out_width + output, part.out_width);
}

// One turn: `Rows` rows of x at the outputs [begin, end).
template <int Rows, int Turns, typename Weight>
void take_turn(const Part<Weight>& part, std::int64_t row, std::int64_t begin, std::int64_t end,
               Ahead& ahead) {
  constexpr int kOutputs = tile_outputs(Rows);
  std::int64_t output = begin;
  for (; output + kOutputs <= end; output += kOutputs)
    multiply_tile<Rows, kOutputs, Turns>(part, row, output, ahead);
  for (; output < end; ++output) multiply_tile<Rows, 1, Turns>(part, row, output, ahead);
}

template <int Turns, int Rows = kTileRows, typename Weight>
void take_turn_of(std::int64_t rows, const Part<Weight>& part, std::int64_t row,
                  std::int64_t begin, std::int64_t end, Ahead& ahead) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      take_turn<Rows, Turns>(part, row, begin, end, ahead);
    else
      take_turn_of<Turns, Rows - 1>(rows, part, row, begin, end, ahead);
  }
}

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

template <typename Weight>
std::uintptr_t address_of(const Part<Weight>& part, std::int64_t output) {
  return reinterpret_cast<std::uintptr_t>(part.weight) +
         static_cast<std::uintptr_t>(output * part.in_width) * sizeof(Weight);
}

// Outputs that stay in the cache while the turns are taken; tiles of most row counts divide it.
inline constexpr std::int64_t kBlockOutputs = 24;

template <int Turns, typename Weight>
void take_turns(const Part<Weight>& part, std::int64_t turns) {
  for (std::int64_t begin = part.begin; begin < part.end; begin += kBlockOutputs) {
    const std::int64_t end = smaller(begin + kBlockOutputs, part.end);
    const std::int64_t next_end = smaller(end + kBlockOutputs, part.end);
    Ahead ahead({address_of(part, end), address_of(part, next_end)},
                next_end == part.end ? part.next : Memory{});
    for (std::int64_t turn = 0; turn < turns; ++turn) {
      const std::int64_t row = part.rows * turn / turns;
      const std::int64_t rows = part.rows * (turn + 1) / turns - row;
      take_turn_of<Turns>(rows, part, row, begin, end, ahead);
    }
  }
}

template <typename Weight>
void multiply(const Part<Weight>& part) {
  const std::int64_t turns = (part.rows + kTileRows - 1) / kTileRows;
  if (turns <= 1) {
    const std::int64_t tile = smaller(part.begin + tile_outputs(part.rows), part.end);
    Ahead ahead({address_of(part, tile), address_of(part, part.end)}, part.next);
    take_turn_of<1>(part.rows, part, 0, part.begin, part.end, ahead);
  } else if (turns < 4) {
    take_turns<2>(part, turns);
  } else if (turns < 8) {
    take_turns<4>(part, turns);
  } else {
    take_turns<8>(part, turns);
  }
}
