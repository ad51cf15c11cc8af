// What tests/cuda_emulation/__init__.py calls.
#pragma once

#define EMU_PYTHON extern "C" [[gnu::visibility("default")]]

EMU_PYTHON void emu_begin(uint64_t seed, int major, int counting, int last_block) {
  using namespace emu;
  static_shared_marker = 0;
  dl_iterate_phdr(find_static_shared, nullptr);
  machine.random.seed(seed);
  machine.major = major, machine.counting = counting != 0, machine.last_block = last_block != 0;
  machine.error.clear(), machine.error_at = nullptr;
  machine.traffic.clear(), machine.launches.clear();
  machine.last_carveout = -1;
  catch_signals();
}

// How often an attribute of a kernel was set since the library was loaded.
EMU_PYTHON unsigned emu_attributes_set() { return emu::machine.attributes_set; }

EMU_PYTHON void* emu_allocate(const char* name, size_t bytes) { return emu::machine.memory.allocate(name, bytes); }

EMU_PYTHON void emu_protect(void* pointer) { emu::machine.memory.protect(pointer); }

// Runs what was launched; the first error, or an empty string.
EMU_PYTHON const char* emu_end() {
  using namespace emu;
  synchronize();
  machine.pending.clear();
  release_signals();
  return machine.error.c_str();
}

// To be called after emu_end and after the results were copied out.
EMU_PYTHON const char* emu_release() {
  static std::string damaged;
  damaged = emu::machine.memory.release();
  return damaged.c_str();
}

// One line a kernel and buffer: kernel, launches, buffer, bytes requested, by block, distinct, written.
EMU_PYTHON const char* emu_traffic() {
  static std::string text;
  std::ostringstream out;
  for (const auto& [key, moved] : emu::machine.traffic) {
    out << emu::mark("fn", key.first) << '\t' << emu::machine.launches[key.first] << '\t' << key.second << '\t'
        << moved.requested << '\t' << moved.by_block << '\t' << moved.distinct << '\t' << moved.written << '\n';
  }
  text = out.str();
  return text.c_str();
}
