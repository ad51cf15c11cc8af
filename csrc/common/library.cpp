// Namespace of the native ops, as in layerskip_kernels/_ops.py. Packages for the Hugging Face hub define another
// TORCH_EXTENSION_NAME for each version, so that one process can load several.
#include "common/library.h"

#define LSK_QUOTED(name) #name
#define LSK_NAME(name) LSK_QUOTED(name)

#ifndef TORCH_EXTENSION_NAME
#define TORCH_EXTENSION_NAME layerskip
#endif

namespace lsk {

const char* const kNamespace = LSK_NAME(TORCH_EXTENSION_NAME) "_native";

}  // namespace lsk
