// The namespace of what the compiled libraries implement, as in layerskip_kernels/_namespace.py. What builds packages
// for the Hugging Face hub defines TORCH_EXTENSION_NAME, another one for every version, so that several fit into a
// process.
#include "common/library.h"

#define LSK_QUOTED(name) #name
#define LSK_NAME(name) LSK_QUOTED(name)

#ifndef TORCH_EXTENSION_NAME
#define TORCH_EXTENSION_NAME layerskip
#endif

namespace lsk {

const char* const kNamespace = LSK_NAME(TORCH_EXTENSION_NAME) "_native";

}  // namespace lsk
