#pragma once

// Reads the sizes and strides of an op's tensors into what its kernel works with; the same on
// every device.

#include <cstdlib>
#include <limits>
#include <tuple>
#include <utility>

#include "checks.h"
#include "kernels/block_diag_expand.h"
#include "kernels/block_diag_sum.h"
#include "kernels/kron_diag_scale.h"
#include "kernels/pivoted_cholesky.h"
#include "kernels/shifted_cholesky.h"
#include "kernels/small_nll.h"

namespace torch_kronlik {

inline Blocks blocks_of(const Tensor& A, int64_t num_blocks) {
  const char* op = "block_diag_sum";
  check_min_dim(A, 2, op);
  check(num_blocks >= 1, op, ": num_blocks must be positive, got ", num_blocks);
  const int64_t rows = A.size(A.dim() - 2), cols = A.size(A.dim() - 1);
  check(rows % num_blocks == 0 && cols % num_blocks == 0, op, ": ", rows, " x ", cols,
        " is not made of ", num_blocks, " x ", num_blocks, " blocks");
  Blocks s;
  s.p = num_blocks;
  s.m = rows / num_blocks;
  s.n = cols / num_blocks;
  s.row_stride = A.stride(A.dim() - 2);
  s.col_stride = A.stride(A.dim() - 1);
  s.block_stride = s.m * s.row_stride + s.n * s.col_stride;
  s.batch = batch_layout(A, 2, batch_sizes(A, 2));
  return s;
}

struct OutStrides {
  int64_t row, col;
};

// Exchanges the roles of rows and columns where A is contiguous along its columns, so that n is
// always the direction to run along. Returns the strides of the contiguous result in these roles.
inline OutStrides run_along_contiguous(Blocks& s) {
  const OutStrides strides{s.n, 1};
  if (std::abs(s.row_stride) >= std::abs(s.col_stride)) return strides;
  std::swap(s.m, s.n);
  std::swap(s.row_stride, s.col_stride);
  return {strides.col, strides.row};
}

inline BlockExpand expansion_of(const Tensor& S, int64_t num_blocks) {
  check_min_dim(S, 2, "block_diag_expand");
  check(num_blocks >= 1, "block_diag_expand: num_blocks must be positive, got ", num_blocks);
  BlockExpand e;
  e.p = num_blocks;
  e.m = S.size(S.dim() - 2);
  e.n = S.size(S.dim() - 1);
  e.row_stride = S.stride(S.dim() - 2);
  e.col_stride = S.stride(S.dim() - 1);
  e.batch = batch_layout(S, 2, batch_sizes(S, 2));
  return e;
}

inline KronDiag kron_diag_of(const Tensor& s, const Tensor& lam, const Sizes& batch) {
  KronDiag g;
  g.T = s.size(s.dim() - 1);
  g.D = lam.size(lam.dim() - 1);
  g.s_stride = s.stride(s.dim() - 1);
  g.lam_stride = lam.stride(lam.dim() - 1);
  g.s_batch = batch_layout(s, 1, batch);
  g.lam_batch = batch_layout(lam, 1, batch);
  return g;
}

// The batch of what depends on s and lam alone.
inline Sizes factor_batch(const Tensor& s, const Tensor& lam, const char* op) {
  check_min_dim(s, 1, op);
  check_min_dim(lam, 1, op);
  check_alike(s, lam, op);
  return broadcast(batch_sizes(s, 1), batch_sizes(lam, 1), op);
}

inline Sizes scale_batch(const Tensor& s, const Tensor& lam, const Tensor& Y, const char* op) {
  check_min_dim(Y, 2, op);
  check_alike(s, Y, op);
  check(Y.size(Y.dim() - 2) == s.size(s.dim() - 1), op, ": Y and s differ in T");
  check(Y.size(Y.dim() - 1) == lam.size(lam.dim() - 1), op, ": Y and lam differ in D");
  return broadcast(factor_batch(s, lam, op), batch_sizes(Y, 2), op);
}

inline KronDiagScale kron_diag_scale_of(const Tensor& s, const Tensor& lam, const Tensor& Y,
                                        const Sizes& batch) {
  KronDiagScale k;
  k.grid = kron_diag_of(s, lam, batch);
  k.row_stride = Y.stride(Y.dim() - 2);
  k.col_stride = Y.stride(Y.dim() - 1);
  k.y_batch = batch_layout(Y, 2, batch);
  return k;
}

inline PivotedCholesky pivoted_cholesky_of(const Tensor& M, int64_t max_rank) {
  const char* op = "pivoted_cholesky";
  check_min_dim(M, 2, op);
  PivotedCholesky c;
  c.T = M.size(M.dim() - 1);
  check(M.size(M.dim() - 2) == c.T, op, ": M is not square");
  check(max_rank >= 0, op, ": max_rank is negative");
  c.max_rank = max_rank;
  c.row_stride = M.stride(M.dim() - 2);
  c.col_stride = M.stride(M.dim() - 1);
  c.batch = batch_layout(M, 2, batch_sizes(M, 2));
  return c;
}

// The noise is Σ where it is full, else the logarithms of its diagonal.
inline Sizes small_batch(const Tensor& Y, const Tensor& M, const Tensor& K, const Tensor& noise,
                         bool full_noise) {
  const char* op = "small_nll";
  const int64_t core = full_noise ? 2 : 1;
  for (const Tensor* x : {&Y, &M, &K}) check_min_dim(*x, 2, op);
  check_min_dim(noise, core, op);
  for (const Tensor* x : {&M, &K, &noise}) check_alike(Y, *x, op);
  const Sizes inputs = broadcast(batch_sizes(Y, 2), batch_sizes(M, 2), op);
  return broadcast(inputs, broadcast(batch_sizes(K, 2), batch_sizes(noise, core), op), op);
}

inline SmallNll small_nll_of(const Tensor& Y, const Tensor& M, const Tensor& K, const Tensor& noise,
                             bool full_noise, const Sizes& batch, int64_t largest_T) {
  const char* op = "small_nll";
  const int64_t core = full_noise ? 2 : 1;
  const auto stride = [](const Tensor& x, int64_t from_end) {
    return x.stride(x.dim() - from_end);
  };
  const auto is = [](const Tensor& x, int64_t rows, int64_t cols) {
    return x.size(x.dim() - 2) == rows && x.size(x.dim() - 1) == cols;
  };
  SmallNll s;
  s.T = Y.size(Y.dim() - 2);
  s.D = Y.size(Y.dim() - 1);
  s.full_noise = full_noise;
  check(s.T <= largest_T && s.D >= 1 && s.D <= kMaxSmallD, op, ": too large");
  check(is(M, s.T, s.T) && is(K, s.D, s.D), op, ": Y, M and K do not fit");
  check(noise.size(noise.dim() - 1) == s.D, op, ": the noise does not fit");
  check(!full_noise || is(noise, s.D, s.D), op, ": the noise does not fit");
  s.y_row = stride(Y, 2), s.y_col = stride(Y, 1);
  s.m_row = stride(M, 2), s.m_col = stride(M, 1);
  s.k_row = stride(K, 2), s.k_col = stride(K, 1);
  s.noise_row = stride(noise, core), s.noise_col = stride(noise, 1);
  s.y_batch = batch_layout(Y, 2, batch);
  s.m_batch = batch_layout(M, 2, batch);
  s.k_batch = batch_layout(K, 2, batch);
  s.noise_batch = batch_layout(noise, core, batch);
  return s;
}

struct SmallResults {
  Tensor nll, gy, gm, gk, gnoise, status;

  // The gradients are empty where they are not asked for.
  SmallResults(const SmallNll& s, const Tensor& Y, const Sizes& batch, bool gradients)
      : nll(torch::stable::new_empty(Y, batch)),
        gy(gradient(Y, batch, gradients, {s.T, s.D})),
        gm(gradient(Y, batch, gradients, {s.T, s.T})),
        gk(gradient(Y, batch, gradients, {s.D, s.D})),
        gnoise(s.full_noise ? gradient(Y, batch, gradients, {s.D, s.D})
                            : gradient(Y, batch, gradients, {s.D})),
        status(torch::stable::new_empty(Y, batch, ScalarType::Long)) {}

  template <typename T>
  SmallTensors<T> data(const Tensor& Y, const Tensor& M, const Tensor& K, const Tensor& noise) {
    return {Y.const_data_ptr<T>(),        M.const_data_ptr<T>(),
            K.const_data_ptr<T>(),        noise.const_data_ptr<T>(),
            nll.mutable_data_ptr<T>(),    gy.mutable_data_ptr<T>(),
            gm.mutable_data_ptr<T>(),     gk.mutable_data_ptr<T>(),
            gnoise.mutable_data_ptr<T>(), status.mutable_data_ptr<int64_t>()};
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> as_tuple() const {
    return {nll, gy, gm, gk, gnoise, status};
  }

 private:
  static Tensor gradient(const Tensor& Y, const Sizes& batch, bool wanted,
                         std::initializer_list<int64_t> core) {
    return torch::stable::new_empty(Y, wanted ? concat(batch, core) : Sizes{0});
  }
};

inline Sizes whiten_small_batch(const Tensor& K, const Tensor& noise, bool full_noise) {
  const char* op = "whiten_small";
  const int64_t core = full_noise ? 2 : 1;
  check_min_dim(K, 2, op);
  check_min_dim(noise, core, op);
  check_alike(K, noise, op);
  const int64_t D = K.size(K.dim() - 1);
  check(D >= 1 && D <= kMaxSmallD, op, ": too large");
  check(K.size(K.dim() - 2) == D && noise.size(noise.dim() - 1) == D &&
            noise.size(noise.dim() - core) == D,
        op, ": K and the noise do not fit");
  return broadcast(batch_sizes(K, 2), batch_sizes(noise, core), op);
}

inline WhitenSmall whiten_small_of(const Tensor& K, const Tensor& noise, bool full_noise,
                                   const Sizes& batch) {
  const int64_t core = full_noise ? 2 : 1;
  WhitenSmall w;
  w.D = K.size(K.dim() - 1);
  w.full_noise = full_noise;
  w.k_row = K.stride(K.dim() - 2), w.k_col = K.stride(K.dim() - 1);
  w.noise_row = noise.stride(noise.dim() - core), w.noise_col = noise.stride(noise.dim() - 1);
  w.k_batch = batch_layout(K, 2, batch);
  w.noise_batch = batch_layout(noise, core, batch);
  w.own_noise_batch = batch_layout(noise, core, batch_sizes(noise, core));
  return w;
}

inline Sizes shifted_batch(const Tensor& M, const Tensor& lam) {
  const char* op = "shifted_cholesky";
  check_min_dim(M, 2, op);
  check_min_dim(lam, 1, op);
  check_alike(M, lam, op);
  check(M.size(M.dim() - 1) == M.size(M.dim() - 2), op, ": M is not square");
  check(M.size(M.dim() - 1) <= std::numeric_limits<int>::max(), op, ": too large");
  return broadcast(batch_sizes(M, 2), batch_sizes(lam, 1), op);
}

// M is symmetric: the roles of rows and columns are exchanged where its columns are contiguous.
inline ShiftedCholesky shifted_cholesky_of(const Tensor& M, const Tensor& lam, const Sizes& batch) {
  ShiftedCholesky c;
  c.T = M.size(M.dim() - 1);
  c.n = lam.size(lam.dim() - 1);
  c.m_row = M.stride(M.dim() - 2);
  c.m_col = M.stride(M.dim() - 1);
  if (c.m_row == 1) std::swap(c.m_row, c.m_col);
  c.lam_stride = lam.stride(lam.dim() - 1);
  c.m_batch = batch_layout(M, 2, batch);
  c.lam_batch = batch_layout(lam, 1, batch);
  return c;
}

}  // namespace torch_kronlik
