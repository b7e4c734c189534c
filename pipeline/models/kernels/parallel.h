// Threads, their scratch memory, and sums over pixels that have the same bits in every run.
//
// Each thread works on one contiguous range of the pixels and keeps its own sums; these are added in the order of the
// threads. So a result depends on the number of threads, but not on which of them was faster.
#pragma once

#include <omp.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "gemm.h"

namespace dense {

struct Range {
  long begin, end;
};

inline Range share(long items, int thread, int threads) {
  return {items * thread / threads, items * (thread + 1) / threads};
}

template <class Body> void parallel(long threads, Body body) {
#pragma omp parallel num_threads(threads)
  {
    body(omp_get_thread_num(), omp_get_num_threads());
#if defined(MATRIX_UNIT)
    release_tiles();
#endif
  }
}

inline void wait_for_all_threads() {
#pragma omp barrier
}

// Memory on cache lines, its contents undefined.
template <class T> class Buffer {
 public:
  explicit Buffer(long count) : data_(static_cast<T*>(std::aligned_alloc(64, round_up(count * sizeof(T) + 1, 64)))) {
    if (!data_) throw std::bad_alloc();
#if defined(FILL_SCRATCH_WITH_NAN)  // by the tests: what a kernel reads before it has written it shows
    std::memset(data_, 0xff, round_up(count * sizeof(T) + 1, 64));
#endif
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  operator T*() const { return data_; }

 private:
  T* data_;
};

// An `Item` of each thread, made before the threads start: within a parallel region a lack of memory could not be told to
// the caller, it would end the process.
template <class Item> class PerThread {
 public:
  template <class... Arguments> explicit PerThread(long threads, Arguments... arguments) {
    for (long i = 0; i < threads; i++) items_.push_back(std::make_unique<Item>(arguments...));
  }
  Item& operator[](int thread) { return *items_[thread]; }

 private:
  std::vector<std::unique_ptr<Item>> items_;
};

// Coefficients of channels, filled up with zeros to whole vectors.
template <class T> class Padded : public Buffer<T> {
 public:
  explicit Padded(long count) : Buffer<T>(padded<T>(count)) { std::fill_n(*this + 0, padded<T>(count), T(0)); }
  Padded(const T* source, long count) : Padded(count) { std::copy_n(source, count, *this + 0); }
};

// Mean and variance of each channel over pixels that come tile by tile, merged as Chan, Golub and LeVeque (1979) do:
// exact to rounding however far the mean lies from zero.
template <class T> class Moments {
 public:
  explicit Moments(long channels)
      : channels_(channels), mean_(channels), squares_(channels), tile_(2 * padded<T>(channels)) {}

  // Take in the pixels x [rows][ld].
  template <class S> void add(const S* x, long ld, long rows) {
    long c = 0;
    for (; c + 4 * LANES<T> <= channels_; c += 4 * LANES<T>) add_columns<4>(x, ld, rows, c);
    for (; c < channels_; c += LANES<T>) add_columns<1>(x, ld, rows, c);
    merge(tile_.data(), tile_.data() + padded<T>(channels_), rows);
  }

  void add(const Moments& other) {
    if (other.count_ > 0) merge(other.mean_.data(), other.squares_.data(), other.count_);
  }

  // Mean and biased variance.
  void write(T* mean, T* variance) const {
    for (long c = 0; c < channels_; c++) {
      mean[c] = mean_[c];
      variance[c] = squares_[c] / count_;
    }
  }

 private:
  template <int vectors, class S> void add_columns(const S* x, long ld, long rows, long c) {
    Vector<T> mean[vectors] = {}, squares[vectors] = {};
    for (long r = 0; r < rows; r++)
      for (int i = 0; i < vectors; i++) mean[i] += load(x + r * ld + c + i * LANES<T>, channels_ - c);
    for (int i = 0; i < vectors; i++) mean[i] /= T(rows);
    for (long r = 0; r < rows; r++)
      for (int i = 0; i < vectors; i++) {
        const Vector<T> deviation = load(x + r * ld + c + i * LANES<T>, channels_ - c) - mean[i];
        squares[i] += deviation * deviation;
      }
    for (int i = 0; i < vectors; i++) {
      store(&tile_[c + i * LANES<T>], mean[i]);
      store(&tile_[padded<T>(channels_) + c + i * LANES<T>], squares[i]);
    }
  }

  template <class U> void merge(const U* mean, const U* squares, double count) {
    const double all = count_ + count, part = count / all, between = count_ * part;
    for (long c = 0; c < channels_; c++) {
      const double difference = mean[c] - mean_[c];
      mean_[c] += difference * part;
      squares_[c] += squares[c] + difference * difference * between;
    }
    count_ = all;
  }

  long channels_;
  std::vector<double> mean_, squares_;
  double count_ = 0;
  std::vector<T> tile_;
};

template <class T> void write_moments(const std::vector<Moments<T>>& parts, T* mean, T* variance) {
  Moments<T> all = parts[0];
  for (size_t i = 1; i < parts.size(); i++) all.add(parts[i]);
  all.write(mean, variance);
}

// The sums over pixels of a batch norm's backward pass, sum dz and sum dz (x - mean), of each channel.
template <class T> struct BackwardSums {
  explicit BackwardSums(long channels) : sum(padded<T>(channels)), centred_sum(padded<T>(channels)) {}

  // Add a few rows' sums of a vector of channels.
  void add(long channel, Vector<T> dz, Vector<T> centred) {
    for (long i = 0; i < LANES<T>; i++) {
      sum[channel + i] += dz[i];
      centred_sum[channel + i] += centred[i];
    }
  }

  std::vector<double> sum, centred_sum;
};

template <class T>
void write_sums(const std::vector<BackwardSums<T>>& parts, long channels, double* sum, double* centred_sum) {
  for (long c = 0; c < channels; c++) {
    sum[c] = centred_sum[c] = 0;
    for (const auto& part : parts) {
      sum[c] += part.sum[c];
      centred_sum[c] += part.centred_sum[c];
    }
  }
}

}  // namespace dense
