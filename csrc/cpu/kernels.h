// The kernels that exist once per instruction set, behind one table of functions; chosen at run time.
#pragma once

#include <cstdint>

#include "common/weight.h"

// Clang before 16 has bfdot only in files that are compiled for it as a whole.
#if defined(__aarch64__) && (!defined(__clang__) || __clang_major__ >= 16)
#define LSK_NEON_BF16
#endif

namespace lsk {

constexpr int64_t kBlock = kPackedBlock;
constexpr int64_t kPad = 32;         // rows of packed activations are zero-padded to a multiple of this
constexpr int64_t kSplit = 256;      // positions of one attention split; fixed, so that a row's bits don't depend on M
constexpr int64_t kHeadTiles = 128;  // parts of a vocabulary; fixed, so that a sum's order doesn't depend on the team

// What stands before a split's weighted values, padded: their maximum at 0, the sum of their numerators in 16 parts at
// 16. Where values are weighed in pairs, of thirty-two columns the even ones come first.
constexpr int64_t kPartialHead = 32;

inline int64_t padded(int64_t size) { return (size + kPad - 1) / kPad * kPad; }

// Floats of a row of a split.
inline int64_t partial_pitch(int64_t head_dim) { return kPartialHead + padded(head_dim); }

// Activations of a matmul, [rows, width], in the form that the instruction set multiplies with a weight of the format
// that they were packed for: bf16, fp32, or 16-bit integers; padded.
struct TiledActivations {
  const void* data;
  int64_t rows, width;
};

template <class T>
struct LinearArgs {
  TiledActivations x;
  Weight weight;      // [d_out, d_in]
  const T* bias;      // [d_out] or null
  const T* residual;  // [rows, d_out] or null
  T* out;             // [rows, d_out]
  int64_t d_out;
  const void* next;  // what this thread reads afterwards, or null
};

template <class T>
struct SwigluArgs {
  TiledActivations x;
  Weight gate, up;  // [d_out, d_in]
  T* out;           // [rows, d_out]
  int64_t d_out;
  const void* next;  // what this thread reads afterwards, or null
};

// Streams of the noise.
constexpr uint32_t kDraft = 0, kAccept = 1, kTarget = 2;

// What names a row's noise; see layerskip_kernels/_noise.py.
struct NoiseKey {
  int64_t seed, offset;
  uint32_t stream;
};

// The best of noisy scores, and its row.
struct ScoredRow {
  float score;
  int64_t row;
};

// Maximum, its row and the sum of exp(logit - maximum) over a range of the vocabulary; what was drawn and its logit.
struct HeadPartial {
  float max;
  float sum;
  int64_t row;
  ScoredRow pick;
  float logit;
};

// What a call may want of a head beyond the arg-max.
struct HeadOptions {
  const float* temperature = nullptr;  // [rows] or null; 0 is greedy
  const int64_t *seed = nullptr, *offset = nullptr;
  const int64_t* token_map = nullptr;  // [V] or null
  float* logits = nullptr;             // [rows, V], rows `pitch` apart, or null
  int64_t pitch = 0;
};

struct SampleArgs {
  const float* logits;  // [V]
  float temperature, logsumexp;
  const float* q;  // [V] or null
  NoiseKey noise;
};

struct HeadArgs {
  TiledActivations x;
  Weight weight;               // [V, width]
  const float* scale;          // [V] or null
  const HeadOptions* options;  // or null
};

template <class T>
struct RopeArgs {
  const T* norm;           // [C] or null
  const float *cos, *sin;  // [C/2], of this position
  int64_t head_dim;        // C
  float eps;
};

template <class T>
struct AttentionArgs {
  const T* q;                         // [M, H, C] of one sequence
  const T *keys, *values;             // [T, C] of one key/value head
  const T* next_keys;                 // what is read after this split
  int64_t length;                     // positions before this step
  int64_t rows, num_heads, head_dim;  // M, H, C
  int64_t kv_head, ratio;             // which key/value head; query heads per key/value head
  float* partial;                     // [M, ratio, partial_pitch(C)], of this split; attend_rows: two
};

// A row of a tile of logits, and where its label lies among them, if at all.
template <class T>
struct LossRow {
  T* logits;
  int64_t count, label;
};

// What a row's tiles add up to, see cpu_loss.py; slope has `hidden_size` entries, or none.
struct LossSums {
  float *shift, *sum, *label_logit, *slope;
  int64_t hidden_size;
};

// Everything that is compiled per instruction set, for one storage type.
template <class T>
struct Kernels {
  // Rows [begin, end) of x [rows, width] -> packed, for such weights; with a norm weight, rms_norm (rounded to T)
  // first.
  void (*tile)(const T* x, const T* norm, float eps, int64_t begin, int64_t end, int64_t width, const Weight& weight,
               void* tiled);
  void (*expand_row)(const Weight& weight, int64_t row, int64_t width, T* out);  // of a packed weight
  void (*rms_norm)(const T* x, const T* weight, float eps, int64_t width, T* out);
  void (*linear)(const LinearArgs<T>&, int64_t begin, int64_t end);
  void (*swiglu)(const SwigluArgs<T>&, int64_t begin, int64_t end);
  void (*head)(const HeadArgs&, int64_t begin, int64_t end, HeadPartial* partial);
  void (*rope)(const RopeArgs<T>&, const T* x, T* out);
  void (*attend)(const AttentionArgs<T>&, int64_t split);
  // All splits, to `out` [M, H, C] from the first of the heads on; `partial` holds two. The bits are those of
  // `combine`.
  void (*attend_rows)(const AttentionArgs<T>&, T* out);
  void (*combine)(const float* partial, int64_t stride, int64_t splits, int64_t head_dim, T* out);
  // Of one row of fp32 logits, whatever T is.
  void (*softmax_part)(const float* logits, float divisor, int64_t begin, int64_t end, HeadPartial* out);
  void (*softmax)(const float* logits, float divisor, float logsumexp, int64_t count, float* out);
  void (*sample_part)(const SampleArgs&, int64_t begin, int64_t end, ScoredRow* out);
  float (*uniform)(const NoiseKey&);  // of token 0
  void (*loss_terms)(const LossRow<T>&, float slack, const LossSums&);
  void (*loss_slopes)(const LossRow<T>&, float logsumexp, float scale);
};

const char* isa_name();
// Uses the named instruction set from now on; false where it is unknown or this machine lacks it.
bool set_isa(const char* name);

template <class T>
const Kernels<T>& kernels();

}  // namespace lsk
