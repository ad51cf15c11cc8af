// Barriers, shuffles, votes, reductions and atomics.
#pragma once

#define __syncthreads() emu::block_barrier(0, 0, __LINE__)
#define __syncthreads_count(predicate) emu::block_vote(predicate, 0, __LINE__)
#define __syncthreads_and(predicate) emu::block_vote(predicate, 1, __LINE__)
#define __syncthreads_or(predicate) emu::block_vote(predicate, 2, __LINE__)
inline void __syncwarp(unsigned mask = 0xffffffffu) { emu::warp_barrier(mask); }
inline unsigned __activemask() { return emu::active_mask(); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) {}
[[noreturn]] inline void __trap() { emu::fail("__trap()"); }

namespace emu {

template <class T>
struct Shuffle {
  T value;
  int from;  // lane, out of 0..31
  T result;
};

// A lane that reads from one which does not take part gets garbage.
template <class T>
EMU_PLAIN void complete_shuffle(void* const* requests, unsigned mask) {
  for (unsigned l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    auto* own = static_cast<Shuffle<T>*>(requests[l]);
    if (mask >> own->from & 1) {
      own->result = static_cast<Shuffle<T>*>(requests[own->from])->value;
    } else {
      std::memset(static_cast<void*>(&own->result), 0xFF, sizeof(T));
    }
  }
}

template <class T>
EMU_PLAIN T shuffle(unsigned mask, const char* what, T value, int from) {
  Shuffle<T> request{value, from, {}};
  collective(mask, what, complete_shuffle<T>, &request);
  return request.result;
}

struct Vote {
  int predicate;
  unsigned result;
};

EMU_PLAIN void complete_ballot(void* const* requests, unsigned mask) {
  unsigned ballot = 0;
  for (unsigned l = 0; l < 32; ++l)
    if (mask >> l & 1 && static_cast<Vote*>(requests[l])->predicate != 0) ballot |= 1u << l;
  for (unsigned l = 0; l < 32; ++l)
    if (mask >> l & 1) static_cast<Vote*>(requests[l])->result = ballot;
}

EMU_PLAIN unsigned ballot(unsigned mask, const char* what, int predicate) {
  Vote request{predicate, 0};
  collective(mask, what, complete_ballot, &request);
  return request.result;
}

template <class T, class F>
struct Reduction {
  T value;
};

template <class T, class F>
EMU_PLAIN void complete_reduction(void* const* requests, unsigned mask) {
  T sum{};
  bool first = true;
  for (unsigned l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    const T value = static_cast<Reduction<T, F>*>(requests[l])->value;
    sum = std::exchange(first, false) ? value : F()(sum, value);
  }
  for (unsigned l = 0; l < 32; ++l)
    if (mask >> l & 1) static_cast<Reduction<T, F>*>(requests[l])->value = sum;
}

template <class F, class T>
EMU_PLAIN T reduce(unsigned mask, const char* what, T value, F) {
  Reduction<T, F> request{value};
  collective(mask, what, complete_reduction<T, F>, &request);
  return request.value;
}

template <class T, class F>
EMU_PLAIN T update(T* pointer, F f) {
  access(pointer, sizeof(T), Access::atomic, __builtin_return_address(0));
  const T before = *pointer;
  *pointer = f(before);
  return before;
}

}  // namespace emu

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const int lane = static_cast<int>(emu::lane());
  return emu::shuffle(mask, "__shfl_sync", value, (lane & ~(width - 1)) | (from & (width - 1)));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = static_cast<int>(emu::lane()), from = lane ^ bits;
  return emu::shuffle(mask, "__shfl_xor_sync", value, from / width <= lane / width ? from : lane);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = static_cast<int>(emu::lane()), from = lane + static_cast<int>(delta);
  return emu::shuffle(mask, "__shfl_down_sync", value, from / width == lane / width ? from : lane);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = static_cast<int>(emu::lane()), from = lane - static_cast<int>(delta);
  return emu::shuffle(mask, "__shfl_up_sync", value, from >= (lane & ~(width - 1)) ? from : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) { return emu::ballot(mask, "__ballot_sync", predicate); }
inline int __any_sync(unsigned mask, int predicate) { return emu::ballot(mask, "__any_sync", predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return emu::ballot(mask, "__all_sync", predicate == 0) == 0; }

#define EMU_REDUCE(name, type, expression)                                                     \
  inline type name(unsigned mask, type value) {                                                \
    return emu::reduce(mask, #name, value, [](type a, type b) -> type { return expression; }); \
  }
EMU_REDUCE(__reduce_add_sync, unsigned, a + b)
EMU_REDUCE(__reduce_add_sync, int, a + b)
EMU_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
EMU_REDUCE(__reduce_min_sync, int, a < b ? a : b)
EMU_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
EMU_REDUCE(__reduce_max_sync, int, a > b ? a : b)
EMU_REDUCE(__reduce_and_sync, unsigned, a& b)
EMU_REDUCE(__reduce_or_sync, unsigned, a | b)

#define EMU_ATOMIC(name, expression)                                         \
  template <class T>                                                         \
  T name(T* pointer, std::type_identity_t<T> value) {                        \
    return emu::update(pointer, [value](T old) -> T { return expression; }); \
  }
EMU_ATOMIC(atomicAdd, old + value)
EMU_ATOMIC(atomicSub, old - value)
EMU_ATOMIC(atomicExch, (static_cast<void>(old), value))
EMU_ATOMIC(atomicMin, old < value ? old : value)
EMU_ATOMIC(atomicMax, old > value ? old : value)
EMU_ATOMIC(atomicAnd, old& value)
EMU_ATOMIC(atomicOr, old | value)
EMU_ATOMIC(atomicInc, old >= value ? 0 : old + 1)

template <class T>
T atomicCAS(T* pointer, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return emu::update(pointer, [=](T old) { return old == expected ? value : old; });
}
