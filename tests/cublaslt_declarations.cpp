// What csrc/ declares by itself, compared with NVIDIA's header and torch's copy of DLPack's. It only has to compile.

#include <ATen/dlpack.h>
#include <cublasLt.h>

#include <cstddef>
#include <type_traits>

#include "cublaslt_api.h"
#include "tensor_api.h"

#define SAME(ours, theirs) static_assert(static_cast<int64_t>(ours) == static_cast<int64_t>(theirs), #theirs)

SAME(lt::kSuccess, CUBLAS_STATUS_SUCCESS);
SAME(lt::kNotSupported, CUBLAS_STATUS_NOT_SUPPORTED);
SAME(lt::kFloat32, CUDA_R_32F);
SAME(lt::kFloat16, CUDA_R_16F);
SAME(lt::kBFloat16, CUDA_R_16BF);
SAME(lt::kNo, CUBLAS_OP_N);
SAME(lt::kYes, CUBLAS_OP_T);
SAME(lt::kCompute32F, CUBLAS_COMPUTE_32F);
SAME(lt::kEpilogueBias, CUBLASLT_EPILOGUE_BIAS);
SAME(lt::kReductionNone, CUBLASLT_REDUCTION_SCHEME_NONE);
SAME(lt::kTransA, CUBLASLT_MATMUL_DESC_TRANSA);
SAME(lt::kTransB, CUBLASLT_MATMUL_DESC_TRANSB);
SAME(lt::kEpilogue, CUBLASLT_MATMUL_DESC_EPILOGUE);
SAME(lt::kBiasPointer, CUBLASLT_MATMUL_DESC_BIAS_POINTER);
SAME(lt::kBiasType, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE);
SAME(lt::kMaxWorkspace, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
SAME(lt::kReductionMask, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK);
SAME(lt::kAlignmentA, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES);
SAME(lt::kAlignmentB, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES);
SAME(lt::kAlignmentC, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES);
SAME(lt::kAlignmentD, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);
SAME(lt::kId, CUBLASLT_ALGO_CONFIG_ID);
SAME(lt::kTile, CUBLASLT_ALGO_CONFIG_TILE_ID);
SAME(lt::kSplitK, CUBLASLT_ALGO_CONFIG_SPLITK_NUM);
SAME(lt::kReduction, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME);
SAME(lt::kSwizzle, CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING);
SAME(lt::kCustom, CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION);
SAME(lt::kStages, CUBLASLT_ALGO_CONFIG_STAGES_ID);
SAME(lt::kInnerShape, CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID);
SAME(lt::kClusterShape, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID);

SAME(sizeof(lt::Algorithm), sizeof(cublasLtMatmulAlgo_t));
SAME(sizeof(lt::HeuristicResult), sizeof(cublasLtMatmulHeuristicResult_t));
SAME(offsetof(lt::HeuristicResult, workspace), offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));
SAME(offsetof(lt::HeuristicResult, state), offsetof(cublasLtMatmulHeuristicResult_t, state));
SAME(offsetof(lt::HeuristicResult, waves), offsetof(cublasLtMatmulHeuristicResult_t, wavesCount));

// Two parameters are passed alike: both are pointers, or both integers of one size.
template <typename A, typename B>
constexpr bool alike = sizeof(A) == sizeof(B) && std::is_pointer_v<A> == std::is_pointer_v<B>;

template <typename F, typename G>
struct same_call : std::false_type {};
template <typename R, typename... P, typename S, typename... Q>
struct same_call<R (*)(P...), S (*)(Q...)>
    : std::bool_constant<sizeof...(P) == sizeof...(Q) && alike<R, S>> {};
template <typename F, typename G>
struct same_parameters;
template <typename R, typename... P, typename S, typename... Q>
struct same_parameters<R (*)(P...), S (*)(Q...)> : std::bool_constant<(alike<P, Q> && ...)> {};

#define SAME_FUNCTION(name, result, arguments)                                                            \
  static_assert(same_call<decltype(lt::Functions::name), decltype(&cublasLt##name)>::value, #name);      \
  static_assert(same_parameters<decltype(lt::Functions::name), decltype(&cublasLt##name)>::value, #name);
BI_OPS_CUBLASLT(SAME_FUNCTION)

SAME(tensors::kDlpackMajor, DLPACK_MAJOR_VERSION);
SAME(tensors::kFloat, kDLFloat);
SAME(tensors::kBFloat, kDLBfloat);
SAME(sizeof(tensors::Tensor), sizeof(DLTensor));
SAME(offsetof(tensors::Tensor, device.index), offsetof(DLTensor, device.device_id));
SAME(offsetof(tensors::Tensor, ndim), offsetof(DLTensor, ndim));
SAME(offsetof(tensors::Tensor, type_code), offsetof(DLTensor, dtype.code));
SAME(offsetof(tensors::Tensor, bits), offsetof(DLTensor, dtype.bits));
SAME(offsetof(tensors::Tensor, lanes), offsetof(DLTensor, dtype.lanes));
SAME(offsetof(tensors::Tensor, shape), offsetof(DLTensor, shape));
SAME(offsetof(tensors::Tensor, strides), offsetof(DLTensor, strides));
SAME(offsetof(tensors::Tensor, byte_offset), offsetof(DLTensor, byte_offset));
SAME(sizeof(tensors::ExchangeApi), sizeof(DLPackExchangeAPI));
SAME(offsetof(tensors::ExchangeApi, version.major), offsetof(DLPackExchangeAPI, header.version.major));
SAME(offsetof(tensors::ExchangeApi, read), offsetof(DLPackExchangeAPI, dltensor_from_py_object_no_sync));
SAME(offsetof(tensors::ExchangeApi, current_stream), offsetof(DLPackExchangeAPI, current_work_stream));
