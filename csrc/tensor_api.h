// Tensors of torch without its headers: DLPack's C exchange protocol, version 1, as torch.Tensor offers it in
// `__dlpack_c_exchange_api__` from 2.10 on. A binary built against it serves every release of torch.

#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <stdexcept>

namespace tensors {

constexpr uint32_t kDlpackMajor = 1;

enum TypeCode : uint8_t { kFloat = 2, kBFloat = 4 };

struct Device {
  int32_t type, index;
};

struct Tensor {  // DLTensor; it lives as long as the Python object that it was read from
  char* data;
  Device device;
  int32_t ndim;
  uint8_t type_code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct ExchangeApi {  // DLPackExchangeAPI
  struct {
    uint32_t major, minor;
  } version;
  void* previous;
  void *allocate, *export_owned, *import_owned;
  int (*read)(void* py_object, Tensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_index, void** out);
};

struct PythonError {};  // Python's error is set

// The table in the capsule `torch.Tensor.__dlpack_c_exchange_api__`.
inline const ExchangeApi* exchange_api(PyObject* capsule) {
  const auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (api == nullptr) throw PythonError();
  if (api->version.major != kDlpackMajor) throw std::runtime_error("torch speaks another major version of DLPack than 1");
  return api;
}

}  // namespace tensors
