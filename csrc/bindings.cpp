// The only file that includes Python: converts Python objects to pointers and C++ exceptions to Python's.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <optional>

#include "crc32.hpp"
#include "cuda.hpp"
#include "layers.hpp"
#include "norm.hpp"
#include "pinned.hpp"
#include "store.hpp"
#include "threads.hpp"

namespace py = pybind11;
using namespace ragturbo;

namespace {

// A contiguous buffer, held for as long as native code reads or writes it.
class Buffer {
 public:
  Buffer(const py::object& object, bool writable) {
    if (PyObject_GetBuffer(object.ptr(), &view_, writable ? PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS : PyBUF_C_CONTIGUOUS))
      throw py::error_already_set();
  }
  ~Buffer() { PyBuffer_Release(&view_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  unsigned char* data() const { return static_cast<unsigned char*>(view_.buf); }
  size_t size() const { return static_cast<size_t>(view_.len); }

 private:
  Py_buffer view_{};
};

// Data of a one-dimensional contiguous array of `n` values of exactly type T: nothing is cast.
template <typename T>
const T* column(const py::object& object, const char* name, size_t n) {
  using Array = py::array_t<T, py::array::c_style>;
  if (!Array::check_(object))
    throw py::type_error(std::string(name) + " must be a contiguous numpy array of " +
                         py::str(py::dtype::of<T>()).template cast<std::string>());
  const auto array = py::reinterpret_borrow<Array>(object);
  if (array.ndim() != 1 || static_cast<size_t>(array.size()) != n)
    throw py::value_error(std::string(name) + " must have one dimension of " + std::to_string(n));
  return array.data();
}

template <typename T>
const T* column_or_null(const py::object& object, const char* name, size_t n) {
  return object.is_none() ? nullptr : column<T>(object, name, n);
}

const char* kind_name(Failure::Kind kind) {
  switch (kind) {
    case Failure::Kind::io: return "io";
    case Failure::Kind::too_short: return "short";
    case Failure::Kind::crc: return "crc";
  }
  return "io";
}

py::list read_into(const Store& store, const py::object& rows, const py::object& dst, const py::object& slots,
                   std::optional<size_t> slot_bytes, const py::object& expected_crc, int threads) {
  const Buffer out(dst, true);
  const size_t n = py::len(rows);
  const Request request{column<int64_t>(rows, "rows", n),
                        column_or_null<int64_t>(slots, "slots", n),
                        column_or_null<uint32_t>(expected_crc, "expected_crc", n),
                        n,
                        out.data(),
                        out.size(),
                        slot_bytes.value_or(store.layout().payload),
                        threads};
  std::vector<Failure> failures;
  {
    py::gil_scoped_release release;
    failures = store.read(request);
  }
  py::list result;
  for (const Failure& failure : failures)
    result.append(py::make_tuple(failure.index, kind_name(failure.kind), failure.detail));
  return result;
}

uint32_t crc32_of(const py::object& data, uint32_t value) {
  const Buffer buffer(data, false);
  py::gil_scoped_release release;
  return crc32(buffer.data(), buffer.size(), value);
}

py::dict build_info() {
  py::dict info;
#ifdef __clang__
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
  info["crc32"] = has_pclmul() ? "pclmul" : "slice16";
  info["threads"] = torch_threads();
  info["cuda"] = RAGTURBO_CUDA;
  info["cuda_off"] = RAGTURBO_CUDA_OFF;
  info["archs"] = RAGTURBO_ARCHS;
  return info;
}

// Addresses are integers, from tensor.data_ptr() and stream.cuda_stream.
template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void normalize(uintptr_t x, uintptr_t out, bool bf16, int64_t batch, int64_t pixels, int64_t channels, int64_t groups,
               uintptr_t weight, uintptr_t bias, uintptr_t add_bias, float eps, bool silu, int threads) {
  if (groups < 1 || channels % groups) throw py::value_error("channels must be a multiple of groups");
  py::gil_scoped_release release;
  group_norm({at<const void>(x), at<void>(out), bf16, batch, pixels, channels, groups, at<const float>(weight),
              at<const float>(bias), at<const float>(add_bias), eps, silu, threads});
}

void gate(uintptr_t x, uintptr_t out, bool bf16, int64_t rows, int64_t width, uintptr_t bias, int threads) {
  py::gil_scoped_release release;
  geglu({at<const void>(x), at<void>(out), bf16, rows, width, at<const float>(bias), threads});
}

void put_in_order(uintptr_t phases, uintptr_t out, int64_t batch, int64_t h, int64_t w, int64_t bytes, int threads) {
  py::gil_scoped_release release;
  interleave({at<const void>(phases), at<void>(out), batch, h, w, bytes, threads});
}

#ifdef RAGTURBO_HAS_CUDA

void gather(uintptr_t base_at, uintptr_t count_at, uintptr_t ids, int64_t n, int64_t tokens, int64_t channels,
            int64_t stride, const std::string& stored, uintptr_t out, uintptr_t stream) {
  if (stored != "float16" && stored != "int8") throw py::value_error("stored='" + stored + "': float16 or int8");
  const Gather request{at<const int64_t>(base_at),
                       at<const int64_t>(count_at),
                       at<const int64_t>(ids),
                       n,
                       tokens,
                       channels,
                       stride,
                       stored == "int8" ? Stored::int8 : Stored::float16,
                       at<void>(out),
                       at<void>(stream)};
  py::gil_scoped_release release;
  gather_rows(request);
}

void search(uintptr_t base_at, uintptr_t count_at, uintptr_t query, int64_t queries, int64_t dim, int64_t k,
            uintptr_t rows, uintptr_t scores, uintptr_t workspace, int64_t workspace_bytes, uintptr_t stream) {
  const TopK request{at<const int64_t>(base_at),
                     at<const int64_t>(count_at),
                     at<const float>(query),
                     queries,
                     dim,
                     k,
                     at<int64_t>(rows),
                     at<float>(scores),
                     at<void>(workspace),
                     workspace_bytes,
                     at<void>(stream)};
  py::gil_scoped_release release;
  topk(request);
}

#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Checked parallel reads, CRC-32, page-locked memory, layers on a CPU, CUDA gather and top-k.";

  py::register_exception_translator([](std::exception_ptr pending) {
    try {
      if (pending) std::rethrow_exception(pending);
    } catch (const OpenError& error) {
      errno = error.code;
      PyErr_SetFromErrnoWithFilename(PyExc_OSError, error.path.c_str());
    }
  });

  py::class_<Store>(m, "Store")
      .def(py::init([](const std::vector<std::string>& paths, uint64_t header_bytes, uint64_t record_bytes,
                       uint64_t payload_bytes, const std::vector<uint64_t>& counts) {
             py::gil_scoped_release release;
             return std::make_unique<Store>(paths, Layout{header_bytes, record_bytes, payload_bytes}, counts);
           }),
           py::arg("paths"), py::kw_only(), py::arg("header_bytes"), py::arg("record_bytes"), py::arg("payload_bytes"),
           py::arg("counts"))
      .def("read_into", &read_into, py::arg("rows"), py::arg("dst"), py::kw_only(), py::arg("slots") = py::none(),
           py::arg("slot_bytes") = py::none(), py::arg("expected_crc") = py::none(), py::arg("threads") = 2);

  py::class_<Arena>(m, "PinnedArena", py::buffer_protocol())
      .def(py::init([](size_t nbytes) {
             py::gil_scoped_release release;
             return std::make_unique<Arena>(nbytes);
           }),
           py::arg("nbytes"))
      .def_buffer([](Arena& arena) {
        return py::buffer_info(static_cast<unsigned char*>(arena.data()), static_cast<py::ssize_t>(arena.size()));
      })
      .def_property_readonly("device_ptr",
                             [](const Arena& arena) { return reinterpret_cast<uintptr_t>(arena.device_data()); })
      .def_property_readonly("page_locked", &Arena::page_locked)
      .def_property_readonly("reason", &Arena::reason);

  m.def("crc32", &crc32_of, py::arg("data"), py::arg("value") = 0, "zlib.crc32, faster.");
  m.def("build_info", &build_info);
  m.def("group_norm", &normalize, py::kw_only(), py::arg("x"), py::arg("out"), py::arg("bf16"), py::arg("batch"),
        py::arg("pixels"), py::arg("channels"), py::arg("groups"), py::arg("weight"), py::arg("bias"),
        py::arg("add_bias"), py::arg("eps"), py::arg("silu"), py::arg("threads"));
  m.def("geglu", &gate, py::kw_only(), py::arg("x"), py::arg("out"), py::arg("bf16"), py::arg("rows"),
        py::arg("width"), py::arg("bias"), py::arg("threads"));
  m.def("interleave", &put_in_order, py::kw_only(), py::arg("phases"), py::arg("out"), py::arg("batch"), py::arg("h"),
        py::arg("w"), py::arg("bytes"), py::arg("threads"));

#ifdef RAGTURBO_HAS_CUDA
  m.def("gather_rows", &gather, py::kw_only(), py::arg("base_at"), py::arg("count_at"), py::arg("ids"), py::arg("n"),
        py::arg("tokens"), py::arg("channels"), py::arg("stride"), py::arg("stored"), py::arg("out"),
        py::arg("stream"));
  m.def("topk", &search, py::kw_only(), py::arg("base_at"), py::arg("count_at"), py::arg("query"), py::arg("queries"),
        py::arg("dim"), py::arg("k"), py::arg("rows"), py::arg("scores"), py::arg("workspace"),
        py::arg("workspace_bytes"), py::arg("stream"));
  m.def("topk_workspace_bytes", &topk_workspace_bytes, py::kw_only(), py::arg("queries"), py::arg("k"));
#endif
}
