// What a stretch of the vocabulary leaves of a row of logits: its arg-max, and its part of the log-sum-exp.
#pragma once

namespace lsk {

struct Choice {
  float key;    // the largest logit, or logit plus noise
  float value;  // the logit where it is
  int row;      // and its row: the lowest among equals
  float peak;   // the largest logit
  float sum;    // of exp(logit - finite_or_zero(peak)); NaN, or infinite, where a logit is NaN or +inf
};

}  // namespace lsk
