/// A thread takes a block of tokens from the stream and back to it: everything between stays in its caches, transposed,
/// and each weight is read once for the block.

#include "blocks.inl"
#include "elementary.inl"

static int64_t tile_tokens() { return kBlock; }

/// Floats of scratch memory of one thread.
static int64_t tile_scratch(const Branch& job) {
  const int64_t outputs = job.second ? padded(job.second->outputs) : 0;
  return (padded(job.first.inputs) + padded(job.first.outputs) + outputs) * kBlock;
}

/// LayerNorm of x [D][kBlock], in place.
static void normalize(const Norm& norm, int64_t D, float* x) {
  Lanes mean[3]{}, variance[3]{};
  const float share = 1.f / static_cast<float>(D);
  for (int64_t d = 0; d < D; ++d)
    for (int b = 0; b < 3; ++b) mean[b] += load(x + d * kBlock + b * kLanes);
  for (int b = 0; b < 3; ++b) mean[b] *= share;
  for (int64_t d = 0; d < D; ++d)
    for (int b = 0; b < 3; ++b) {
      const Lanes rest = load(x + d * kBlock + b * kLanes) - mean[b];
      variance[b] += rest * rest;
    }
  Lanes inverse[3];
  for (int b = 0; b < 3; ++b)
    for (int i = 0; i < kLanes; ++i) inverse[b][i] = 1.f / __builtin_sqrtf(variance[b][i] * share + norm.eps);
  for (int64_t d = 0; d < D; ++d)
    for (int b = 0; b < 3; ++b) {
      float* const at = x + d * kBlock + b * kLanes;
      store(at, (load(at) - mean[b]) * inverse[b] * norm.gain[d] + norm.shift[d]);
    }
}

template <class F>
E2E_INLINE void each_register(float* x, int64_t rows, F&& f) {
  for (int64_t i = 0; i < rows * kBlock; i += kLanes) store(x + i, f(load(x + i)));
}

/// out [outputs][kBlock] = layer(x [inputs][kBlock]); `finish(rows, count)` sees rows of it as soon as they are there.
template <class F>
E2E_INLINE void apply(const Linear& layer, const float* x, float* out, F&& finish) {
  const auto tile = [&]<int R>(int64_t r) {
    float* const to = out + r * kBlock;
    row_tile<R, 3>(layer.weight + r * layer.row, layer.row, layer.column, x, layer.inputs,
                   layer.bias ? layer.bias + r : nullptr, to);
    finish(to, R);
  };
  int64_t r = 0;
  for (; r + kRows <= layer.outputs; r += kRows) tile.template operator()<kRows>(r);
  for (; r < layer.outputs; ++r) tile.template operator()<1>(r);
}

/// Tokens [first, first + count), count ≤ kBlock.
static void run_tile(const Branch& job, int64_t first, int64_t count, float* scratch) {
  const int64_t D = job.first.inputs;
  float *const x = scratch, *const h = x + padded(D) * kBlock;
  transpose_in(job.x + first * D, D, count, D, 1, x);
  if (job.norm) normalize(*job.norm, D, x);
  const float* y = h;
  int64_t outputs = job.first.outputs;
  if (job.second) {
    const auto activate = [&](float* rows, int64_t n) __attribute__((always_inline)) {
      if (job.gelu == Gelu::tanh) each_register(rows, n, [](Lanes v) { return v * share_tanh(v).share; });
      else each_register(rows, n, [](Lanes v) { return v * share_erf(v).share; });
    };
    float* const out = h + padded(outputs) * kBlock;
    apply(job.first, x, h, activate);
    apply(*job.second, h, out, [](float*, int64_t) {});
    y = out, outputs = job.second->outputs;
  } else {
    apply(job.first, x, h, [](float*, int64_t) {});
  }
  const Lanes one[3] = {fill(1), fill(1), fill(1)};
  float* const to = job.y + first * outputs;
  transpose_out(y, one, count, outputs, to, outputs);
  if (job.residual) add_scaled(to, 1, job.residual + first * outputs, count * outputs);
}
