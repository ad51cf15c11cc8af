// For the files in ops/: a weight out of the pointer that a test gives and the code of its format, as in
// common/weight.h.
#pragma once

#include "common/weight.h"

namespace emu {

template <class T>
lsk::Weight weight(const void* data, int64_t width, int64_t code) {
  const auto format = static_cast<lsk::Format>(code);
  int64_t pitch = width * static_cast<int64_t>(sizeof(T));
  if (format == lsk::Format::kRows) pitch = width;
  if (format > lsk::Format::kRows) pitch = lsk::with_group(format, [&](auto group) { return group.row_bytes(width); });
  return {static_cast<const uint8_t*>(data), pitch, format};
}

}  // namespace emu
