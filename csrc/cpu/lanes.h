#pragma once

// Linear algebra on several small symmetric positive definite matrices at once, one in each lane of
// a vector. Lower triangles are stored in 4×4 tiles, and what a size lacks to a multiple of four
// are rows of the identity. C and L: tile row by tile row, each tile by columns. L⁻¹: tile column
// by tile column, each tile by rows. So all sums run along two panels, four entries by four.

#include <cmath>
#include <cstdint>
#include <memory>
#include <new>

#include "../macros.h"

namespace torch_kronlik {

// The bytes of this machine's vector registers.
inline int vector_bytes() {
#if KRON_HAS_CLONES
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return 64;
  if (__builtin_cpu_supports("x86-64-v3")) return 32;
#endif
  return 16;
}

template <typename T, int kBytes>
struct LanesOf {
  typedef T type __attribute__((vector_size(kBytes)));
};

// Uninitialised vectors. Compilers align them for the target of the function at hand, which here is
// not the one that allocates.
template <typename V>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<V*>(::operator new(size * sizeof(V), std::align_val_t{64}))) {}
  V& operator[](int64_t at) const { return data_.get()[at]; }
  V* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(V* data) const { ::operator delete(data, std::align_val_t{64}); }
  };
  std::unique_ptr<V, Free> data_;
};

constexpr int kTile = 4, kTileSize = kTile * kTile;

constexpr int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }

// The multiple of four that n is stored as.
constexpr int64_t padded(int64_t n) { return tiles_of(n) * kTile; }

// Where tile (I, J), J ≤ I, starts; with tile_at(N, 0) entries N tile rows are stored.
constexpr int64_t tile_at(int64_t I, int64_t J) { return (I * (I + 1) / 2 + J) * kTileSize; }

// The same in storage by tile columns, of which there are N.
constexpr int64_t column_at(int64_t J, int64_t N) { return (J * N - J * (J - 1) / 2) * kTileSize; }

// Where the entry (i, k), k ≤ i, is.
constexpr int64_t entry_at(int64_t i, int64_t k) {
  return tile_at(i / kTile, k / kTile) + k % kTile * kTile + i % kTile;
}

// Columns of a tile that are worked on together: their sums stay in the 32 registers that there are
// for vectors of 64 bytes, and in the 16 for others.
template <typename V>
constexpr int kColumns = sizeof(V) == 64 ? 4 : 2;

template <typename V>
using Columns = V[kTile][kColumns<V>];

// x_rc = Σ_q a_qr b_qc over panels of so many tiles.
template <typename V>
KRON_HD void multiply_panels(const V* a, const V* b, int64_t tiles, V (&x)[kTile][kColumns<V>]) {
#pragma GCC unroll 4
  for (int r = 0; r < kTile; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns<V>; ++c) x[r][c] = V{};
  }
  for (int64_t q = 0; q < tiles * kTileSize; q += kTile) {
#pragma GCC unroll 4
    for (int r = 0; r < kTile; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < kColumns<V>; ++c) x[r][c] += a[q + r] * b[q + c];
    }
  }
}

// x <- L⁻¹ x for a tile L with 1 / L_ii on its diagonal.
template <typename V>
KRON_HD void solve_tile(const V* L, V (&x)[kTile][kColumns<V>]) {
#pragma GCC unroll 4
  for (int r = 0; r < kTile; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns<V>; ++c) {
#pragma GCC unroll 4
      for (int k = 0; k < r; ++k) x[r][c] -= L[k * kTile + r] * x[k][c];
      x[r][c] *= L[r * kTile + r];
    }
  }
}

template <typename V>
KRON_HD void inverse_root(V& x) {
  for (unsigned l = 0; l < sizeof(V) / sizeof(x[0]); ++l) x[l] = 1 / std::sqrt(x[l]);
}

// The tile C = L Lᵀ in place, 1 / L_ii on the diagonal and zeros above it; a pivot that is not
// positive turns into a NaN.
template <typename V>
KRON_HD void factor_tile(V* C) {
  for (int k = 0; k < kTile; ++k) {
    for (int r = 0; r < k; ++r) C[k * kTile + r] = V{};
    for (int r = k; r < kTile; ++r) {
      for (int q = 0; q < k; ++q) C[k * kTile + r] -= C[q * kTile + r] * C[q * kTile + k];
    }
    inverse_root(C[k * kTile + k]);
    for (int r = k + 1; r < kTile; ++r) C[k * kTile + r] *= C[k * kTile + k];
  }
}

// C = L Lᵀ in place, with 1 / L_ii on the diagonal.
template <typename V>
KRON_HD void cholesky(V* C, int64_t N) {
  for (int64_t I = 0; I < N; ++I) {
    for (int64_t J = 0; J <= I; ++J) {
      for (int r0 = 0; r0 < kTile; r0 += kColumns<V>) {
        V* own = C + tile_at(I, J) + r0;
        Columns<V> x;  // L_IJ's transpose
        multiply_panels(C + tile_at(J, 0), C + tile_at(I, 0) + r0, J, x);
        for (int c = 0; c < kTile; ++c) {
          for (int r = 0; r < kColumns<V>; ++r) x[c][r] = own[c * kTile + r] - x[c][r];
        }
        if (J < I) solve_tile(C + tile_at(J, J), x);
        for (int c = 0; c < kTile; ++c) {
          for (int r = 0; r < kColumns<V>; ++r) own[c * kTile + r] = x[c][r];
        }
      }
    }
    factor_tile(C + tile_at(I, I));
  }
}

// X = L⁻¹: X_IJ = L_II⁻¹ (δ_IJ - Σ_{J≤K<I} L_IK X_KJ).
template <typename V>
KRON_HD void invert(const V* L, int64_t N, V* X) {
  for (int64_t J = 0; J < N; ++J) {
    V* column = X + column_at(J, N);
    for (int64_t I = J; I < N; ++I) {
      for (int c0 = 0; c0 < kTile; c0 += kColumns<V>) {
        V* own = column + (I - J) * kTileSize + c0;
        Columns<V> x;
        multiply_panels(L + tile_at(I, J), column + c0, I - J, x);
        for (int r = 0; r < kTile; ++r) {
          for (int c = 0; c < kColumns<V>; ++c) {
            x[r][c] = (I == J && r == c0 + c ? V{} + 1 : V{}) - x[r][c];
          }
        }
        solve_tile(L + tile_at(I, I), x);
        for (int r = 0; r < kTile; ++r) {
          for (int c = 0; c < kColumns<V>; ++c) own[r * kTile + c] = x[r][c];
        }
      }
    }
  }
}

// C = XᵀX for X = L⁻¹, its tiles on the diagonal in full.
template <typename V>
KRON_HD void gram(const V* X, int64_t N, V* C) {
  for (int64_t I = 0; I < N; ++I) {
    for (int64_t J = 0; J <= I; ++J) {
      const V* other = X + column_at(J, N) + (I - J) * kTileSize;
      for (int c0 = 0; c0 < kTile; c0 += kColumns<V>) {
        V* own = C + tile_at(I, J) + c0 * kTile;
        Columns<V> x;
        multiply_panels(X + column_at(I, N), other + c0, N - I, x);
        for (int r = 0; r < kTile; ++r) {
          for (int c = 0; c < kColumns<V>; ++c) own[c * kTile + r] = x[r][c];
        }
      }
    }
  }
}

// w <- L⁻¹ w by substitution, on L with 1 / L_ii on its diagonal.
template <typename V>
KRON_HD void substitute(const V* C, V* w, int64_t N) {
  for (int64_t I = 0; I < N; ++I) {
    V* own = w + I * kTile;
    const V* L = C + tile_at(I, 0);
    V sum[kTile] = {};
    for (int64_t q = 0; q < I * kTile; ++q) {
      for (int r = 0; r < kTile; ++r) sum[r] += L[q * kTile + r] * w[q];
    }
    L += I * kTileSize;
    for (int r = 0; r < kTile; ++r) {
      own[r] -= sum[r];
      for (int k = 0; k < r; ++k) own[r] -= L[k * kTile + r] * own[k];
      own[r] *= L[r * kTile + r];
    }
  }
}

// x = Xᵀ w for X = L⁻¹.
template <typename V>
KRON_HD void back_multiply(const V* X, const V* w, V* x, int64_t N) {
  for (int64_t J = 0; J < N; ++J) {
    const V* column = X + column_at(J, N);
    V sum[kTile] = {};
    for (int64_t q = 0; q < (N - J) * kTile; ++q) {
      for (int c = 0; c < kTile; ++c) sum[c] += column[q * kTile + c] * w[J * kTile + q];
    }
    for (int c = 0; c < kTile; ++c) x[J * kTile + c] = sum[c];
  }
}

// out = M x for a symmetric M, tiles on the diagonal in full.
template <typename V>
KRON_HD void multiply(const V* M, const V* x, V* out, int64_t N) {
  for (int64_t I = 0; I < N; ++I) {
    V sum[kTile] = {};
    for (int64_t J = 0; J <= I; ++J) {
      const V* tile = M + tile_at(I, J);
      for (int c = 0; c < kTile; ++c) {
        V column = {};
        for (int r = 0; r < kTile; ++r) {
          sum[r] += tile[c * kTile + r] * x[J * kTile + c];
          column += tile[c * kTile + r] * x[I * kTile + r];
        }
        if (J < I) out[J * kTile + c] += column;
      }
    }
    for (int r = 0; r < kTile; ++r) out[I * kTile + r] = sum[r];
  }
}

}  // namespace torch_kronlik
