// Compiles what stands between LSK_TARGET("features") and LSK_TARGET_END for a processor that has these features.
#pragma once

// Before 16, clang knows bfdot only where a whole file is compiled for it.
#if defined(__aarch64__) && (!defined(__clang__) || __clang_major__ >= 16)
#define LSK_NEON_BF16
#endif

#define LSK_STRING(text) #text
#define LSK_PRAGMA(text) _Pragma(LSK_STRING(text))

#if defined(__clang__)
#define LSK_TARGET(features) LSK_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define LSK_TARGET_END LSK_PRAGMA(clang attribute pop)
#else
#define LSK_TARGET(features) LSK_PRAGMA(GCC push_options) LSK_PRAGMA(GCC target(features))
#define LSK_TARGET_END LSK_PRAGMA(GCC pop_options)
#endif
