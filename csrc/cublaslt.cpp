// GEMMs by cuBLASLt in the canonical reduction order: no split-K, no stream-K, no reduction scheme, no workspace.
//
// out[M, N] = a[M, K] @ b[K, N]. Tensors are row-major and cuBLASLt is column-major, so it computes out^T = b^T a^T. A
// plan (descriptors and candidate algorithms) is made once per shape, layout and alignment. The candidates of a verified
// GEMM have the same bits (bi_ops/matmul/verification.py), so the fastest may run, which Python finds (tuning.py).
//
// A module of Python's stable interface. It links to neither torch nor CUDA: see tensor_api.h and cublaslt_api.h. The
// caller makes the tensors' GPU current. Everything runs under Python's lock.

#include "cublaslt_api.h"
#include "tensor_api.h"

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <vector>

namespace {

using tensors::PythonError;
using tensors::Tensor;

struct Error : std::runtime_error {
  explicit Error(const std::string& what) : std::runtime_error("bi_ops cublaslt: " + what) {}
};

// What `open` found.
lt::Functions cublaslt;
const tensors::ExchangeApi* torch_api = nullptr;
int32_t device_type;
PyObject *current_device, *blas_handle;  // functions of Python

void check(lt::Status status, const char* what) {
  if (status != lt::kSuccess) throw Error(std::string(what) + ": " + cublaslt.GetStatusString(status));
}

// --------------------------------------------------------------------------------------------------------------
// operands

Tensor read(PyObject* object) {
  if (torch_api == nullptr) throw Error("open comes first");
  Tensor t;
  if (torch_api->read(object, &t) != 0) throw PythonError();
  t.data += t.byte_offset;
  return t;
}

bool has_type(const Tensor& t, uint8_t code, uint8_t bits) {
  return t.type_code == code && t.bits == bits && t.lanes == 1;
}

lt::DataType type_of(const Tensor& t) {
  if (has_type(t, tensors::kBFloat, 16)) return lt::kBFloat16;
  if (has_type(t, tensors::kFloat, 16)) return lt::kFloat16;
  if (has_type(t, tensors::kFloat, 32)) return lt::kFloat32;
  throw Error("a dtype other than bf16, fp16 and fp32");
}

struct Matrix {
  char* data;
  int64_t device;
  lt::DataType type;
  int64_t rows, cols, row_stride, col_stride;

  Matrix transpose() const { return {data, device, type, cols, rows, col_stride, row_stride}; }

  int64_t alignment() const {
    int64_t a = 256;
    while (reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(a)) a /= 2;
    return a;
  }
};

Matrix matrix(PyObject* object, const char* name) {
  const Tensor t = read(object);
  if (t.device.type != device_type) throw Error(std::string(name) + " is on no GPU");
  if (t.ndim != 2) throw Error(std::string(name) + " has " + std::to_string(t.ndim) + " dimensions, not 2");
  return {t.data, t.device.index, type_of(t), t.shape[0], t.shape[1], t.strides[0], t.strides[1]};
}

// A matrix as column-major storage: `rows` x `cols` with leading dimension `ld`. `transposed`: the storage is the
// transpose of the operand of the GEMM.
struct View {
  int64_t rows, cols, ld;
  bool transposed;
};

// m [R, C] seen as m^T [C, R] in column-major order.
View view(const Matrix& m, const char* name) {
  const int64_t r = m.rows, c = m.cols, sr = m.row_stride, sc = m.col_stride;
  if ((sc == 1 || c == 1) && (sr >= c || r == 1)) return {c, r, r == 1 ? std::max<int64_t>(sr, c) : sr, false};
  if ((sr == 1 || r == 1) && (sc >= r || c == 1)) return {r, c, c == 1 ? std::max<int64_t>(sc, r) : sc, true};
  throw Error(std::string(name) + " has strides [" + std::to_string(sr) + ", " + std::to_string(sc) +
              "]; one of them must be 1");
}

void check_gemm(const Matrix& a, const Matrix& b, const Matrix& out) {
  if (b.device != a.device || out.device != a.device) throw Error("devices differ");
  if (a.type != b.type || a.type == lt::kFloat32) throw Error("a and b must both be bf16 or both fp16");
  if (a.cols != b.rows || out.rows != a.rows || out.cols != b.cols) {
    const auto shape = [](const Matrix& m) {
      return "[" + std::to_string(m.rows) + ", " + std::to_string(m.cols) + "]";
    };
    throw Error("shapes " + shape(a) + " @ " + shape(b) + " -> " + shape(out));
  }
}

// A call of a Python function without arguments.
template <typename T>
T ask(PyObject* function, T (*convert)(PyObject*)) {
  PyObject* answer = PyObject_CallNoArgs(function);
  if (answer == nullptr) throw PythonError();
  const T value = convert(answer);
  Py_DECREF(answer);
  if (PyErr_Occurred()) throw PythonError();
  return value;
}

// --------------------------------------------------------------------------------------------------------------
// plans

struct Layout {
  lt::Layout raw{};
  Layout(const Matrix& m, const View& v) {
    check(cublaslt.MatrixLayoutCreate(&raw, m.type, v.rows, v.cols, v.ld), "layout");
  }
  ~Layout() { cublaslt.MatrixLayoutDestroy(raw); }
  Layout(const Layout&) = delete;
};

struct Operation {
  lt::Operation raw{};
  Operation(const View& a, const View& b, bool bias) {
    check(cublaslt.MatmulDescCreate(&raw, lt::kCompute32F, lt::kFloat32), "operation");
    set(lt::kTransA, b.transposed ? lt::kYes : lt::kNo);
    set(lt::kTransB, a.transposed ? lt::kYes : lt::kNo);
    if (bias) set(lt::kEpilogue, lt::kEpilogueBias);
  }
  template <typename T>
  void set(lt::OperationAttribute attribute, const T& value) {
    check(cublaslt.MatmulDescSetAttribute(raw, attribute, &value, sizeof(value)), "operation attribute");
  }
  ~Operation() { cublaslt.MatmulDescDestroy(raw); }
  Operation(const Operation&) = delete;
};

struct Preference {
  lt::Preference raw{};
  Preference() { check(cublaslt.MatmulPreferenceCreate(&raw), "preference"); }
  template <typename T>
  void set(lt::PreferenceAttribute attribute, const T& value) {
    check(cublaslt.MatmulPreferenceSetAttribute(raw, attribute, &value, sizeof(value)), "preference attribute");
  }
  ~Preference() { cublaslt.MatmulPreferenceDestroy(raw); }
  Preference(const Preference&) = delete;
};

template <typename T>
T config(const lt::Algorithm& algo, lt::AlgorithmAttribute attribute) {
  T value{};
  size_t written = 0;
  const auto status = cublaslt.MatmulAlgoConfigGetAttribute(&algo, attribute, &value, sizeof(value), &written);
  return status == lt::kSuccess ? value : T{};
}

bool has_canonical_order(const lt::HeuristicResult& r) {
  return r.workspace == 0 && config<int32_t>(r.algo, lt::kSplitK) <= 1 &&
         config<uint32_t>(r.algo, lt::kReduction) == lt::kReductionNone;
}

constexpr int kHeuristicResults = 16;  // algorithms that cuBLASLt's heuristic is asked for
constexpr size_t kCandidates = 5;      // of those, the ones that may run: verified bitwise, then timed
constexpr double kMinTunedWork = 0x1p30;  // multiply-adds; a smaller GEMM runs cuBLASLt's first algorithm, untimed
constexpr size_t kMaxPlans = 4096;        // each row count makes a plan; the cache is emptied when it holds this many

using Key = std::array<int64_t, 16>;

// Identifies an algorithm across shapes.
using Identity = std::array<int64_t, 7>;

Identity identity(const lt::HeuristicResult& r) {
  return {config<int32_t>(r.algo, lt::kId),
          config<uint32_t>(r.algo, lt::kTile),
          config<uint32_t>(r.algo, lt::kStages),
          config<uint32_t>(r.algo, lt::kSwizzle),
          config<uint32_t>(r.algo, lt::kCustom),
          config<uint16_t>(r.algo, lt::kInnerShape),
          config<uint16_t>(r.algo, lt::kClusterShape)};
}

struct Plan {
  std::unique_ptr<Operation> operation;
  std::unique_ptr<Layout> a, b, out;
  std::vector<lt::HeuristicResult> candidates;
  size_t fastest = 0;
  bool tuned = true;  // is `fastest` known?
  Key size_class;     // the key with M and K rounded up to powers of two; one tuning result serves the class

  size_t tunable() const { return std::min(candidates.size(), kCandidates); }
};

std::map<Key, std::unique_ptr<Plan>> plans;
std::map<Key, Identity> tuned_algorithms;  // by size class

int64_t power_of_two(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

// workspace: bytes that an algorithm may use, for the negative control, which may split K; 0: the canonical order.
Plan& plan_for(lt::Handle handle, const Matrix& a, const Matrix& b, const Matrix& out, bool bias, int64_t workspace) {
  const View va = view(a, "a"), vb = view(b, "b"), vo = view(out, "out");
  if (vo.transposed) throw Error("out must be row-major");
  const Key key{a.device, a.type, out.type, out.rows, out.cols, a.cols, va.ld, va.transposed, vb.ld, vb.transposed,
                vo.ld, a.alignment(), b.alignment(), out.alignment(), bias, workspace};
  if (plans.size() >= kMaxPlans && plans.find(key) == plans.end()) plans.clear();
  auto& slot = plans[key];
  if (slot) return *slot;

  auto plan = std::make_unique<Plan>();
  plan->size_class = key;
  for (const size_t i : {3, 5}) plan->size_class[i] = power_of_two(key[i]);
  plan->operation = std::make_unique<Operation>(va, vb, bias);
  plan->a = std::make_unique<Layout>(b, vb);  // cuBLASLt's A is our b: it computes the transpose
  plan->b = std::make_unique<Layout>(a, va);
  plan->out = std::make_unique<Layout>(out, vo);

  Preference preference;
  preference.set(lt::kMaxWorkspace, static_cast<size_t>(workspace));
  if (workspace == 0) preference.set(lt::kReductionMask, lt::kReductionNone);
  const auto align = [&](lt::PreferenceAttribute attribute, const Matrix& m) {
    preference.set(attribute, static_cast<uint32_t>(m.alignment()));
  };
  align(lt::kAlignmentA, b);
  align(lt::kAlignmentB, a);
  align(lt::kAlignmentC, out);
  align(lt::kAlignmentD, out);

  std::array<lt::HeuristicResult, kHeuristicResults> found{};
  int count = 0;
  const auto status =
      cublaslt.MatmulAlgoGetHeuristic(handle, plan->operation->raw, plan->a->raw, plan->b->raw, plan->out->raw,
                                      plan->out->raw, preference.raw, kHeuristicResults, found.data(), &count);
  if (status != lt::kNotSupported) check(status, "heuristic");
  for (int i = 0; i < count; ++i)
    if (found[i].state == lt::kSuccess && (workspace > 0 || has_canonical_order(found[i])))
      plan->candidates.push_back(found[i]);
  const double work = static_cast<double>(out.rows) * static_cast<double>(out.cols) * static_cast<double>(a.cols);
  plan->tuned = workspace > 0 || plan->candidates.size() < 2 || work < kMinTunedWork;
  slot = std::move(plan);
  return *slot;
}

// Is the plan's fastest candidate known, by itself or from another shape of its size class?
bool is_tuned(Plan& plan) {
  if (plan.tuned) return true;
  const auto known = tuned_algorithms.find(plan.size_class);
  if (known == tuned_algorithms.end()) return false;
  plan.tuned = true;
  for (size_t i = plan.tunable(); i-- > 0;)
    if (identity(plan.candidates[i]) == known->second) plan.fastest = i;
  return true;
}

void launch(lt::Handle handle, const Plan& plan, size_t index, const Matrix& a, const Matrix& b, const Matrix& out,
            void* workspace) {
  void* stream = nullptr;
  if (torch_api->current_stream(device_type, static_cast<int32_t>(a.device), &stream) != 0) throw PythonError();
  const auto& candidate = plan.candidates[index];
  const float one = 1.0f, zero = 0.0f;
  check(cublaslt.Matmul(handle, plan.operation->raw, &one, b.data, plan.a->raw, a.data, plan.b->raw, &zero, out.data,
                        plan.out->raw, out.data, plan.out->raw, &candidate.algo, workspace, candidate.workspace,
                        stream),
        "matmul");
}

// --------------------------------------------------------------------------------------------------------------
// functions of the module

int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw PythonError();
  return value;
}

lt::Handle handle() { return ask(blas_handle, PyLong_AsVoidPtr); }

struct Arguments {
  PyObject* const* raw;
  Py_ssize_t count;
  PyObject* operator[](Py_ssize_t i) const { return raw[i]; }
};

struct Gemm {
  Matrix a, b, out;
  Gemm(PyObject* a_, PyObject* b_, PyObject* out_) : a(matrix(a_, "a")), b(matrix(b_, "b")), out(matrix(out_, "out")) {
    check_gemm(a, b, out);
    if (ask(current_device, PyLong_AsLong) != a.device) throw Error("the tensors' GPU is not the current one");
  }
};

PyObject* open(const Arguments& arguments) {
  const char* soname = PyUnicode_AsUTF8AndSize(arguments[0], nullptr);
  if (soname == nullptr) throw PythonError();
  const auto* api = tensors::exchange_api(arguments[1]);
  cublaslt = lt::load(soname);
  const auto release = static_cast<int>(cublaslt.GetVersion() / 10000);
  if (release < lt::kOldestCuda || release > lt::kNewestCuda)
    throw std::runtime_error("cuBLASLt " + std::to_string(release) + "; the binding knows " +
                             std::to_string(lt::kOldestCuda) + " to " + std::to_string(lt::kNewestCuda));
  plans.clear();
  tuned_algorithms.clear();
  torch_api = api;
  device_type = static_cast<int32_t>(integer(arguments[2]));
  Py_INCREF(current_device = arguments[3]);
  Py_INCREF(blas_handle = arguments[4]);
  Py_RETURN_NONE;
}

PyObject* version(const Arguments&) {
  if (torch_api == nullptr) throw Error("open comes first");
  return PyLong_FromSize_t(cublaslt.GetVersion());
}

// tunable(a, b, out, bias): how many candidates `choose` may choose among.
PyObject* tunable(const Arguments& arguments) {
  const Gemm gemm(arguments[0], arguments[1], arguments[2]);
  const bool bias = arguments[3] != Py_None;
  return PyLong_FromSize_t(plan_for(handle(), gemm.a, gemm.b, gemm.out, bias, 0).tunable());
}

// choose(a, b, out, bias, index): GEMMs of this size class run that candidate.
PyObject* choose(const Arguments& arguments) {
  const Gemm gemm(arguments[0], arguments[1], arguments[2]);
  const auto index = static_cast<size_t>(integer(arguments[4]));
  Plan& plan = plan_for(handle(), gemm.a, gemm.b, gemm.out, arguments[3] != Py_None, 0);
  if (index >= plan.tunable()) throw Error("no candidate " + std::to_string(index));
  if (tuned_algorithms.size() >= kMaxPlans) tuned_algorithms.clear();
  tuned_algorithms[plan.size_class] = identity(plan.candidates[index]);
  plan.tuned = true;
  plan.fastest = index;
  Py_RETURN_NONE;
}

// run(a, b, out, bias, index, workspace): out = a @ b (+ bias) by candidate `index`, or by the fastest for -1. False, and
// nothing done, if there is no such candidate; None, and nothing done, if which is the fastest is not known yet.
PyObject* run(const Arguments& arguments) {
  const Gemm gemm(arguments[0], arguments[1], arguments[2]);
  if (gemm.out.rows == 0 || gemm.out.cols == 0) Py_RETURN_TRUE;
  const bool has_bias = arguments[3] != Py_None;
  const int64_t index = integer(arguments[4]);
  Tensor workspace{};
  if (arguments[5] != Py_None) workspace = read(arguments[5]);
  const lt::Handle blas = handle();
  Plan& plan = plan_for(blas, gemm.a, gemm.b, gemm.out, has_bias, workspace.data == nullptr ? 0 : workspace.shape[0]);
  if (std::max<int64_t>(index, 0) >= static_cast<int64_t>(plan.candidates.size())) Py_RETURN_FALSE;
  if (index < 0 && !is_tuned(plan)) Py_RETURN_NONE;
  if (has_bias) {
    const Tensor bias = read(arguments[3]);
    plan.operation->set(lt::kBiasPointer, static_cast<const void*>(bias.data));
    plan.operation->set(lt::kBiasType, static_cast<int32_t>(type_of(bias)));
  }
  launch(blas, plan, index < 0 ? plan.fastest : static_cast<size_t>(index), gemm.a, gemm.b, gemm.out, workspace.data);
  Py_RETURN_TRUE;
}

using Weight = std::tuple<int64_t, lt::DataType, int64_t, int64_t>;  // device, dtype, N, K
std::set<Weight> allowlist;

// allow(device, bf16, n, k): the GEMM of this weight is verified.
PyObject* allow(const Arguments& arguments) {
  const auto type = PyObject_IsTrue(arguments[1]) == 1 ? lt::kBFloat16 : lt::kFloat16;
  allowlist.insert({integer(arguments[0]), type, integer(arguments[2]), integer(arguments[3])});
  Py_RETURN_NONE;
}

// The layout that the verified GEMM was compared in: on a GPU, contiguous, 16-byte aligned.
bool has_verified_layout(const Tensor& t) {
  int64_t stride = 1;
  for (int i = t.ndim; i-- > 0; stride *= t.shape[i])
    if (t.shape[i] != 1 && t.strides[i] != stride) return false;
  return t.device.type == device_type && reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
}

// May `linear` compute x [..., K] @ weight[N, K].T? Both are plain tensors (bi_ops.core.operators.is_plain).
bool is_served(const Tensor& x, const Tensor& weight) {
  if (x.ndim < 1 || weight.ndim != 2 || x.type_code != weight.type_code || x.bits != weight.bits ||
      x.device.type != weight.device.type || x.device.index != weight.device.index ||
      x.shape[x.ndim - 1] != weight.shape[1] || !has_verified_layout(x) || !has_verified_layout(weight))
    return false;
  if (!has_type(x, tensors::kBFloat, 16) && !has_type(x, tensors::kFloat, 16)) return false;
  for (int i = 0; i < x.ndim; ++i)
    if (x.shape[i] == 0) return false;
  return allowlist.count({weight.device.index, type_of(weight), weight.shape[0], weight.shape[1]}) > 0 &&
         ask(current_device, PyLong_AsLong) == x.device.index;
}

PyObject* serves(const Arguments& arguments) {
  return PyBool_FromLong(is_served(read(arguments[0]), read(arguments[1])));
}

// linear(x, weight): x @ weight.T without a gradient. None where it is not served, where cuBLASLt has no algorithm for
// this row count, and before `run` has met a GEMM of the size class whose algorithms are to be timed.
PyObject* linear(const Arguments& arguments) {
  const Tensor x = read(arguments[0]), weight = read(arguments[1]);
  if (!is_served(x, weight)) Py_RETURN_NONE;
  static PyObject* const new_empty = PyUnicode_InternFromString("new_empty");
  const int64_t n = weight.shape[0], k = weight.shape[1];
  int64_t rows = 1;
  PyObject* sizes = PyTuple_New(x.ndim);
  if (sizes == nullptr) throw PythonError();
  for (int i = 0; i < x.ndim; ++i) {
    PyTuple_SetItem(sizes, i, PyLong_FromLongLong(i + 1 < x.ndim ? x.shape[i] : n));
    if (i + 1 < x.ndim) rows *= x.shape[i];
  }
  PyObject* result = PyObject_CallMethodObjArgs(arguments[0], new_empty, sizes, nullptr);
  Py_DECREF(sizes);
  if (result == nullptr) throw PythonError();
  try {
    const auto type = type_of(x);
    const Matrix a{x.data, x.device.index, type, rows, k, k, 1};
    const Matrix b = Matrix{weight.data, weight.device.index, type, n, k, k, 1}.transpose();
    const Matrix out{read(result).data, x.device.index, type, rows, n, n, 1};
    const lt::Handle blas = handle();
    Plan& plan = plan_for(blas, a, b, out, false, 0);
    if (!plan.candidates.empty() && is_tuned(plan)) {
      launch(blas, plan, plan.fastest, a, b, out, nullptr);
      return result;
    }
  } catch (...) {
    Py_DECREF(result);
    throw;
  }
  Py_DECREF(result);
  Py_RETURN_NONE;
}

// --------------------------------------------------------------------------------------------------------------
// the module

template <PyObject* (*function)(const Arguments&), Py_ssize_t count>
PyObject* entry(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  if (given != count) {
    PyErr_Format(PyExc_TypeError, "bi_ops cublaslt: %zd arguments for %zd", given, count);
    return nullptr;
  }
  try {
    return function({arguments, given});
  } catch (const PythonError&) {
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
  }
  return nullptr;
}

template <PyObject* (*function)(const Arguments&), Py_ssize_t count>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(entry<function, count>)), METH_FASTCALL,
          nullptr};
}

PyMethodDef methods[] = {method<open, 5>("open"),       method<version, 0>("version"), method<tunable, 4>("tunable"),
                         method<choose, 5>("choose"),   method<run, 6>("run"),         method<allow, 4>("allow"),
                         method<serves, 2>("serves"),   method<linear, 2>("linear"),   {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition{PyModuleDef_HEAD_INIT, "_cublaslt", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

#ifndef BI_OPS_SOURCE
#define BI_OPS_SOURCE ""
#endif

PyMODINIT_FUNC PyInit__cublaslt() {
  PyObject* m = PyModule_Create(&definition);
  if (m == nullptr) return nullptr;
  PyModule_AddIntConstant(m, "CANDIDATES", kCandidates);
  PyModule_AddStringConstant(m, "SOURCE", BI_OPS_SOURCE);  // a digest of the files that this was built from
  return m;
}
