// Function table of the kernels that are compiled once per instruction set; selected at run time.
#pragma once

#include <cstdint>

#include "common/weight.h"

// Clang before 16 has bfdot only in files that are compiled for it as a whole.
#if defined(__aarch64__) && (!defined(__clang__) || __clang_major__ >= 16)
#define LSK_NEON_BF16
#endif

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define LSK_AMX
#endif

namespace lsk {

constexpr int64_t kBlock = kPackedBlock;
constexpr int64_t kPad = 32;     // tiled activation rows are zero-padded to a multiple of this
constexpr int64_t kSplit = 256;  // positions of one attention split; fixed, so that results do not depend on M
constexpr int64_t kHeadTiles =
    128;  // parts of a vocabulary; fixed, so that the order of sums does not depend on threads

// Header of a split's partial result: the maximum score at 0, the sum of the softmax numerators in 16 parts at 16. The
// weighted values follow, padded; if values are multiplied in pairs, the even columns of every 32 come first.
constexpr int64_t kPartialHead = 32;

inline int64_t padded(int64_t size) { return (size + kPad - 1) / kPad * kPad; }

// Floats of one row of a split's partial result.
inline int64_t partial_pitch(int64_t head_dim) { return kPartialHead + padded(head_dim); }

// Activations of a matmul, [rows, width], converted and padded for one weight format: bf16, fp32, or 16-bit integers.
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
  const void* next;  // memory that this thread reads next, prefetched; or null
};

template <class T>
struct SwigluArgs {
  TiledActivations x;
  Weight gate, up;  // [d_out, d_in]
  T* out;           // [rows, d_out]
  int64_t d_out;
  const void* next;  // memory that this thread reads next, prefetched; or null
};

// Streams of the noise.
constexpr uint32_t kDraft = 0, kAccept = 1, kTarget = 2;

// Counter of a row's noise; see layerskip_kernels/_noise.py.
struct NoiseKey {
  int64_t seed, offset;
  uint32_t stream;
};

// Best score with noise, and its row.
struct ScoredRow {
  float score;
  int64_t row;
};

// Over a range of the vocabulary: maximum, its row, sum of exp(logit - maximum); the sampled row and its logit.
struct HeadPartial {
  float max;
  float sum;
  int64_t row;
  ScoredRow pick;
  float logit;
};

// Options of a head beyond the arg-max.
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
  const T* next_keys;                 // memory that is read after this split
  int64_t length;                     // positions before this step
  int64_t rows, num_heads, head_dim;  // M, H, C
  int64_t kv_head, ratio;             // which key/value head; query heads per key/value head
  float* partial;                     // [M, ratio, partial_pitch(C)], of this split; attend_rows needs two of them
};

// A row of a tile of logits; the label is outside [0, count) if another tile has it.
template <class T>
struct LossRow {
  T* logits;
  int64_t count, label;
};

// Running sums over a row's tiles, see cpu_loss.py; `slope` has `hidden_size` entries or is null.
struct LossSums {
  float *shift, *sum, *label_logit, *slope;
  int64_t hidden_size;
};

// The kernels of one instruction set, for one storage type.
template <class T>
struct Kernels {
  // Converts rows [begin, end) of x [rows, width] for such weights; with a norm weight, after rms_norm (rounded to T).
  void (*tile)(const T* x, const T* norm, float eps, int64_t begin, int64_t end, int64_t rows, int64_t width,
               const Weight& weight, void* tiled);
  void (*expand_row)(const Weight& weight, int64_t row, int64_t width, T* out);  // dequantizes a packed weight
  void (*rms_norm)(const T* x, const T* weight, float eps, int64_t width, T* out);
  void (*linear)(const LinearArgs<T>&, int64_t begin, int64_t end);
  void (*swiglu)(const SwigluArgs<T>&, int64_t begin, int64_t end);
  void (*head)(const HeadArgs&, int64_t begin, int64_t end, HeadPartial* partial);
  void (*rope)(const RopeArgs<T>&, const T* x, T* out);
  void (*attend)(const AttentionArgs<T>&, int64_t split);
  // All splits, to `out` [M, H, C], which begins at the first of the heads; same bits as `attend` and `combine`.
  void (*attend_rows)(const AttentionArgs<T>&, T* out);
  void (*combine)(const float* partial, int64_t stride, int64_t splits, int64_t head_dim, T* out);
  // On one row of fp32 logits, whatever T is.
  void (*softmax_part)(const float* logits, float divisor, int64_t begin, int64_t end, HeadPartial* out);
  void (*softmax)(const float* logits, float divisor, float logsumexp, int64_t count, float* out);
  void (*sample_part)(const SampleArgs&, int64_t begin, int64_t end, ScoredRow* out);
  float (*uniform)(const NoiseKey&);  // for token 0
  void (*loss_terms)(const LossRow<T>&, float slack, const LossSums&);
  void (*loss_slopes)(const LossRow<T>&, float logsumexp, float scale);
};

const char* isa_name();
// Selects an instruction set; false if it is unknown or not available on this machine.
bool set_isa(const char* name);

template <class T>
const Kernels<T>& kernels();

}  // namespace lsk
