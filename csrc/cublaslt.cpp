// cuBLASLt restricted to the canonical order: no split-K, no stream-K, no reduction scheme, no workspace.
//
// out[M, N] = a[M, K] @ b[K, N], batched or not. Tensors are row-major and cuBLASLt is column-major, so it is asked for
// out^T = b^T a^T. Plans (descriptors and the admitted algorithms) are made once per shape, layout and alignment.
// Admitted algorithms have the same bits, so which of them runs is a matter of time: see `settle`.

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

// A 2-D tensor as column-major storage: `rows` x `cols` with leading dimension `ld`; `transposed` if that storage is
// the transpose of what the product wants.
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

bool keeps_the_order(const cublasLtMatmulHeuristicResult_t& r) {
  return r.workspaceSize == 0 && config<int32_t>(r.algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM) <= 1 &&
         config<uint32_t>(r.algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME) == CUBLASLT_REDUCTION_SCHEME_NONE;
}

constexpr int kMostCandidates = 16;
constexpr size_t kCompeting = 5;  // candidates that are timed; a certificate compares the bits of all of them
constexpr double kWorthTiming = 0x1p30;  // multiply-adds; below, cuBLASLt's first candidate runs
constexpr size_t kMostPlans = 4096;  // a new token count makes new plans; beyond this many, start again
constexpr size_t kFreeWorkspace = 32u << 20;  // for the unrestricted plans of the negative control

using Key = std::array<int64_t, 20>;

struct Plan {
  std::unique_ptr<Operation> operation;
  std::unique_ptr<Layout> a, b, out;
  std::vector<cublasLtMatmulHeuristicResult_t> candidates;
  size_t fastest = 0;
  bool settled = true;  // is `fastest` known
  Key like;  // the key with powers of two for M and K: products of about this size
};

std::map<Key, std::unique_ptr<Plan>> plans;
std::mutex lock;

// What tells one candidate from another, whatever the shape.
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

std::map<Key, Identity> winners;

int64_t power_of_two(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

using Launch = std::function<void(const cublasLtMatmulHeuristicResult_t&)>;

// Finds the fastest candidate, once per size: the first product of about this size is computed by each of them, a few
// times, with its operands in memory, as a layer's weights are when its turn comes: from L2 another one may be faster.
// Nothing is timed while a CUDA graph is captured: the first candidate runs, and the question stays open.
void settle(Plan& plan, const Launch& launch) {
  const size_t competing = std::min(plan.candidates.size(), kCompeting);
  if (const auto won = winners.find(plan.like); won != winners.end()) {
    plan.settled = true;
    for (size_t i = competing; i-- > 0;)
      if (identity(plan.candidates[i]) == won->second) plan.fastest = i;
    return;
  }
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) return;
  plan.settled = true;
  std::array<float, kCompeting> best;
  best.fill(std::numeric_limits<float>::infinity());
  at::Tensor flush;
  try {
    flush = at::empty({2 * at::cuda::getCurrentDeviceProperties()->l2CacheSize}, at::device(at::kCUDA).dtype(at::kByte));
  } catch (const c10::OutOfMemoryError&) {
    return;  // the first candidate runs
  }
  at::cuda::CUDAEvent start(cudaEventDefault), end(cudaEventDefault);
  for (int round = 0; round < 5; ++round)
    for (size_t i = 0; i < competing; ++i) {
      flush.zero_();
      start.record();
      launch(plan.candidates[i]);
      end.record();
      end.synchronize();
      best[i] = std::min(best[i], start.elapsed_time(end));
    }
  for (size_t i = 1; i < competing; ++i)
    if (best[i] < best[plan.fastest] && best[i] < 0.98f * best[0]) plan.fastest = i;  // 2%: not for noise
  if (winners.size() >= kMostPlans) winners.clear();
  winners[plan.like] = identity(plan.candidates[plan.fastest]);
}

Plan& plan_for(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool bias, bool restricted) {
  const View va = view(a, "a"), vb = view(b, "b"), vo = view(out, "out");
  TORCH_CHECK(!vo.transposed, "bi_ops cublaslt: out must be row-major");
  const bool batched = out.dim() == 3;
  const Key key{a.get_device(), static_cast<int64_t>(a.scalar_type()), static_cast<int64_t>(out.scalar_type()),
                batched ? out.size(0) : -1, out.size(-2), out.size(-1), a.size(-1), va.ld, va.transposed, vb.ld,
                vb.transposed, vo.ld, batched ? a.stride(0) : 0, batched ? b.stride(0) : 0,
                batched ? out.stride(0) : 0, alignment(a), alignment(b), alignment(out), bias, restricted};
  if (plans.size() >= kMostPlans && plans.find(key) == plans.end()) plans.clear();
  auto& slot = plans[key];
  if (slot) return *slot;

  auto plan = std::make_unique<Plan>();
  plan->like = key;
  for (const size_t i : {4, 6}) plan->like[i] = power_of_two(key[i]);
  plan->operation = std::make_unique<Operation>(va, vb, bias);
  plan->a = std::make_unique<Layout>(b, vb);  // cuBLASLt's A is our b: the product is transposed
  plan->b = std::make_unique<Layout>(a, va);
  plan->out = std::make_unique<Layout>(out, vo);

  Preference preference;
  const size_t workspace = restricted ? 0 : kFreeWorkspace;
  preference.set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace);
  if (restricted) {
    const uint32_t none = CUBLASLT_REDUCTION_SCHEME_NONE;
    preference.set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, none);
  }
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(b));
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(a));
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(out));
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(out));

  std::array<cublasLtMatmulHeuristicResult_t, kMostCandidates> found{};
  int count = 0;
  auto handle = reinterpret_cast<cublasLtHandle_t>(at::cuda::getCurrentCUDABlasHandle());
  const auto status =
      cublasLtMatmulAlgoGetHeuristic(handle, plan->operation->raw, plan->a->raw, plan->b->raw, plan->out->raw,
                                     plan->out->raw, preference.raw, kMostCandidates, found.data(), &count);
  if (status != CUBLAS_STATUS_NOT_SUPPORTED) check(status, "heuristic");
  for (int i = 0; i < count; ++i)
    if (found[i].state == CUBLAS_STATUS_SUCCESS && (!restricted || keeps_the_order(found[i])))
      plan->candidates.push_back(found[i]);
  const double work = static_cast<double>(out.numel()) * static_cast<double>(a.size(-1));
  plan->settled = !restricted || plan->candidates.size() < 2 || work < kWorthTiming;
  slot = std::move(plan);
  return *slot;
}

void check_product(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) {
  TORCH_CHECK(a.is_cuda() && b.device() == a.device() && out.device() == a.device(), "bi_ops cublaslt: devices differ");
  TORCH_CHECK(a.scalar_type() == b.scalar_type() && a.scalar_type() != at::kFloat,
              "bi_ops cublaslt: a and b must both be bf16 or both fp16");
  TORCH_CHECK(a.dim() == out.dim() && b.dim() == out.dim() && a.size(-1) == b.size(-2) && out.size(-2) == a.size(-2) &&
                  out.size(-1) == b.size(-1),
              "bi_ops cublaslt: shapes ", a.sizes(), " @ ", b.sizes(), " -> ", out.sizes());
}

// How many algorithms cuBLASLt offers for this product.
int64_t count(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool restricted) {
  check_product(a, b, out);
  const c10::cuda::CUDAGuard guard(a.device());
  const std::lock_guard<std::mutex> held(lock);
  return static_cast<int64_t>(plan_for(a, b, out, false, restricted).candidates.size());
}

// out = a @ b (+ bias) with candidate `index`, -1 for the fastest; false, and nothing done, if there are not that many.
bool run(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, const std::optional<at::Tensor>& bias,
         int64_t index, bool restricted) {
  check_product(a, b, out);
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
  if (index < 0 && !plan.settled) settle(plan, launch);
  launch(plan.candidates[index < 0 ? plan.fastest : static_cast<size_t>(index)]);
  return true;
}

// --------------------------------------------------------------------------------------------------------------
// linear without Python on the way: x @ weight.T for shapes whose certificate Python holds. The backward is the
// operator that differentiates `bi_ops::mm`.

using Weight = std::tuple<int64_t, at::ScalarType, int64_t, int64_t>;  // device, dtype, N, K
std::set<Weight> admitted;

void admit(int64_t device, at::ScalarType dtype, int64_t n, int64_t k) {
  const std::lock_guard<std::mutex> held(lock);
  admitted.insert({device, dtype, n, k});
}

bool is_plain(const at::Tensor& t) {
  using c10::DispatchKey;
  const c10::DispatchKeySet wrapped({DispatchKey::FuncTorchBatched, DispatchKey::FuncTorchGradWrapper,
                                     DispatchKey::Python, DispatchKey::Functionalize});
  return t.is_cuda() && t.is_contiguous() && !t.key_set().has_any(wrapped) &&
         reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
}

// cuBLASLt has no algorithm in the canonical order for this row count: the caller takes another way.
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

// x [..., K] @ weight[N, K].T; nothing where the shape is not admitted, the tensors are not plain ones, or there is no
// algorithm for them.
std::optional<at::Tensor> linear(const at::Tensor& x, const at::Tensor& weight) {
  if (x.dim() < 1 || weight.dim() != 2 || x.scalar_type() != weight.scalar_type() || x.numel() == 0 ||
      x.size(-1) != weight.size(1) || !is_plain(x) || !is_plain(weight) || x.device() != weight.device())
    return std::nullopt;
  {
    const std::lock_guard<std::mutex> held(lock);
    if (!admitted.count({x.get_device(), x.scalar_type(), weight.size(0), weight.size(1)})) return std::nullopt;
  }
  try {
    if (at::GradMode::is_enabled() && (x.requires_grad() || weight.requires_grad())) return Linear::apply(x, weight);
    const at::AutoDispatchBelowADInplaceOrView below;
    return times_weight(x, weight);
  } catch (const NoAlgorithm&) {
    return std::nullopt;
  }
}

// What candidate `index` is made of, for people.
std::string describe(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, int64_t index, bool restricted) {
  check_product(a, b, out);
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
    admit(device, torch::python::detail::py_object_to_dtype(std::move(dtype)), n, k);
  });
  m.def("linear", &linear);
  m.def("describe", &describe);
  m.attr("CANDIDATES") = kCompeting;
  m.def("version", [] { return static_cast<int64_t>(cublasLtGetVersion()); });
}
