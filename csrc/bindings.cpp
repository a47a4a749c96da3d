/// The only file that knows Python: arrays in and out, the GIL released, std::invalid_argument becomes ValueError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>

#include "assignment.hpp"
#include "attention.hpp"
#include "branch.hpp"
#include "filter.hpp"
#include "gelu.hpp"
#include "linear_kl.hpp"
#include "simd.hpp"
#include "sparse.hpp"
#include "threads.hpp"

namespace py = pybind11;
using namespace e2e;

static Simd simd_from_name(const std::string& name) {
  for (Simd level : {Simd::baseline, Simd::avx2, Simd::avx512})
    if (simd_name(level) == name) return level;
  throw std::invalid_argument("simd level must be 'baseline', 'avx2' or 'avx512', got '" + name + "'");
}

static void bind_simd(py::module_& m) {
  m.def("simd_best", [] { return simd_name(simd_best()); });
  m.def("simd_level", [] { return simd_name(simd_level()); });
  m.def("simd_force", [](const std::string& name) { simd_force(simd_from_name(name)); }, py::arg("level"));
}

static void bind_threads(py::module_& m) {
  m.def("runtime", [] { return runtime() == Runtime::openmp ? "OpenMP" : "std::thread"; });
  m.def("force_own_threads", &force_own_threads, py::arg("own"));
}

/// A C-contiguous array of T. With noconvert() a wrong dtype or layout is refused, else converted.
template <class T>
using Array = py::array_t<T, py::array::c_style>;
template <class T>
using MaybeArray = std::optional<Array<T>>;

static void expect(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

template <class T>
static T* out(Array<T>& a) {
  return a.mutable_data();
}

template <class T>
static const T* in(const MaybeArray<T>& a) {
  return a ? a->data() : nullptr;
}

template <class T>
static T* out(MaybeArray<T>& a) {
  return a ? a->mutable_data() : nullptr;
}

static LinearKl linear_kl_job(const Array<float>& students, const Array<float>& teacher, const Array<float>& weight,
                              const MaybeArray<float>& bias, float softcap) {
  expect(students.ndim() == 3 && teacher.ndim() == 2 && weight.ndim() == 2 && students.shape(1) == teacher.shape(0) &&
             students.shape(2) == teacher.shape(1) && teacher.shape(1) == weight.shape(1) && weight.shape(0) > 0,
         "students must be (S, N, D), teacher (N, D) and weight (V, D), V > 0");
  expect(!bias || bias->size() == weight.shape(0), "bias must be (V,)");
  return {.students = students.data(),
          .teacher = teacher.data(),
          .weight = weight.data(),
          .bias = in(bias),
          .S = students.shape(0),
          .N = teacher.shape(0),
          .D = teacher.shape(1),
          .V = weight.shape(0),
          .softcap = softcap,
          .loss = nullptr,
          .dstudents = nullptr};
}

static void bind_linear_kl(py::module_& m) {
  m.def(
      "linear_kl_scratch",
      [](int64_t S, int64_t N, int64_t D, int64_t V, bool need_grad, int threads) {
        LinearKl job{};
        float some = 0;
        job.S = S, job.N = N, job.D = D, job.V = V, job.dstudents = need_grad ? &some : nullptr;
        return linear_kl_scratch(job, threads);
      },
      py::arg("S"), py::arg("N"), py::arg("D"), py::arg("V"), py::arg("need_grad"), py::arg("threads"));
  m.def(
      "linear_kl",
      [](Array<float> students, Array<float> teacher, Array<float> weight, MaybeArray<float> bias, float softcap,
         Array<float> loss, MaybeArray<float> dstudents, Array<float> scratch, int threads) {
        LinearKl job = linear_kl_job(students, teacher, weight, bias, softcap);
        expect(loss.size() == job.S * job.N, "loss must be (S, N)");
        expect(!dstudents || dstudents->size() == students.size(), "dstudents must have students' shape");
        job.loss = out(loss), job.dstudents = out(dstudents);
        expect(scratch.size() >= linear_kl_scratch(job, threads), "scratch must have linear_kl_scratch() elements");
        float* const memory = out(scratch);
        const py::gil_scoped_release release;
        linear_kl(job, memory, threads);
      },
      py::arg("students").noconvert(), py::arg("teacher").noconvert(), py::arg("weight").noconvert(),
      py::arg("bias").noconvert(), py::arg("softcap"), py::arg("loss").noconvert(), py::arg("dstudents").noconvert(),
      py::arg("scratch").noconvert(), py::arg("threads"));
  const auto elementwise = [&m](const char* name, void (*f)(const float*, float*, int64_t)) {
    m.def(
        name,
        [f](Array<float> x, Array<float> y) {
          expect(x.size() == y.size(), "x and y must have one size");
          f(x.data(), out(y), x.size());
        },
        py::arg("x").noconvert(), py::arg("y").noconvert());
  };
  elementwise("exp_lanes", exp_lanes);
  elementwise("tanh_lanes", tanh_lanes);
}

/// (B, heads, T, D) with contiguous rows; other axes as they lie.
template <class T>
static Heads<T> heads(T* data, const py::array_t<float>& a) {
  const auto stride = [&](int axis) { return a.strides(axis) / static_cast<int64_t>(sizeof(float)); };
  return {data, stride(0), stride(1), stride(2)};
}

static Heads<const float> in_heads(const py::array_t<float>& a) { return heads(a.data(), a); }
static Heads<float> out_heads(py::array_t<float>& a) { return heads(a.mutable_data(), a); }

static bool is_heads(const py::array_t<float>& a, int64_t B, int64_t H, int64_t T, int64_t D) {
  return a.ndim() == 4 && a.shape(0) == B && a.shape(1) == H && a.shape(2) == T && a.shape(3) == D &&
         (a.size() == 0 || D == 1 || a.strides(3) == sizeof(float));
}

static Attention attention_job(const py::array_t<float>& q, const py::array_t<float>& k, const py::array_t<float>& v,
                               float scale, int64_t window, float softcap, py::array_t<float>& out,
                               Array<float>& softmax) {
  expect(q.ndim() == 4 && k.ndim() == 4, "q and k must have four axes");
  const int64_t B = q.shape(0), H = q.shape(1), K = k.shape(1), T = q.shape(2), D = q.shape(3);
  expect(K > 0 && H % K == 0, "q must have a multiple of k's heads");
  expect(is_heads(q, B, H, T, D) && is_heads(k, B, K, T, D) && is_heads(v, B, K, T, D) && is_heads(out, B, H, T, D),
         "q and out must be (B, H, T, D), k and v (B, K, T, D), rows contiguous");
  expect(softmax.size() == 2 * B * H * T, "softmax must be (2, B, H, T)");
  expect(window >= 1 && softcap >= 0, "window must be at least 1, softcap at least 0");
  float* const top = softmax.mutable_data();
  return {.q = in_heads(q),
          .k = in_heads(k),
          .v = in_heads(v),
          .B = B,
          .H = H,
          .K = K,
          .T = T,
          .D = D,
          .scale = scale,
          .window = window,
          .softcap = softcap,
          .out = out_heads(out),
          .top = top,
          .inverse = top + B * H * T};
}

static void bind_attention(py::module_& m) {
  using Strided = py::array_t<float>;
  m.def(
      "attention_scratch",
      [](int64_t B, int64_t H, int64_t K, int64_t T, int64_t D, bool gradient, int threads) {
        expect(K > 0 && H % K == 0, "q must have a multiple of k's heads");
        Attention job{};
        job.B = B, job.H = H, job.K = K, job.T = T, job.D = D;
        return attention_scratch(job, gradient, threads);
      },
      py::arg("B"), py::arg("H"), py::arg("K"), py::arg("T"), py::arg("D"), py::arg("gradient"), py::arg("threads"));
  m.def(
      "attention",
      [](const Strided& q, const Strided& k, const Strided& v, float scale, int64_t window, float softcap, Strided out,
         Array<float> softmax, Array<float> scratch, int threads) {
        const Attention job = attention_job(q, k, v, scale, window, softcap, out, softmax);
        expect(scratch.size() >= attention_scratch(job, false, threads),
               "scratch must have attention_scratch() elements");
        float* const memory = scratch.mutable_data();
        const py::gil_scoped_release release;
        attention(job, memory, threads);
      },
      py::arg("q").noconvert(), py::arg("k").noconvert(), py::arg("v").noconvert(), py::arg("scale"), py::arg("window"),
      py::arg("softcap"), py::arg("out").noconvert(), py::arg("softmax").noconvert(), py::arg("scratch").noconvert(),
      py::arg("threads"));
  m.def(
      "attention_gradient",
      [](const Strided& q, const Strided& k, const Strided& v, float scale, int64_t window, float softcap, Strided out,
         Array<float> softmax, const Strided& dout, Strided dq, Strided dk, Strided dv, Array<float> scratch,
         int threads) {
        const Attention of = attention_job(q, k, v, scale, window, softcap, out, softmax);
        expect(is_heads(dout, of.B, of.H, of.T, of.D) && is_heads(dq, of.B, of.H, of.T, of.D) &&
                   is_heads(dk, of.B, of.K, of.T, of.D) && is_heads(dv, of.B, of.K, of.T, of.D),
               "dout and dq must be (B, H, T, D), dk and dv (B, K, T, D), rows contiguous");
        expect(scratch.size() >= attention_scratch(of, true, threads),
               "scratch must have attention_scratch() elements");
        const AttentionGradient job{of, in_heads(dout), out_heads(dq), out_heads(dk), out_heads(dv)};
        float* const memory = scratch.mutable_data();
        const py::gil_scoped_release release;
        attention_gradient(job, memory, threads);
      },
      py::arg("q").noconvert(), py::arg("k").noconvert(), py::arg("v").noconvert(), py::arg("scale"), py::arg("window"),
      py::arg("softcap"), py::arg("out").noconvert(), py::arg("softmax").noconvert(), py::arg("dout").noconvert(),
      py::arg("dq").noconvert(), py::arg("dk").noconvert(), py::arg("dv").noconvert(), py::arg("scratch").noconvert(),
      py::arg("threads"));
}

/// A layer from its weight (outputs, inputs), in any layout, and bias.
static Linear linear_layer(const py::array_t<float>& weight, const MaybeArray<float>& bias, int64_t inputs) {
  expect(weight.ndim() == 2 && weight.shape(1) == inputs, "a weight must be (outputs, inputs of the layer)");
  expect(!bias || bias->size() == weight.shape(0), "a bias must have its layer's outputs");
  const auto stride = [&](int axis) { return weight.strides(axis) / static_cast<int64_t>(sizeof(float)); };
  return {weight.data(), weight.shape(0), inputs, stride(0), stride(1), bias ? bias->data() : nullptr};
}

static void bind_branch(py::module_& m) {
  using Strided = py::array_t<float>;
  m.def(
      "branch_scratch",
      [](int64_t inputs, int64_t hidden, int64_t outputs, int threads) {
        Branch job{};
        job.first.inputs = inputs, job.first.outputs = hidden;
        if (outputs) job.second = Linear{nullptr, outputs, hidden, 0, 0, nullptr};
        return branch_scratch(job, threads);
      },
      py::arg("inputs"), py::arg("hidden"), py::arg("outputs"), py::arg("threads"));
  m.def(
      "branch",
      [](Array<float> x, MaybeArray<float> gain, MaybeArray<float> shift, float eps, const Strided& weight,
         MaybeArray<float> bias, bool tanh, std::optional<Strided> second_weight, MaybeArray<float> second_bias,
         MaybeArray<float> residual, Array<float> y, Array<float> scratch, int threads) {
        expect(x.ndim() == 2, "x must be (N, D)");
        const int64_t N = x.shape(0), D = x.shape(1);
        Branch job{.x = x.data(),
                   .N = N,
                   .norm = {},
                   .first = linear_layer(weight, bias, D),
                   .gelu = tanh ? Gelu::tanh : Gelu::erf,
                   .second = {},
                   .residual = nullptr,
                   .y = nullptr};
        if (gain) {
          expect(gain->size() == D && shift && shift->size() == D, "gain and shift must be (D)");
          job.norm = Norm{gain->data(), shift->data(), eps};
        }
        if (second_weight) job.second = linear_layer(*second_weight, second_bias, job.first.outputs);
        const int64_t outputs = job.second ? job.second->outputs : job.first.outputs;
        expect(y.size() == N * outputs && (!residual || residual->size() == N * outputs),
               "y and residual must be (N, outputs)");
        job.residual = residual ? residual->data() : nullptr, job.y = out(y);
        expect(scratch.size() >= branch_scratch(job, threads), "scratch must have branch_scratch() elements");
        float* const memory = out(scratch);
        const py::gil_scoped_release release;
        branch(job, memory, threads);
      },
      py::arg("x").noconvert(), py::arg("gain").noconvert(), py::arg("shift").noconvert(), py::arg("eps"),
      py::arg("weight").noconvert(), py::arg("bias").noconvert(), py::arg("tanh"), py::arg("second_weight").noconvert(),
      py::arg("second_bias").noconvert(), py::arg("residual").noconvert(), py::arg("y").noconvert(),
      py::arg("scratch").noconvert(), py::arg("threads"));
}

static void bind_gelu(py::module_& m) {
  const auto kind = [](bool tanh) { return tanh ? Gelu::tanh : Gelu::erf; };
  m.def(
      "gelu",
      [kind](Array<float> x, bool tanh, Array<float> y, int threads) {
        expect(x.size() == y.size(), "x and y must have one size");
        const float* const from = x.data();
        float* const to = out(y);
        const int64_t n = x.size();
        const py::gil_scoped_release release;
        gelu(from, n, kind(tanh), to, threads);
      },
      py::arg("x").noconvert(), py::arg("tanh"), py::arg("y").noconvert(), py::arg("threads"));
  m.def(
      "gelu_gradient",
      [kind](Array<float> x, Array<float> dy, bool tanh, Array<float> dx, int threads) {
        expect(x.size() == dy.size() && x.size() == dx.size(), "x, dy and dx must have one size");
        const float *const from = x.data(), *const g = dy.data();
        float* const to = out(dx);
        const int64_t n = x.size();
        const py::gil_scoped_release release;
        gelu_gradient(from, g, n, kind(tanh), to, threads);
      },
      py::arg("x").noconvert(), py::arg("dy").noconvert(), py::arg("tanh"), py::arg("dx").noconvert(),
      py::arg("threads"));
}

static Precision precision_from_name(const std::string& name) {
  if (name == "float32") return Precision::float32;
  if (name == "bfloat16") return Precision::bfloat16;
  if (name == "int8") return Precision::int8;
  throw std::invalid_argument("precision must be 'float32', 'bfloat16' or 'int8', got '" + name + "'");
}

/// What Selection and Positives share.
template <class Scores>
static void bind_scores(py::class_<Scores> scores) {
  scores
      .def(
          "add",
          [](Scores& self, Array<float> block, int64_t first, int threads) {
            expect(block.ndim() == 2 && block.shape(0) == self.rows(), "scores must be (N, features of the block)");
            const float* const data = block.data();
            const int64_t columns = block.shape(1);
            const py::gil_scoped_release release;
            self.add(data, columns, first, threads);
          },
          py::arg("scores").noconvert(), py::arg("first"), py::arg("threads"))
      .def(
          "screen",
          [](Scores& self, Array<float> x, Array<float> weight, MaybeArray<float> bias, const std::string& precision,
             int64_t share, int threads, MaybeArray<float> floor) {
            expect(x.ndim() == 2 && weight.ndim() == 2 && x.shape(0) == self.rows() && x.shape(1) == weight.shape(1) &&
                       (!bias || bias->size() == weight.shape(0)) && (!floor || floor->size() == weight.shape(0)),
                   "x must be (N, D), weight (F, D), bias and floor (F,)");
            expect(!floor || std::is_same_v<Scores, Positives>, "a Selection has no floor");
            const Scoring job{x.data(), weight.data(), in(bias), weight.shape(0), weight.shape(1), in(floor)};
            const Precision p = precision_from_name(precision);
            const py::gil_scoped_release release;
            return self.screen(job, p, share, threads);
          },
          py::arg("x").noconvert(), py::arg("weight").noconvert(), py::arg("bias").noconvert(), py::arg("precision"),
          py::arg("share"), py::arg("threads"), py::arg("floor").noconvert() = py::none())
      .def(
          "finish",
          [](Scores& self, Array<float> values, Array<int32_t> indices, Array<int32_t> count, int threads) {
            expect(values.ndim() == 2 && values.shape(0) == self.rows() && indices.size() == values.size() &&
                       count.size() == self.rows(),
                   "values and indices must be (N, K), count (N,)");
            float* const v = out(values);
            int32_t *i = out(indices), *c = out(count);
            const int64_t slots = values.shape(1);
            const py::gil_scoped_release release;
            self.finish(v, i, c, slots, threads);
          },
          py::arg("values").noconvert(), py::arg("indices").noconvert(), py::arg("count").noconvert(),
          py::arg("threads"));
}

static void bind_sparse(py::module_& m) {
  m.def("keep_freed_memory", keep_freed_memory, py::arg("bytes"));
  m.def(
      "prefer_huge_pages", [](Array<uint8_t> bytes) { prefer_huge_pages(out(bytes), bytes.size()); },
      py::arg("bytes").noconvert());

  bind_scores(py::class_<Selection>(m, "Selection").def(py::init<int64_t, int64_t>(), py::arg("rows"), py::arg("k")));
  bind_scores(py::class_<Positives>(m, "Positives")
                  .def(py::init<int64_t, int64_t>(), py::arg("rows"), py::arg("limit"))
                  .def("fullest", &Positives::fullest));

  m.def(
      "decode",
      [](Array<float> values, Array<int32_t> indices, Array<float> weight, bool normalize, MaybeArray<float> bias,
         bool nonzero, Array<float> y, int threads) {
        expect(values.ndim() == 2 && indices.size() == values.size() && weight.ndim() == 2 && y.ndim() == 2 &&
                   y.shape(0) == values.shape(0) && y.shape(1) == weight.shape(1) &&
                   (!bias || bias->size() == weight.shape(1)),
               "values and indices must be (N, K), weight (F, D), y (N, D), bias (D,)");
        const float *v = values.data(), *w = weight.data(), *b = in(bias);
        const int32_t* const i = indices.data();
        float* const result = out(y);
        const int64_t rows = values.shape(0), slots = values.shape(1), features = weight.shape(0);
        const int64_t width = weight.shape(1);
        const Slots which = nonzero ? Slots::nonzero : Slots::positive;
        const py::gil_scoped_release release;
        decode(v, i, rows, slots, w, features, width, normalize, b, which, result, threads);
      },
      py::arg("values").noconvert(), py::arg("indices").noconvert(), py::arg("weight").noconvert(),
      py::arg("normalize"), py::arg("bias").noconvert(), py::arg("nonzero"), py::arg("y").noconvert(),
      py::arg("threads"));

  m.def(
      "code_backward",
      [](Array<float> values, Array<int32_t> indices, std::optional<py::array_t<float, 0>> dvalues_in,
         MaybeArray<float> g, MaybeArray<float> W_dec, MaybeArray<float> x, bool normalize, MaybeArray<float> dW_dec,
         MaybeArray<float> dW_enc, MaybeArray<float> db_enc, MaybeArray<float> dvalues, int64_t features, int64_t width,
         int threads) {
        expect(values.ndim() == 2, "values must be (N, K)");
        const int64_t rows = values.shape(0), slots = values.shape(1);
        const auto has = [](const MaybeArray<float>& a, int64_t size) { return !a || a->size() == size; };
        expect(indices.size() == values.size() && has(dvalues, values.size()) &&
                   (!dvalues_in ||
                    (dvalues_in->ndim() == 2 && dvalues_in->shape(0) == rows && dvalues_in->shape(1) == slots)),
               "indices, dvalues and dvalues_in must have values' shape");
        expect(has(g, rows * width) && has(x, rows * width), "g and x must be (N, D)");
        expect(has(W_dec, features * width) && has(dW_dec, features * width) && has(dW_enc, features * width) &&
                   has(db_enc, features),
               "W_dec, dW_dec and dW_enc must be (F, D), db_enc (F,)");
        expect(g.has_value() == W_dec.has_value() && (!dW_dec || g) && (!dW_enc || (x && db_enc)),
               "g comes with W_dec, dW_dec with g, dW_enc with x and db_enc");
        const auto stride = [&](int axis) {
          return dvalues_in ? dvalues_in->strides(axis) / py::ssize_t{sizeof(float)} : 0;
        };
        const Backward job{.rows = rows,
                           .slots = slots,
                           .features = features,
                           .width = width,
                           .values = values.data(),
                           .indices = indices.data(),
                           .dvalues_in = dvalues_in ? dvalues_in->data() : nullptr,
                           .stride_n = stride(0),
                           .stride_k = stride(1),
                           .g = in(g),
                           .W_dec = in(W_dec),
                           .x = in(x),
                           .normalize = normalize,
                           .dW_dec = out(dW_dec),
                           .dW_enc = out(dW_enc),
                           .db_enc = out(db_enc),
                           .dvalues = out(dvalues)};
        const py::gil_scoped_release release;
        code_backward(job, threads);
      },
      py::arg("values").noconvert(), py::arg("indices").noconvert(), py::arg("dvalues_in").noconvert(),
      py::arg("g").noconvert(), py::arg("W_dec").noconvert(), py::arg("x").noconvert(), py::arg("normalize"),
      py::arg("dW_dec").noconvert(), py::arg("dW_enc").noconvert(), py::arg("db_enc").noconvert(),
      py::arg("dvalues").noconvert(), py::arg("features"), py::arg("width"), py::arg("threads"));
}

// ---- bind_assignment: sparse assignment and the sweeps that feed it ----

/// The vector's memory as an array, without a copy.
template <class T>
static py::array_t<T> hand_over(std::vector<T>&& values) {
  auto* owner = new std::vector<T>(std::move(values));
  py::capsule free(owner, [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return py::array_t<T>({static_cast<py::ssize_t>(owner->size())}, owner->data(), free);
}

/// Pairs as an (E, 2) int32 array.
static py::array_t<int32_t> hand_over_pairs(std::vector<Pair>&& pairs) {
  auto* owner = new std::vector<Pair>(std::move(pairs));
  py::capsule free(owner, [](void* p) { delete static_cast<std::vector<Pair>*>(p); });
  return py::array_t<int32_t>({static_cast<py::ssize_t>(owner->size()), py::ssize_t{2}},
                              reinterpret_cast<const int32_t*>(owner->data()), free);
}

static const Pair* as_pairs(const Array<int32_t>& pairs) {
  if (pairs.ndim() != 2 || pairs.shape(1) != 2) throw std::invalid_argument("pairs must have shape (E, 2)");
  return reinterpret_cast<const Pair*>(pairs.data());
}

static Graph as_graph(const Array<int64_t>& start, const Array<int32_t>& col, const Array<double>& value,
                      int64_t cols) {
  if (start.ndim() != 1 || start.size() < 1) throw std::invalid_argument("start must have shape (rows + 1,)");
  if (col.ndim() != 1 || value.ndim() != 1 || col.size() != value.size() || start.at(start.size() - 1) != col.size())
    throw std::invalid_argument(
        "col and value must both hold start[-1] = " + std::to_string(start.at(start.size() - 1)) + " edges, got " +
        std::to_string(col.size()) + " and " + std::to_string(value.size()));
  return {start.size() - 1, cols, start.data(), col.data(), value.data()};
}

/// Unit rows in low precision, held by the caller's arrays: data (rows, depth · bytes), scale (rows,).
struct QuantizedArrays {
  QuantizedArrays(const std::string& name, Array<uint8_t> bytes, Array<float> scales)
      : precision(precision_from_name(name)), data(std::move(bytes)), scale(std::move(scales)) {
    const int64_t size = element_bytes(precision);
    if (data.ndim() != 2 || data.shape(1) % (4 * size) || scale.size() != data.shape(0))
      throw std::invalid_argument(
          "data must be (rows, depth · element bytes) with depth a multiple of 4, and scale (rows,)");
  }
  Quantized view() const {
    return {precision, data.shape(0), data.shape(1) / element_bytes(precision), data.data(), scale.data()};
  }
  Precision precision;
  Array<uint8_t> data;
  Array<float> scale;
};

template <class Real>
static py::array_t<double> bind_row_norms(const Array<Real>& x, int threads) {
  py::array_t<double> norm(x.shape(0));
  double* out = norm.mutable_data();
  py::gil_scoped_release release;
  row_norms(x.data(), x.shape(0), x.shape(1), out, threads);
  return norm;
}

template <class Real>
static py::tuple bind_quantize(const Array<Real>& x, const Array<double>& norm, const std::string& precision,
                               int threads) {
  const int64_t rows = x.shape(0), d = x.shape(1), depth = (d + 3) / 4 * 4;
  const Precision p = precision_from_name(precision);
  py::array_t<uint8_t> data({rows, depth * element_bytes(p)});
  py::array_t<float> scale(rows);
  py::array_t<double> error(rows);
  uint8_t* data_out = data.mutable_data();
  float* scale_out = scale.mutable_data();
  double* error_out = error.mutable_data();
  {
    py::gil_scoped_release release;
    quantize(x.data(), norm.data(), rows, d, p, depth, data_out, scale_out, error_out, threads);
  }
  return py::make_tuple(data, scale, error);
}

struct SweepArrays {
  Array<int32_t> a_index, b_index;
  Array<float> row_level;
  std::optional<Array<float>> col_level, price;
  std::optional<Array<int64_t>> limit;

  Sweep view(const QuantizedArrays& a, const QuantizedArrays& b, bool absolute, int64_t block_rows) const {
    const auto same = [](const char* name, int64_t size, int64_t expected) {
      if (size != expected)
        throw std::invalid_argument(std::string(name) + " must hold " + std::to_string(expected) + " entries, got " +
                                    std::to_string(size));
    };
    same("row_level", row_level.size(), a_index.size());
    if (col_level) same("col_level", col_level->size(), b_index.size());
    if (price) same("price", price->size(), b_index.size());
    if (limit) same("limit", limit->size(), a_index.size());
    return {.a = a.view(),
            .b = b.view(),
            .a_index = a_index.data(),
            .a_count = a_index.size(),
            .b_index = b_index.data(),
            .b_count = b_index.size(),
            .row_level = row_level.data(),
            .col_level = in(col_level),
            .price = in(price),
            .limit = in(limit),
            .absolute = absolute,
            .block_rows = block_rows};
  }
};

template <class Real>
static Rows<Real> as_rows(const Array<Real>& a, const Array<double>& a_norm, const Array<Real>& b,
                          const Array<double>& b_norm, bool absolute) {
  if (a.ndim() != 2 || b.ndim() != 2 || a.shape(1) != b.shape(1))
    throw std::invalid_argument("a and b must be (n, d) and (m, d)");
  return {a.data(), b.data(), a_norm.data(), b_norm.data(), a.shape(1), absolute};
}

template <class Real>
static void bind_real(py::module_& m) {
  m.def("row_norms", &bind_row_norms<Real>, py::arg("x").noconvert(), py::arg("threads"));
  m.def("quantize", &bind_quantize<Real>, py::arg("x").noconvert(), py::arg("norm"), py::arg("precision"),
        py::arg("threads"));
  m.def(
      "exact_cosines",
      [](const Array<Real>& a, const Array<double>& a_norm, const Array<Real>& b, const Array<double>& b_norm,
         const Array<int64_t>& start, const Array<int32_t>& col, bool absolute, int threads) {
        const auto exact = as_rows(a, a_norm, b, b_norm, absolute);
        py::array_t<double> value(col.size());
        double* out = value.mutable_data();
        py::gil_scoped_release release;
        exact_cosines(exact, start.size() - 1, start.data(), col.data(), out, threads);
        return value;
      },
      py::arg("a").noconvert(), py::arg("a_norm"), py::arg("b").noconvert(), py::arg("b_norm"), py::arg("start"),
      py::arg("col"), py::arg("absolute"), py::arg("threads"));
  m.def(
      "price_rows",
      [](const QuantizedArrays& a, const QuantizedArrays& b, const Array<int32_t>& a_index,
         const Array<int32_t>& b_index, const Array<float>& row_level, const Array<float>& price,
         const Array<int64_t>& limit, const Array<Real>& a_rows, const Array<double>& a_norm, const Array<Real>& b_rows,
         const Array<double>& b_norm, const Array<double>& keep_level, const Array<double>& exact_price, int64_t keep,
         int64_t row_cap, bool absolute, int64_t block_rows, int threads) {
        const SweepArrays arrays{a_index, b_index, row_level, std::nullopt, price, limit};
        const Sweep job = arrays.view(a, b, absolute, block_rows);
        const auto exact = as_rows(a_rows, a_norm, b_rows, b_norm, absolute);
        py::array_t<double> bound(a_index.size());
        double* out = bound.mutable_data();
        Priced priced;
        {
          py::gil_scoped_release release;
          priced = price_rows(job, exact, keep_level.data(), exact_price.data(), keep, row_cap, out, threads);
        }
        return py::make_tuple(hand_over_pairs(std::move(priced.pair)), hand_over(std::move(priced.value)), bound);
      },
      py::arg("a"), py::arg("b"), py::arg("a_index"), py::arg("b_index"), py::arg("row_level"), py::arg("price"),
      py::arg("limit"), py::arg("a_rows").noconvert(), py::arg("a_norm"), py::arg("b_rows").noconvert(),
      py::arg("b_norm"), py::arg("keep_level"), py::arg("exact_price"), py::arg("keep"), py::arg("row_cap"),
      py::arg("absolute"), py::arg("block_rows"), py::arg("threads"));
}

static py::tuple assignment_result(Assignment&& a) {
  return py::make_tuple(hand_over(std::move(a.col_of_row)), hand_over(std::move(a.row_of_col)),
                        hand_over(std::move(a.price)), a.bids, a.pops);
}

static Assignment assignment_state(const Graph& g, const Array<int32_t>& col_of_row, const Array<int32_t>& row_of_col,
                                   const Array<double>& price) {
  if (col_of_row.size() != g.rows || row_of_col.size() != g.cols || price.size() != g.cols)
    throw std::invalid_argument("the assignment's arrays must fit the graph");
  Assignment a;
  a.col_of_row.assign(col_of_row.data(), col_of_row.data() + g.rows);
  a.row_of_col.assign(row_of_col.data(), row_of_col.data() + g.cols);
  a.price.assign(price.data(), price.data() + g.cols);
  return a;
}

static void bind_assignment(py::module_& m) {
  py::class_<QuantizedArrays>(m, "Quantized")
      .def(py::init<const std::string&, Array<uint8_t>, Array<float>>(), py::arg("precision"), py::arg("data"),
           py::arg("scale"));
  m.def("native_precision", [](const std::string& name) { return native(precision_from_name(name)); });
  bind_real<float>(m);
  bind_real<double>(m);
  m.def(
      "row_levels",
      [](const QuantizedArrays& a, const QuantizedArrays& b, const Array<int32_t>& b_index, int64_t rank, bool absolute,
         int threads) {
        py::array_t<float> level(a.view().rows);
        float* out = level.mutable_data();
        py::gil_scoped_release release;
        row_levels(a.view(), b.view(), b_index.data(), b_index.size(), rank, absolute, out, threads);
        return level;
      },
      py::arg("a"), py::arg("b"), py::arg("b_index"), py::arg("rank"), py::arg("absolute"), py::arg("threads"));
  m.def(
      "sweep",
      [](const QuantizedArrays& a, const QuantizedArrays& b, const Array<int32_t>& a_index,
         const Array<int32_t>& b_index, const Array<float>& row_level, const std::optional<Array<float>>& col_level,
         const std::optional<Array<float>>& price, const std::optional<Array<int64_t>>& limit, int64_t row_cap,
         bool absolute, int64_t block_rows, int threads) {
        const SweepArrays arrays{a_index, b_index, row_level, col_level, price, limit};
        const Sweep job = arrays.view(a, b, absolute, block_rows);
        std::vector<uint8_t> capped(a_index.size(), 0);
        std::vector<Pair> pairs;
        {
          py::gil_scoped_release release;
          pairs = sweep(job, row_cap, capped.data(), threads);
        }
        return py::make_tuple(hand_over_pairs(std::move(pairs)), hand_over(std::move(capped)));
      },
      py::arg("a"), py::arg("b"), py::arg("a_index"), py::arg("b_index"), py::arg("row_level"),
      py::arg("col_level") = py::none(), py::arg("price") = py::none(), py::arg("limit") = py::none(),
      py::arg("row_cap"), py::arg("absolute"), py::arg("block_rows"), py::arg("threads"));
  m.def(
      "build_rows",
      [](const Array<int32_t>& pairs, int64_t rows, int threads) {
        const Pair* pair = as_pairs(pairs);
        std::vector<int64_t> start;
        std::vector<int32_t> col;
        {
          py::gil_scoped_release release;
          build_rows(pair, pairs.shape(0), rows, start, col, threads);
        }
        return py::make_tuple(hand_over(std::move(start)), hand_over(std::move(col)));
      },
      py::arg("pairs"), py::arg("rows"), py::arg("threads"));
  m.def(
      "merge_rows",
      [](const Array<int64_t>& start, const Array<int32_t>& col, const Array<double>& value,
         const Array<int32_t>& pairs, const Array<double>& pair_value, int64_t cols) {
        const Graph g = as_graph(start, col, value, cols);
        const Pair* pair = as_pairs(pairs);
        std::vector<int64_t> new_start;
        std::vector<int32_t> new_col;
        std::vector<double> new_value;
        {
          py::gil_scoped_release release;
          merge_rows(g, pair, pair_value.data(), pairs.shape(0), new_start, new_col, new_value);
        }
        return py::make_tuple(hand_over(std::move(new_start)), hand_over(std::move(new_col)),
                              hand_over(std::move(new_value)));
      },
      py::arg("start"), py::arg("col"), py::arg("value"), py::arg("pairs"), py::arg("pair_value"), py::arg("cols"));
  m.def(
      "transpose_rows",
      [](const Array<int64_t>& start, const Array<int32_t>& col, const Array<double>& value, int64_t cols) {
        const Graph g = as_graph(start, col, value, cols);
        std::vector<int64_t> new_start;
        std::vector<int32_t> row;
        std::vector<double> new_value;
        {
          py::gil_scoped_release release;
          transpose_rows(g, new_start, row, new_value);
        }
        return py::make_tuple(hand_over(std::move(new_start)), hand_over(std::move(row)),
                              hand_over(std::move(new_value)));
      },
      py::arg("start"), py::arg("col"), py::arg("value"), py::arg("cols"));
  m.def(
      "assign",
      [](const Array<int64_t>& start, const Array<int32_t>& col, const Array<double>& value, int64_t cols,
         int64_t bids_per_row) {
        const Graph g = as_graph(start, col, value, cols);
        Assignment a;
        {
          py::gil_scoped_release release;
          check_graph(g);
          a = assign(g, bids_per_row);
        }
        return assignment_result(std::move(a));
      },
      py::arg("start"), py::arg("col"), py::arg("value"), py::arg("cols"), py::arg("bids_per_row") = 300);
  m.def(
      "reassign",
      [](const Array<int64_t>& start, const Array<int32_t>& col, const Array<double>& value, int64_t cols,
         const Array<int32_t>& col_of_row, const Array<int32_t>& row_of_col, const Array<double>& price) {
        const Graph g = as_graph(start, col, value, cols);
        Assignment a = assignment_state(g, col_of_row, row_of_col, price);
        {
          py::gil_scoped_release release;
          reassign(g, a);
        }
        return assignment_result(std::move(a));
      },
      py::arg("start"), py::arg("col"), py::arg("value"), py::arg("cols"), py::arg("col_of_row"), py::arg("row_of_col"),
      py::arg("price"));
  m.def(
      "tie_groups",
      [](const Array<int64_t>& start, const Array<int32_t>& col, const Array<double>& value, int64_t cols,
         const Array<int32_t>& col_of_row, const Array<int32_t>& row_of_col, const Array<double>& price,
         double tolerance) {
        const Graph g = as_graph(start, col, value, cols);
        const Assignment a = assignment_state(g, col_of_row, row_of_col, price);
        std::vector<int32_t> groups;
        {
          py::gil_scoped_release release;
          groups = tie_groups(g, a, tolerance);
        }
        return hand_over(std::move(groups));
      },
      py::arg("start"), py::arg("col"), py::arg("value"), py::arg("cols"), py::arg("col_of_row"), py::arg("row_of_col"),
      py::arg("price"), py::arg("tolerance"));
  m.def(
      "greedy",
      [](const Array<int64_t>& start, const Array<int32_t>& col, const Array<double>& value, int64_t cols,
         const Array<double>& row_bound, const Array<double>& col_bound) {
        const Graph g = as_graph(start, col, value, cols);
        if (row_bound.size() != g.rows || col_bound.size() != g.cols)
          throw std::invalid_argument("row_bound and col_bound must fit the graph");
        std::vector<int32_t> match;
        {
          py::gil_scoped_release release;
          match = greedy(g, row_bound.data(), col_bound.data());
        }
        return hand_over(std::move(match));
      },
      py::arg("start"), py::arg("col"), py::arg("value"), py::arg("cols"), py::arg("row_bound"), py::arg("col_bound"));
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ core of e2e_fast";
  bind_simd(m);
  bind_threads(m);
  bind_linear_kl(m);
  bind_attention(m);
  bind_branch(m);
  bind_gelu(m);
  bind_sparse(m);
  bind_assignment(m);
}
