// The part of cuBLASLt's C interface that the binding calls, the same in CUDA 12 and 13. It is declared here and looked
// up in the library that torch has loaded, so building needs no CUDA and one binary serves both releases.
// tests/test_matmul_build.py compares it with NVIDIA's cublasLt.h where that is installed.

#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace lt {

constexpr int kOldestCuda = 12, kNewestCuda = 13;

enum Status : int { kSuccess = 0, kNotSupported = 15 };
enum DataType : int { kFloat32 = 0, kFloat16 = 2, kBFloat16 = 14 };
enum Transpose : int { kNo = 0, kYes = 1 };
constexpr int kCompute32F = 68, kEpilogueBias = 4;
constexpr uint32_t kReductionNone = 0;

enum OperationAttribute : int { kTransA = 3, kTransB = 4, kEpilogue = 7, kBiasPointer = 8, kBiasType = 26 };
enum PreferenceAttribute : int {
  kMaxWorkspace = 1,
  kReductionMask = 3,
  kAlignmentA = 5,
  kAlignmentB = 6,
  kAlignmentC = 7,
  kAlignmentD = 8
};
enum AlgorithmAttribute : int {
  kId = 0,
  kTile = 1,
  kSplitK = 2,
  kReduction = 3,
  kSwizzle = 4,
  kCustom = 5,
  kStages = 6,
  kInnerShape = 7,
  kClusterShape = 8
};

struct Algorithm {
  uint64_t data[8];
};
struct HeuristicResult {
  Algorithm algo;
  size_t workspace;
  Status state;
  float waves;
  int reserved[4];
};

using Handle = void*;
using Operation = void*;
using Layout = void*;
using Preference = void*;
using Stream = void*;

// X(name, result, arguments) for each function; its symbol is cublasLt<name>.
#define BI_OPS_CUBLASLT(X)                                                                                            \
  X(GetVersion, size_t, ())                                                                                           \
  X(GetStatusString, const char*, (Status))                                                                           \
  X(MatmulDescCreate, Status, (Operation*, int, DataType))                                                            \
  X(MatmulDescDestroy, Status, (Operation))                                                                           \
  X(MatmulDescSetAttribute, Status, (Operation, OperationAttribute, const void*, size_t))                             \
  X(MatrixLayoutCreate, Status, (Layout*, DataType, uint64_t, uint64_t, int64_t))                                     \
  X(MatrixLayoutDestroy, Status, (Layout))                                                                            \
  X(MatmulPreferenceCreate, Status, (Preference*))                                                                    \
  X(MatmulPreferenceDestroy, Status, (Preference))                                                                    \
  X(MatmulPreferenceSetAttribute, Status, (Preference, PreferenceAttribute, const void*, size_t))                     \
  X(MatmulAlgoGetHeuristic, Status,                                                                                   \
    (Handle, Operation, Layout, Layout, Layout, Layout, Preference, int, HeuristicResult*, int*))                     \
  X(MatmulAlgoConfigGetAttribute, Status, (const Algorithm*, AlgorithmAttribute, void*, size_t, size_t*))             \
  X(Matmul, Status,                                                                                                   \
    (Handle, Operation, const void*, const void*, Layout, const void*, Layout, const void*, const void*, Layout,      \
     void*, Layout, const Algorithm*, void*, size_t, Stream))

struct Functions {
#define BI_OPS_DECLARE(name, result, arguments) result(*name) arguments = nullptr;
  BI_OPS_CUBLASLT(BI_OPS_DECLARE)
#undef BI_OPS_DECLARE
};

// The functions of the library `soname`, which has to be loaded already: so they are those that torch calls.
inline Functions load(const char* soname) {
  void* library = dlopen(soname, RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) throw std::runtime_error(std::string("torch has loaded no ") + soname);
  Functions found;
#define BI_OPS_FIND(name, result, arguments)                                              \
  found.name = reinterpret_cast<decltype(found.name)>(dlsym(library, "cublasLt" #name)); \
  if (found.name == nullptr) throw std::runtime_error(std::string(soname) + " has no cublasLt" #name);
  BI_OPS_CUBLASLT(BI_OPS_FIND)
#undef BI_OPS_FIND
  return found;
}

}  // namespace lt
