#pragma once

// Linear algebra on several small symmetric positive definite matrices at once, one in each lane of
// a vector. A lower triangle is stored in 4×4 tiles, tile row by tile row and each tile by columns,
// so that the columns of a tile row lie side by side; what a size lacks to a multiple of four are
// rows of the identity.

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

// sum_rc += Σ_q a_rq b_cq over a tile each, with the strides of a's r and q, b's c and q.
template <int kAr, int kAq, int kBc, int kBq, typename V>
KRON_HD void add_product(V (&sum)[kTile][kColumns<V>], const V* a, const V* b) {
#pragma GCC unroll 4
  for (int q = 0; q < kTile; ++q) {
#pragma GCC unroll 4
    for (int r = 0; r < kTile; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < kColumns<V>; ++c) {
        sum[r][c] += a[r * kAr + q * kAq] * b[c * kBc + q * kBq];
      }
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
      V* own = C + tile_at(I, J);
      for (int r0 = 0; r0 < kTile; r0 += kColumns<V>) {
        Columns<V> x = {};  // transposed: rows of the tile are columns of x
        for (int64_t q = 0; q < J; ++q) {
          add_product<1, 4, 1, 4>(x, C + tile_at(J, q), C + tile_at(I, q) + r0);
        }
        for (int c = 0; c < kTile; ++c) {
          for (int r = 0; r < kColumns<V>; ++r) x[c][r] = own[c * kTile + r0 + r] - x[c][r];
        }
        if (J < I) solve_tile(C + tile_at(J, J), x);
        for (int c = 0; c < kTile; ++c) {
          for (int r = 0; r < kColumns<V>; ++r) own[c * kTile + r0 + r] = x[c][r];
        }
      }
    }
    factor_tile(C + tile_at(I, I));
  }
}

// L -> L⁻¹ in place: X_IJ = L_II⁻¹ (δ_IJ - Σ_{J≤K<I} L_IK X_KJ).
template <typename V>
KRON_HD void invert(V* C, int64_t N) {
  for (int64_t I = 0; I < N; ++I) {
    for (int64_t J = 0; J <= I; ++J) {
      V found[kTileSize];  // L_IJ is read until the whole of X_IJ is known
      for (int c0 = 0; c0 < kTile; c0 += kColumns<V>) {
        Columns<V> x = {};
        for (int64_t K = J; K < I; ++K) {
          add_product<1, 4, 4, 1>(x, C + tile_at(I, K), C + tile_at(K, J) + c0 * kTile);
        }
        for (int r = 0; r < kTile; ++r) {
          for (int c = 0; c < kColumns<V>; ++c) {
            x[r][c] = (I == J && r == c0 + c ? V{} + 1 : V{}) - x[r][c];
          }
        }
        solve_tile(C + tile_at(I, I), x);
        for (int r = 0; r < kTile; ++r) {
          for (int c = 0; c < kColumns<V>; ++c) found[(c0 + c) * kTile + r] = x[r][c];
        }
      }
      for (int e = 0; e < kTileSize; ++e) C[tile_at(I, J) + e] = found[e];
    }
  }
}

// X -> XᵀX in place for a lower triangular X, tiles on the diagonal in full: the tiles of row I are
// last read for that row, X_II for its last tile.
template <typename V>
KRON_HD void gram(V* C, int64_t N) {
  for (int64_t I = 0; I < N; ++I) {
    for (int64_t J = 0; J <= I; ++J) {
      V found[kTileSize];
      for (int c0 = 0; c0 < kTile; c0 += kColumns<V>) {
        Columns<V> x = {};
        for (int64_t K = I; K < N; ++K) {
          add_product<4, 1, 4, 1>(x, C + tile_at(K, I), C + tile_at(K, J) + c0 * kTile);
        }
        for (int r = 0; r < kTile; ++r) {
          for (int c = 0; c < kColumns<V>; ++c) found[(c0 + c) * kTile + r] = x[r][c];
        }
      }
      for (int e = 0; e < kTileSize; ++e) C[tile_at(I, J) + e] = found[e];
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

// x = L⁻ᵀ w, with L⁻¹ in C.
template <typename V>
KRON_HD void back_multiply(const V* C, const V* w, V* x, int64_t N) {
  for (int64_t J = 0; J < N; ++J) {
    V sum[kTile] = {};
    for (int64_t I = J; I < N; ++I) {
      for (int r = 0; r < kTile; ++r) {
        for (int c = 0; c < kTile; ++c) {
          sum[c] += C[tile_at(I, J) + c * kTile + r] * w[I * kTile + r];
        }
      }
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
