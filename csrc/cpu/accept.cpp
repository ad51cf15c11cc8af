// accept_greedy and accept_sampled on CPU tensors.
#include <algorithm>
#include <vector>

#include "cpu/head.h"
#include "cpu/ops.h"

namespace lsk {

std::tuple<Tensor, Tensor> accept_greedy(const Tensor& draft_in, const Tensor& target_in, const Tensor& seq_lens) {
  const Tensor draft = contiguous(draft_in), target = contiguous(target_in);
  const int64_t batch = draft.size(0), num_speculations = draft.size(1);
  Tensor accepted = torch::stable::empty_like(seq_lens), next_token = torch::stable::empty_like(seq_lens);
  const int64_t* drafts = data<int64_t>(draft, "draft", {batch, num_speculations});
  const int64_t* targets = data<int64_t>(target, "target", {batch, num_speculations + 1});
  int64_t* lengths = data<int64_t>(seq_lens, "seq_lens", {batch});
  check_capacity(lengths, batch, num_speculations + 1, INT64_MAX);
  int64_t* matches = static_cast<int64_t*>(accepted.data_ptr());
  int64_t* next = static_cast<int64_t*>(next_token.data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t *own = drafts + b * num_speculations, *wanted = targets + b * (num_speculations + 1);
    int64_t m = 0;
    while (m < num_speculations && own[m] >= 0 && own[m] == wanted[m]) ++m;
    matches[b] = m;
    next[b] = wanted[m];
    lengths[b] += m + 1;
  }
  return {accepted, next_token};
}

namespace {

// Logits [B, M, V], their strides, and the vocabulary's fixed partition.
struct Rows {
  const float* at;
  int64_t sequence, row;
  HeadTiles tiles;

  Rows(const Tensor& tensor, const char* name, int64_t batch, int64_t rows)
      : at(logits_data(tensor, name, {batch, rows, tensor.size(2)})),
        sequence(tensor.stride(0)),
        row(tensor.stride(1)),
        tiles(tensor.size(2)) {}
  const float* operator()(int64_t b, int64_t i) const { return at + b * sequence + i * row; }
};

// Result of a sequence: accepted drafts, and how the next token is found.
struct Acceptance {
  int64_t accepted, next;
  bool samples, rejected;  // whether the next token is sampled, and whether from max(p - q, 0)
  float logsumexp_p, logsumexp_q;
};

struct AcceptSampled {
  int64_t batch, num_speculations;
  const int64_t *draft, *lengths, *seed, *token_map;       // [B, K], [B], [B], [V_draft] or null
  const float* temperature;                                // [B]
  Rows p, q;                                               // of the target and of the draft
  HeadPartial *partial_p = nullptr, *partial_q = nullptr;  // [B, K + 1, tiles], [B, K, tiles]
  float* residual = nullptr;                               // [B, V]: q, if the next token is sampled from max(p - q, 0)
  float* memory = nullptr;                                 // [threads, V_draft]
  ScoredRow* candidates = nullptr;                         // [B, tiles]

  int64_t count_p() const { return product(batch, num_speculations + 1, p.tiles.count); }
  int64_t count_q() const { return product(batch, num_speculations, q.tiles.count); }
  size_t bytes(int threads) const {
    return Workspace::bytes<HeadPartial>(count_p()) + Workspace::bytes<HeadPartial>(count_q()) +
           Workspace::bytes<float>(product(batch, p.tiles.vocab_size)) +
           Workspace::bytes<float>(product(threads, q.tiles.vocab_size)) +
           Workspace::bytes<ScoredRow>(product(batch, p.tiles.count));
  }
  void take(Workspace& workspace, int threads) {
    partial_p = workspace.take<HeadPartial>(count_p());
    partial_q = workspace.take<HeadPartial>(count_q());
    residual = workspace.take<float>(batch * p.tiles.vocab_size);
    memory = workspace.take<float>(threads * q.tiles.vocab_size);
    candidates = workspace.take<ScoredRow>(batch * p.tiles.count);
  }

  int64_t num_drafts_of(int64_t b) const { return num_drafts(draft + b * num_speculations, num_speculations); }
  float divisor(int64_t b) const { return temperature[b] > 0 ? temperature[b] : 1.0f; }
  NoiseKey noise(int64_t b, int64_t row, uint32_t stream) const { return {seed[b], lengths[b] + row, stream}; }

  void sum_rows(const Worker& worker, const Rows& logits, int64_t rows, bool of_draft, HeadPartial* partials) const {
    const int64_t tiles = logits.tiles.count;
    const Range tasks = worker.share(batch * rows * tiles);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t tile = task % tiles, i = task / tiles % rows, b = task / tiles / rows;
      if (of_draft ? i >= num_drafts_of(b) || temperature[b] == 0 : i > num_drafts_of(b)) continue;
      kernels<float>().softmax_part(logits(b, i), divisor(b), logits.tiles.begin(tile), logits.tiles.end(tile),
                                    partials + task);
    }
  }

  void sum(const Worker& worker) const {
    sum_rows(worker, p, num_speculations + 1, false, partial_p);
    sum_rows(worker, q, num_speculations, true, partial_q);
  }

  // Row of a draft token in the draft head.
  int64_t index(int64_t b, int64_t i) const {
    const int64_t token = draft[b * num_speculations + i], size = q.tiles.vocab_size;
    const int64_t at = token_map ? std::find(token_map, token_map + size, token) - token_map : token;
    LSK_REQUIRE(at < size, "draft[", b, ", ", i, "] is ", token, ", which is not in token_map");
    return at;
  }

  Acceptance accept(int64_t b) const {
    const int64_t drafts = num_drafts_of(b);
    for (int64_t i = 0;; ++i) {
      const HeadRow wanted(partial_p + (b * (num_speculations + 1) + i) * p.tiles.count, p.tiles.count, 1);
      Acceptance out{i, -1, false, false, wanted.logsumexp, 0.0f};
      if (!wanted.finite()) return out;
      const int64_t token = i < drafts ? draft[b * num_speculations + i] : -1;
      if (temperature[b] == 0) {
        if (token == wanted.row) continue;
        out.next = wanted.row;
        return out;
      }
      out.samples = true;
      if (i == drafts) return out;
      const HeadRow own(partial_q + (b * num_speculations + i) * q.tiles.count, q.tiles.count, 1);
      out.logsumexp_q = own.logsumexp;
      out.samples = own.finite();
      if (!out.samples) return out;
      const float log_p = p(b, i)[token] / temperature[b] - wanted.logsumexp;
      const float log_q = q(b, i)[index(b, i)] / temperature[b] - own.logsumexp;
      if (std::log(kernels<float>().uniform(noise(b, i, kAccept))) < log_p - log_q) continue;
      out.rejected = true;
      return out;
    }
  }

  // q at a rejected draft, over the target's vocabulary; `own` [V_draft] is scratch.
  void expand_q(int64_t b, const Acceptance& result, float* own) const {
    const int64_t draft_vocab_size = q.tiles.vocab_size, vocab_size = p.tiles.vocab_size;
    float* out = residual + b * vocab_size;
    kernels<float>().softmax(q(b, result.accepted), temperature[b], result.logsumexp_q, draft_vocab_size,
                             token_map ? own : out);
    if (!token_map) return;
    std::fill_n(out, vocab_size, 0.0f);
    for (int64_t j = 0; j < draft_vocab_size; ++j) out[token_map[j]] = own[j];
  }

  SampleArgs sample_args(int64_t b, const Acceptance& result, bool rejected) const {
    const float* without = rejected ? residual + b * p.tiles.vocab_size : nullptr;
    return {p(b, result.accepted), temperature[b], result.logsumexp_p, without, noise(b, result.accepted, kTarget)};
  }

  void sample(const Worker& worker, const std::vector<Acceptance>& results) const {
    const int64_t tiles = p.tiles.count;
    const Range tasks = worker.share(batch * tiles);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t b = task / tiles, tile = task % tiles;
      if (!results[b].samples) continue;
      kernels<float>().sample_part(sample_args(b, results[b], results[b].rejected), p.tiles.begin(tile),
                                   p.tiles.end(tile), candidates + task);
    }
  }

  int64_t next_token_of(int64_t b, const Acceptance& result) const {
    if (!result.samples) return result.next;
    const ScoredRow* own = candidates + b * p.tiles.count;
    ScoredRow best = own[0];
    for (int64_t t = 1; t < p.tiles.count; ++t)
      if (own[t].score > best.score) best = own[t];
    if (std::isinf(best.score))  // p - q rounded to zero everywhere
      kernels<float>().sample_part(sample_args(b, result, false), 0, p.tiles.vocab_size, &best);
    return best.row;
  }

  // Accepts drafts of all sequences; advances `advanced` [B].
  void run(int threads, int64_t* advanced, int64_t* accepted, int64_t* next) const {
    parallel_run(threads, [&](const Worker& worker) { sum(worker); });
    std::vector<Acceptance> results;
    for (int64_t b = 0; b < batch; ++b) results.push_back(accept(b));
    parallel_run(threads, [&](const Worker& worker) {
      const Range own = worker.share(batch);
      for (int64_t b = own.begin; b < own.end; ++b)
        if (results[b].rejected) expand_q(b, results[b], memory + worker.index * q.tiles.vocab_size);
      worker.wait();
      sample(worker, results);
    });
    for (int64_t b = 0; b < batch; ++b) {
      accepted[b] = results[b].accepted;
      next[b] = next_token_of(b, results[b]);
      advanced[b] += accepted[b] + 1;
    }
  }
};

// Makes the rows contiguous, if they are not.
Tensor with_rows(const Tensor& x) {
  LSK_REQUIRE(x.dim() == 3, "logits have rank ", x.dim(), ", expected 3");
  return x.size(2) <= 1 || x.stride(2) == 1 ? x : contiguous(x);
}

void check_vocabularies(int64_t draft_vocab_size, int64_t vocab_size, bool mapped) {
  LSK_REQUIRE(vocab_size > 0, "target_logits has no tokens");
  LSK_REQUIRE(draft_vocab_size > 0, "draft_logits has no tokens");
  LSK_REQUIRE(mapped || draft_vocab_size == vocab_size, "draft_logits has ", draft_vocab_size,
              " tokens, target_logits ", vocab_size, ": without a token_map they must agree");
}

void check_tokens(const int64_t* tokens, int64_t count, const char* name, int64_t least, int64_t vocab_size) {
  for (int64_t i = 0; tokens && i < count; ++i)
    LSK_REQUIRE(least <= tokens[i] && tokens[i] < vocab_size, name, " holds ", tokens[i],
                ", the vocabulary of target_logits has ", vocab_size);
}

}  // namespace

std::tuple<Tensor, Tensor> accept_sampled(const Tensor& draft_in, const Tensor& draft_logits,
                                          const Tensor& target_logits, const Tensor& seq_lens,
                                          const Tensor& temperature, const Tensor& seed,
                                          const std::optional<Tensor>& token_map) {
  const Tensor draft = contiguous(draft_in), target = with_rows(target_logits), drafts = with_rows(draft_logits);
  const int64_t batch = draft.size(0), num_speculations = draft.size(1), draft_vocab_size = drafts.size(2),
                vocab_size = target.size(2);
  check_vocabularies(draft_vocab_size, vocab_size, token_map.has_value());
  const Sampling sampling(temperature, seed, batch);
  int64_t* lengths = data<int64_t>(seq_lens, "seq_lens", {batch});
  check_capacity(lengths, batch, num_speculations + 1, INT64_MAX);
  const int64_t* tokens = data<int64_t>(draft, "draft", {batch, num_speculations});
  const int64_t* map = data<int64_t>(token_map, "token_map", {draft_vocab_size});
  check_tokens(tokens, batch * num_speculations, "draft", INT64_MIN, vocab_size);
  check_tokens(map, draft_vocab_size, "token_map", 0, vocab_size);
  const Rows p(target, "target_logits", batch, num_speculations + 1),
      q(drafts, "draft_logits", batch, num_speculations);
  const int threads = batch * (num_speculations + 1) * vocab_size < (1 << 15) ? 1 : num_threads();
  AcceptSampled step{batch, num_speculations, tokens, lengths, sampling.seed, map, sampling.temperature, p, q};
  Workspace workspace(step.bytes(threads));
  step.take(workspace, threads);
  Tensor accepted = torch::stable::empty_like(seq_lens), next_token = torch::stable::empty_like(seq_lens);
  step.run(threads, lengths, static_cast<int64_t*>(accepted.data_ptr()), static_cast<int64_t*>(next_token.data_ptr()));
  return {accepted, next_token};
}

}  // namespace lsk

LSK_LIBRARY(CPU, m) {
  m.impl("accept_greedy", TORCH_BOX(&lsk::accept_greedy));
  m.impl("accept_sampled", TORCH_BOX(&lsk::accept_sampled));
}
