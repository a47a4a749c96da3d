/// The register tile of the low-precision products: 8 rows times 48 columns of packed words.
///
/// A word is what one lane consumes a step: one float, two bfloat16 or four int8. Operands are packed in panels (8 rows
/// or 48 columns interleaved word by word), so that a tile reads both in order. Without the processor's instruction for
/// a precision the stored values are multiplied as floats: the same products, slower.
#pragma once

#include <cstdint>
#include <cstring>

namespace e2e {

enum class Precision { float32 = 0, bfloat16 = 1, int8 = 2 };

/// Bytes of one stored element.
int64_t element_bytes(Precision precision);

inline float bfloat16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

/// Whether this processor multiplies `precision` natively.
bool native(Precision precision);

constexpr int64_t kTileRows = 8;
constexpr int64_t kTileCols = 48;

enum class Engine { generic, float32, bfloat16, int8 };

/// What multiplies `precision` at the SIMD level in use.
Engine engine_for(Precision precision);

/// Words of a row of `depth` stored elements; depth is a multiple of 4.
int64_t words_per_row(Precision precision, Engine engine, int64_t depth);

/// A stored row as the engine's words.
void to_words(Precision precision, Engine engine, const void* stored, int64_t depth, uint32_t* words);

/// What columns are packed with, by exclusive or: turns signed bytes into unsigned ones (x + 128), as the int8
/// instruction wants for one operand; int8_offset() undoes it.
inline uint32_t column_flip(Engine engine) { return engine == Engine::int8 ? 0x80808080u : 0; }

/// −128 Σ_k row_k of a row of stored int8.
int32_t int8_offset(const int8_t* stored, int64_t depth);

/// Row or column `place` of a panel of `width`: every word xor `flip`. Null words stand for zeros.
void pack(const uint32_t* words, int64_t count, uint32_t flip, int64_t width, int64_t place, uint32_t* panel);

/// out (8, 48): the products of a packed row panel and a packed column panel, before the int8 scales. `offset` (8) is
/// added to int8 products. `out` and the panels are 64-byte aligned.
void multiply(Engine engine, const uint32_t* rows, const uint32_t* columns, int64_t words, const int32_t* offset,
              float* out);

/// Bit c of above[r] (8): whether the same product, r of the rows and c of the columns, exceeds base[c] + slope[c] ·
/// unit[r] or is compared with NaN. base and slope (48) are 64-byte aligned.
void multiply_above(Engine engine, const uint32_t* rows, const uint32_t* columns, int64_t words, const int32_t* offset,
                    const float* base, const float* slope, const float* unit, uint64_t* above);

/// 64-byte aligned words.
class Words {
 public:
  explicit Words(int64_t count);
  ~Words();
  Words(const Words&) = delete;
  Words& operator=(const Words&) = delete;
  uint32_t* const data;
};

}  // namespace e2e
