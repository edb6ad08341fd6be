// GEMMs by cuBLASLt in the canonical reduction order: no split-K, no stream-K, no reduction scheme, no workspace.
//
// out[M, N] = a[M, K] @ b[K, N], batched or not. Tensors are row-major and cuBLASLt is column-major, so it computes
// out^T = b^T a^T. A plan (descriptors and candidate algorithms) is made once per shape, layout and alignment. The
// candidates of a verified GEMM have the same bits (bi_ops/matmul/verification.py), so the fastest runs: see `tune`.

#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <cublasLt.h>
#include <torch/extension.h>

#include <algorithm>
#include <array>
#include <exception>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <vector>

namespace {

void check(cublasStatus_t status, const char* what) {
  TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "bi_ops cublaslt: ", what, ": ", cublasLtGetStatusString(status));
}

// A 2-D tensor as column-major storage: `rows` x `cols` with leading dimension `ld`. `transposed`: the storage is the
// transpose of the operand of the GEMM.
struct View {
  int64_t rows, cols, ld;
  bool transposed;
};

// t [R, C] seen as t^T [C, R] in column-major order.
View view(const at::Tensor& t, const char* name) {
  const int64_t r = t.size(-2), c = t.size(-1), sr = t.stride(-2), sc = t.stride(-1);
  if ((sc == 1 || c == 1) && (sr >= c || r == 1)) return {c, r, r == 1 ? std::max<int64_t>(sr, c) : sr, false};
  TORCH_CHECK((sr == 1 || r == 1) && (sc >= r || c == 1), "bi_ops cublaslt: ", name, " has strides [", sr, ", ", sc,
              "]; one of them must be 1");
  return {r, c, c == 1 ? std::max<int64_t>(sc, r) : sc, true};
}

cudaDataType_t type_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kBFloat16: return CUDA_R_16BF;
    case at::kHalf: return CUDA_R_16F;
    case at::kFloat: return CUDA_R_32F;
    default: TORCH_CHECK(false, "bi_ops cublaslt: dtype ", t.scalar_type(), " is not supported");
  }
}

uint32_t alignment(const at::Tensor& t) {
  const auto address = reinterpret_cast<uintptr_t>(t.data_ptr());
  uint32_t a = 256;
  while (address % a) a /= 2;
  return a;
}

struct Layout {
  cublasLtMatrixLayout_t raw{};
  Layout(const at::Tensor& t, const View& v) {
    check(cublasLtMatrixLayoutCreate(&raw, type_of(t), v.rows, v.cols, v.ld), "layout");
    if (t.dim() == 3) {
      const int32_t count = static_cast<int32_t>(t.size(0));
      const int64_t stride = t.stride(0);
      check(cublasLtMatrixLayoutSetAttribute(raw, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof(count)), "batch");
      check(cublasLtMatrixLayoutSetAttribute(raw, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof(stride)),
            "batch stride");
    }
  }
  ~Layout() { cublasLtMatrixLayoutDestroy(raw); }
  Layout(const Layout&) = delete;
};

struct Operation {
  cublasLtMatmulDesc_t raw{};
  Operation(const View& a, const View& b, bool bias) {
    check(cublasLtMatmulDescCreate(&raw, CUBLAS_COMPUTE_32F, CUDA_R_32F), "operation");
    const cublasOperation_t n = CUBLAS_OP_N, t = CUBLAS_OP_T;
    set(CUBLASLT_MATMUL_DESC_TRANSA, b.transposed ? t : n);
    set(CUBLASLT_MATMUL_DESC_TRANSB, a.transposed ? t : n);
    if (bias) set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
  }
  template <typename T>
  void set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
    check(cublasLtMatmulDescSetAttribute(raw, attribute, &value, sizeof(value)), "operation attribute");
  }
  ~Operation() { cublasLtMatmulDescDestroy(raw); }
  Operation(const Operation&) = delete;
};

struct Preference {
  cublasLtMatmulPreference_t raw{};
  Preference() { check(cublasLtMatmulPreferenceCreate(&raw), "preference"); }
  template <typename T>
  void set(cublasLtMatmulPreferenceAttributes_t attribute, const T& value) {
    check(cublasLtMatmulPreferenceSetAttribute(raw, attribute, &value, sizeof(value)), "preference attribute");
  }
  ~Preference() { cublasLtMatmulPreferenceDestroy(raw); }
  Preference(const Preference&) = delete;
};

template <typename T>
T config(const cublasLtMatmulAlgo_t& algo, cublasLtMatmulAlgoConfigAttributes_t attribute) {
  T value{};
  size_t written = 0;
  const auto status = cublasLtMatmulAlgoConfigGetAttribute(&algo, attribute, &value, sizeof(value), &written);
  return status == CUBLAS_STATUS_SUCCESS ? value : T{};
}

bool has_canonical_order(const cublasLtMatmulHeuristicResult_t& r) {
  return r.workspaceSize == 0 && config<int32_t>(r.algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM) <= 1 &&
         config<uint32_t>(r.algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME) == CUBLASLT_REDUCTION_SCHEME_NONE;
}

constexpr int kHeuristicResults = 16;  // algorithms that cuBLASLt's heuristic is asked for
constexpr size_t kCandidates = 5;      // of those, the ones that may run: verified bitwise, then timed
constexpr double kMinTunedWork = 0x1p30;  // multiply-adds; a smaller GEMM runs cuBLASLt's first algorithm, untimed
constexpr size_t kMaxPlans = 4096;        // each row count makes a plan; the cache is emptied when it holds this many
constexpr size_t kUnrestrictedWorkspace = 32u << 20;  // bytes; for the negative control, which may split K

using Key = std::array<int64_t, 20>;

struct Plan {
  std::unique_ptr<Operation> operation;
  std::unique_ptr<Layout> a, b, out;
  std::vector<cublasLtMatmulHeuristicResult_t> candidates;
  size_t fastest = 0;
  bool tuned = true;  // is `fastest` known?
  Key size_class;     // the key with M and K rounded up to powers of two; one tuning result serves the class
};

std::map<Key, std::unique_ptr<Plan>> plans;
std::mutex lock;

// Identifies an algorithm across shapes.
using Identity = std::array<int64_t, 7>;

Identity identity(const cublasLtMatmulHeuristicResult_t& r) {
  return {config<int32_t>(r.algo, CUBLASLT_ALGO_CONFIG_ID),
          config<uint32_t>(r.algo, CUBLASLT_ALGO_CONFIG_TILE_ID),
          config<uint32_t>(r.algo, CUBLASLT_ALGO_CONFIG_STAGES_ID),
          config<uint32_t>(r.algo, CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING),
          config<uint32_t>(r.algo, CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION),
          config<uint16_t>(r.algo, CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID),
          config<uint16_t>(r.algo, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID)};
}

std::map<Key, Identity> tuned_algorithms;  // by size class

int64_t power_of_two(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

using Launch = std::function<void(const cublasLtMatmulHeuristicResult_t&)>;

// Finds the fastest candidate, once per size class: the first GEMM of the class is computed a few times by each of them.
// L2 is flushed before each run, because a layer's weights are in HBM when the layer runs, and the ranking from L2 can
// differ. Nothing is timed during CUDA graph capture: the first candidate runs, and the plan stays untuned.
void tune(Plan& plan, const Launch& launch) {
  const size_t n_candidates = std::min(plan.candidates.size(), kCandidates);
  if (const auto known = tuned_algorithms.find(plan.size_class); known != tuned_algorithms.end()) {
    plan.tuned = true;
    for (size_t i = n_candidates; i-- > 0;)
      if (identity(plan.candidates[i]) == known->second) plan.fastest = i;
    return;
  }
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) return;
  plan.tuned = true;
  std::array<float, kCandidates> best;
  best.fill(std::numeric_limits<float>::infinity());
  at::Tensor flush;
  try {
    flush = at::empty({2 * at::cuda::getCurrentDeviceProperties()->l2CacheSize}, at::device(at::kCUDA).dtype(at::kByte));
  } catch (const c10::OutOfMemoryError&) {
    return;  // no room for the flush buffer: the first candidate runs
  }
  at::cuda::CUDAEvent start(cudaEventDefault), end(cudaEventDefault);
  for (int round = 0; round < 5; ++round)
    for (size_t i = 0; i < n_candidates; ++i) {
      flush.zero_();
      start.record();
      launch(plan.candidates[i]);
      end.record();
      end.synchronize();
      best[i] = std::min(best[i], start.elapsed_time(end));
    }
  for (size_t i = 1; i < n_candidates; ++i)
    if (best[i] < best[plan.fastest] && best[i] < 0.98f * best[0]) plan.fastest = i;  // less than 2% faster may be noise
  if (tuned_algorithms.size() >= kMaxPlans) tuned_algorithms.clear();
  tuned_algorithms[plan.size_class] = identity(plan.candidates[plan.fastest]);
}

Plan& plan_for(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool bias, bool restricted) {
  const View va = view(a, "a"), vb = view(b, "b"), vo = view(out, "out");
  TORCH_CHECK(!vo.transposed, "bi_ops cublaslt: out must be row-major");
  const bool batched = out.dim() == 3;
  const Key key{a.get_device(), static_cast<int64_t>(a.scalar_type()), static_cast<int64_t>(out.scalar_type()),
                batched ? out.size(0) : -1, out.size(-2), out.size(-1), a.size(-1), va.ld, va.transposed, vb.ld,
                vb.transposed, vo.ld, batched ? a.stride(0) : 0, batched ? b.stride(0) : 0,
                batched ? out.stride(0) : 0, alignment(a), alignment(b), alignment(out), bias, restricted};
  if (plans.size() >= kMaxPlans && plans.find(key) == plans.end()) plans.clear();
  auto& slot = plans[key];
  if (slot) return *slot;

  auto plan = std::make_unique<Plan>();
  plan->size_class = key;
  for (const size_t i : {4, 6}) plan->size_class[i] = power_of_two(key[i]);
  plan->operation = std::make_unique<Operation>(va, vb, bias);
  plan->a = std::make_unique<Layout>(b, vb);  // cuBLASLt's A is our b: it computes the transpose
  plan->b = std::make_unique<Layout>(a, va);
  plan->out = std::make_unique<Layout>(out, vo);

  Preference preference;
  const size_t workspace = restricted ? 0 : kUnrestrictedWorkspace;
  preference.set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace);
  if (restricted) {
    const uint32_t none = CUBLASLT_REDUCTION_SCHEME_NONE;
    preference.set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, none);
  }
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(b));
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(a));
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(out));
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(out));

  std::array<cublasLtMatmulHeuristicResult_t, kHeuristicResults> found{};
  int count = 0;
  auto handle = reinterpret_cast<cublasLtHandle_t>(at::cuda::getCurrentCUDABlasHandle());
  const auto status =
      cublasLtMatmulAlgoGetHeuristic(handle, plan->operation->raw, plan->a->raw, plan->b->raw, plan->out->raw,
                                     plan->out->raw, preference.raw, kHeuristicResults, found.data(), &count);
  if (status != CUBLAS_STATUS_NOT_SUPPORTED) check(status, "heuristic");
  for (int i = 0; i < count; ++i)
    if (found[i].state == CUBLAS_STATUS_SUCCESS && (!restricted || has_canonical_order(found[i])))
      plan->candidates.push_back(found[i]);
  const double work = static_cast<double>(out.numel()) * static_cast<double>(a.size(-1));
  plan->tuned = !restricted || plan->candidates.size() < 2 || work < kMinTunedWork;
  slot = std::move(plan);
  return *slot;
}

void check_gemm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) {
  TORCH_CHECK(a.is_cuda() && b.device() == a.device() && out.device() == a.device(), "bi_ops cublaslt: devices differ");
  TORCH_CHECK(a.scalar_type() == b.scalar_type() && a.scalar_type() != at::kFloat,
              "bi_ops cublaslt: a and b must both be bf16 or both fp16");
  TORCH_CHECK(a.dim() == out.dim() && b.dim() == out.dim() && a.size(-1) == b.size(-2) && out.size(-2) == a.size(-2) &&
                  out.size(-1) == b.size(-1),
              "bi_ops cublaslt: shapes ", a.sizes(), " @ ", b.sizes(), " -> ", out.sizes());
}

// The number of algorithms that cuBLASLt offers for this GEMM.
int64_t count(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool restricted) {
  check_gemm(a, b, out);
  const c10::cuda::CUDAGuard guard(a.device());
  const std::lock_guard<std::mutex> held(lock);
  return static_cast<int64_t>(plan_for(a, b, out, false, restricted).candidates.size());
}

// out = a @ b (+ bias) with candidate `index`, or the fastest for -1. Returns false, and does nothing, if there is no
// such candidate.
bool run(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, const std::optional<at::Tensor>& bias,
         int64_t index, bool restricted) {
  check_gemm(a, b, out);
  if (out.numel() == 0) return true;
  const c10::cuda::CUDAGuard guard(a.device());
  const std::lock_guard<std::mutex> held(lock);
  auto& plan = plan_for(a, b, out, bias.has_value(), restricted);
  if (std::max<int64_t>(index, 0) >= static_cast<int64_t>(plan.candidates.size())) return false;
  if (bias.has_value()) {
    const void* pointer = bias->data_ptr();
    plan.operation->set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, pointer);
    plan.operation->set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, static_cast<int32_t>(type_of(*bias)));
  }
  const auto launch = [&](const cublasLtMatmulHeuristicResult_t& candidate) {
    at::Tensor workspace;
    if (candidate.workspaceSize > 0)
      workspace = at::empty({static_cast<int64_t>(candidate.workspaceSize)}, a.options().dtype(at::kByte));
    const float one = 1.0f, zero = 0.0f;
    auto handle = reinterpret_cast<cublasLtHandle_t>(at::cuda::getCurrentCUDABlasHandle());
    check(cublasLtMatmul(handle, plan.operation->raw, &one, b.data_ptr(), plan.a->raw, a.data_ptr(), plan.b->raw, &zero,
                         out.data_ptr(), plan.out->raw, out.data_ptr(), plan.out->raw, &candidate.algo,
                         workspace.defined() ? workspace.data_ptr() : nullptr, candidate.workspaceSize,
                         at::cuda::getCurrentCUDAStream()),
          "matmul");
  };
  if (index < 0 && !plan.tuned) tune(plan, launch);
  launch(plan.candidates[index < 0 ? plan.fastest : static_cast<size_t>(index)]);
  return true;
}

// --------------------------------------------------------------------------------------------------------------
// linear in C++: x @ weight.T and its autograd node without Python's cost per call. It serves weights on the allowlist,
// which holds the GEMMs that Python has verified. The backward calls the operator that differentiates `bi_ops::mm`.

using Weight = std::tuple<int64_t, at::ScalarType, int64_t, int64_t>;  // device, dtype, N, K
std::set<Weight> allowlist;

void allow(int64_t device, at::ScalarType dtype, int64_t n, int64_t k) {
  const std::lock_guard<std::mutex> held(lock);
  allowlist.insert({device, dtype, n, k});
}

bool is_allowed(const at::Tensor& weight) {
  const std::lock_guard<std::mutex> held(lock);
  return allowlist.count({weight.get_device(), weight.scalar_type(), weight.size(0), weight.size(1)}) > 0;
}

// The rule of bi_ops.core.operators.is_plain: a tensor or parameter whose memory holds its values. Subclasses, meta
// tensors and negative views are not. tests/test_core_operators.py compares both on the same tensors.
bool is_plain(const py::handle& object) {
  if (!THPVariable_CheckExact(object.ptr())) return false;
  const at::Tensor& t = THPVariable_Unpack(object.ptr());
  return !t.is_meta() && !t.is_neg();
}

// The layout that the verified GEMM was compared in: on a GPU, contiguous, 16-byte aligned.
bool has_verified_layout(const at::Tensor& t) {
  return t.is_cuda() && t.is_contiguous() && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
}

// cuBLASLt has no algorithm in the canonical order for this row count: the caller runs another backend.
struct NoAlgorithm : std::exception {};

at::Tensor times_weight(const at::Tensor& x, const at::Tensor& weight) {
  auto sizes = x.sizes().vec();
  sizes.back() = weight.size(0);
  auto out = at::empty(sizes, x.options());
  if (!run(x.view({-1, x.size(-1)}), weight.t(), out.view({-1, weight.size(0)}), std::nullopt, -1, true))
    throw NoAlgorithm();
  return out;
}

struct Linear : torch::autograd::Function<Linear> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight) {
    ctx->save_for_backward({x, weight});
    const at::AutoDispatchBelowADInplaceOrView below;
    return times_weight(x, weight);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    using Signature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&, bool,
                                                         bool, c10::string_view);
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("bi_ops::mm_backward", "").typed<Signature>();
    const auto saved = ctx->get_saved_variables();
    const auto &x = saved[0], &weight = saved[1];
    const bool need_x = ctx->needs_input_grad(0), need_weight = ctx->needs_input_grad(1);
    const auto g = grads[0].reshape({-1, weight.size(0)});
    auto [dx, dw] = op.call(g, x.reshape({-1, x.size(-1)}), weight.t(), need_x, need_weight, "");
    return {need_x ? dx.view(x.sizes()) : at::Tensor(), need_weight ? dw.t() : at::Tensor()};
  }
};

// x [..., K] @ weight[N, K].T; nullopt if the weight is not on the allowlist, an argument is not plain or not in the
// verified layout, or cuBLASLt has no algorithm.
std::optional<at::Tensor> linear(const py::handle& x_object, const py::handle& weight_object) {
  if (!is_plain(x_object) || !is_plain(weight_object)) return std::nullopt;
  const at::Tensor &x = THPVariable_Unpack(x_object.ptr()), &weight = THPVariable_Unpack(weight_object.ptr());
  if (x.dim() < 1 || weight.dim() != 2 || x.scalar_type() != weight.scalar_type() || x.numel() == 0 ||
      x.size(-1) != weight.size(1) || x.device() != weight.device() || !has_verified_layout(x) ||
      !has_verified_layout(weight) || !is_allowed(weight))
    return std::nullopt;
  try {
    if (at::GradMode::is_enabled() && (x.requires_grad() || weight.requires_grad())) return Linear::apply(x, weight);
    const at::AutoDispatchBelowADInplaceOrView below;
    return times_weight(x, weight);
  } catch (const NoAlgorithm&) {
    return std::nullopt;
  }
}

// The configuration of candidate `index`, to print.
std::string describe(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, int64_t index, bool restricted) {
  check_gemm(a, b, out);
  const c10::cuda::CUDAGuard guard(a.device());
  const std::lock_guard<std::mutex> held(lock);
  auto& plan = plan_for(a, b, out, false, restricted);
  const auto found = static_cast<int64_t>(plan.candidates.size());
  TORCH_CHECK(index >= 0 && index < found, "bi_ops cublaslt: no candidate ", index, " of ", found);
  const auto& r = plan.candidates[static_cast<size_t>(index)];
  return "id=" + std::to_string(config<int32_t>(r.algo, CUBLASLT_ALGO_CONFIG_ID)) +
         " tile=" + std::to_string(config<uint32_t>(r.algo, CUBLASLT_ALGO_CONFIG_TILE_ID)) +
         " stages=" + std::to_string(config<uint32_t>(r.algo, CUBLASLT_ALGO_CONFIG_STAGES_ID)) +
         " splitk=" + std::to_string(config<int32_t>(r.algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM)) +
         " reduction=" + std::to_string(config<uint32_t>(r.algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME)) +
         " custom=" + std::to_string(config<uint32_t>(r.algo, CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION)) +
         " cluster=" + std::to_string(config<uint16_t>(r.algo, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID)) +
         " workspace=" + std::to_string(r.workspaceSize);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("count", &count);
  m.def("run", &run);
  m.def("allow", [](int64_t device, py::object dtype, int64_t n, int64_t k) {
    allow(device, torch::python::detail::py_object_to_dtype(std::move(dtype)), n, k);
  });
  m.def("linear", &linear);
  m.def("is_plain", &is_plain);
  m.def("describe", &describe);
  m.attr("CANDIDATES") = kCandidates;
  m.def("version", [] { return static_cast<int64_t>(cublasLtGetVersion()); });
}
