/// The only file that knows Python: arrays in and out, the GIL released, std::invalid_argument becomes ValueError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>

#include "simd.hpp"
#include "softmax_kl.hpp"
#include "sparse.hpp"

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
  m.def("has_bfloat16", has_bfloat16);
  m.def("simd_force", [](const std::string& name) { simd_force(simd_from_name(name)); }, py::arg("level"));
}

/// A C-contiguous array of T; nothing is copied, a wrong dtype or layout is refused.
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

static void bind_softmax_kl(py::module_& m) {
  m.def(
      "softmax_kl_rows",
      [](Array<float> teacher, Array<float> student, float softcap, bool need_grad, Array<float> loss, int threads) {
        expect(teacher.ndim() == 2 && student.ndim() == 2 && teacher.shape(0) == student.shape(0) &&
                   teacher.shape(1) == student.shape(1) && loss.size() == teacher.shape(0) && teacher.shape(1) > 0,
               "teacher and student must be (N, V), V > 0, and loss (N,)");
        float *t = out(teacher), *s = out(student), *l = out(loss);
        const int64_t rows = teacher.shape(0), columns = teacher.shape(1);
        const py::gil_scoped_release release;
        softmax_kl_rows(t, s, rows, columns, softcap, need_grad, l, threads);
      },
      py::arg("teacher").noconvert(), py::arg("student").noconvert(), py::arg("softcap"), py::arg("need_grad"),
      py::arg("loss").noconvert(), py::arg("threads"));
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

static void bind_sparse(py::module_& m) {
  m.def("keep_freed_memory", keep_freed_memory, py::arg("bytes"));
  m.def("prefer_huge_pages", [](Array<uint8_t> bytes) { prefer_huge_pages(out(bytes), bytes.size()); },
        py::arg("bytes").noconvert());

  m.def(
      "to_bfloat16",
      [](Array<float> x, Array<int16_t> rounded, Array<float> norm, Array<float> error_norm, int threads) {
        expect(x.ndim() == 2 && rounded.size() == x.size() && norm.size() == x.shape(0) &&
                   error_norm.size() == x.shape(0),
               "x and rounded must be (N, D), norm and error_norm (N,)");
        const float* const data = x.data();
        auto* const bits = reinterpret_cast<uint16_t*>(out(rounded));
        float *n = out(norm), *e = out(error_norm);
        const int64_t rows = x.shape(0), columns = x.shape(1);
        const py::gil_scoped_release release;
        to_bfloat16(data, rows, columns, bits, n, e, threads);
      },
      py::arg("x").noconvert(), py::arg("rounded").noconvert(), py::arg("norm").noconvert(),
      py::arg("error_norm").noconvert(), py::arg("threads"));

  py::class_<Selection>(m, "Selection")
      .def(py::init<int64_t, int64_t, int64_t>(), py::arg("rows"), py::arg("k"), py::arg("limit"))
      .def(
          "add",
          [](Selection& self, Array<float> scores, int64_t first, int threads) {
            expect(scores.ndim() == 2 && scores.shape(0) == self.rows(), "scores must be (N, features of the block)");
            const float* const data = scores.data();
            const int64_t columns = scores.shape(1);
            const py::gil_scoped_release release;
            self.add(data, columns, first, threads);
          },
          py::arg("scores").noconvert(), py::arg("first"), py::arg("threads"))
      .def(
          "add_screened",
          [](Selection& self, Array<int16_t> scores, int64_t first, MaybeArray<float> bias, Array<float> x_norm,
             Array<float> x_error, Array<float> w_norm, Array<float> w_error, int64_t depth, int threads) {
            expect(scores.ndim() == 2 && scores.shape(0) == self.rows() && x_norm.size() == self.rows() &&
                       x_error.size() == self.rows() && w_norm.size() == scores.shape(1) &&
                       w_error.size() == scores.shape(1) && (!bias || bias->size() == scores.shape(1)),
                   "scores must be (N, M), the norms of x (N,), bias and the norms of weight (M,)");
            const auto* const data = reinterpret_cast<const uint16_t*>(scores.data());
            const Rounding x{x_norm.data(), x_error.data()}, w{w_norm.data(), w_error.data()};
            const float* const b = in(bias);
            const int64_t columns = scores.shape(1);
            const py::gil_scoped_release release;
            self.add_screened(data, columns, first, b, x, w, depth, threads);
          },
          py::arg("scores").noconvert(), py::arg("first"), py::arg("bias").noconvert(), py::arg("x_norm").noconvert(),
          py::arg("x_error").noconvert(), py::arg("w_norm").noconvert(), py::arg("w_error").noconvert(),
          py::arg("depth"), py::arg("threads"))
      .def(
          "rescore",
          [](Selection& self, Array<float> x, Array<float> weight, MaybeArray<float> bias, int threads) {
            expect(x.ndim() == 2 && weight.ndim() == 2 && x.shape(0) == self.rows() && x.shape(1) == weight.shape(1) &&
                       (!bias || bias->size() == weight.shape(0)),
                   "x must be (N, D), weight (F, D) and bias (F,)");
            const float *xs = x.data(), *w = weight.data(), *b = in(bias);
            const int64_t depth = x.shape(1);
            const py::gil_scoped_release release;
            self.rescore(xs, w, b, depth, threads);
          },
          py::arg("x").noconvert(), py::arg("weight").noconvert(), py::arg("bias").noconvert(), py::arg("threads"))
      .def("kept", &Selection::kept)
      .def("fullest", &Selection::fullest)
      .def(
          "finish",
          [](Selection& self, Array<float> values, Array<int32_t> indices, Array<int32_t> count, int threads) {
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
      [](Array<float> values, Array<int32_t> indices, MaybeArray<float> dvalues_in, MaybeArray<float> g,
         MaybeArray<float> W_dec, MaybeArray<float> x, bool normalize, MaybeArray<float> dW_dec,
         MaybeArray<float> dW_enc, MaybeArray<float> db_enc, Array<float> dvalues, int64_t features, int64_t width,
         int threads) {
        expect(values.ndim() == 2, "values must be (N, K)");
        const int64_t rows = values.shape(0), slots = values.shape(1);
        const auto has = [](const MaybeArray<float>& a, int64_t size) { return !a || a->size() == size; };
        expect(indices.size() == values.size() && dvalues.size() == values.size() && has(dvalues_in, values.size()),
               "indices, dvalues and dvalues_in must have values' shape");
        expect(has(g, rows * width) && has(x, rows * width), "g and x must be (N, D)");
        expect(has(W_dec, features * width) && has(dW_dec, features * width) && has(dW_enc, features * width) &&
                   has(db_enc, features),
               "W_dec, dW_dec and dW_enc must be (F, D), db_enc (F,)");
        expect(g.has_value() == W_dec.has_value() && (!dW_dec || g) && (!dW_enc || (x && db_enc)),
               "g comes with W_dec, dW_dec with g, dW_enc with x and db_enc");
        const Backward job{rows,  slots,     features,   width,       values.data(), indices.data(), in(dvalues_in),
                           in(g), in(W_dec), in(x),      normalize,   out(dW_dec),   out(dW_enc),    out(db_enc),
                           out(dvalues)};
        const py::gil_scoped_release release;
        code_backward(job, threads);
      },
      py::arg("values").noconvert(), py::arg("indices").noconvert(), py::arg("dvalues_in").noconvert(),
      py::arg("g").noconvert(), py::arg("W_dec").noconvert(), py::arg("x").noconvert(), py::arg("normalize"),
      py::arg("dW_dec").noconvert(), py::arg("dW_enc").noconvert(), py::arg("db_enc").noconvert(),
      py::arg("dvalues").noconvert(), py::arg("features"), py::arg("width"), py::arg("threads"));
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ core of e2e_fast";
  bind_simd(m);
  bind_softmax_kl(m);
  bind_sparse(m);
}
