/// The only file that knows Python: arrays in and out, the GIL released, std::invalid_argument becomes ValueError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "simd.hpp"

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

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ core of e2e_fast";
  bind_simd(m);
}
