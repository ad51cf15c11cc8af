// Registers the implementations of ops on a device:
//
//   LSK_LIBRARY(CPU, m) { m.impl("scale_rows", TORCH_BOX(&lsk::scale_rows)); }
//
// The linker resolves the namespace (library.cpp), so the same objects can be linked into a library with another one.
#pragma once

#include <torch/csrc/stable/library.h>

namespace lsk {

extern const char* const kNamespace;

using torch::stable::detail::StableLibrary;
using torch::stable::detail::StableTorchLibraryInit;

}  // namespace lsk

#define LSK_LIBRARY(device, m)                                                                            \
  static void lsk_implement(lsk::StableLibrary&);                                                         \
  static const lsk::StableTorchLibraryInit lsk_implemented(lsk::StableLibrary::Kind::IMPL, lsk_implement, \
                                                           lsk::kNamespace, #device, __FILE__, __LINE__); \
  void lsk_implement(lsk::StableLibrary& m)
