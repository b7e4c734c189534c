// From files to the network's input on CPU: read, decode the pixels that the filter touches, resize, flip, cut the views
// and map the colours, an image at a time. Any number of threads take images from the same batch (`native_run`).
//
// Vectors have 16 lanes, which the compiler splits where registers are shorter. Sources: the border rule is that of
// torch/image, generic/image.c, scaleCubic_rowcol; Pillow's fixed-point arithmetic that of libImaging/Resample.c.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

using std::vector;
typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint8_t B __attribute__((vector_size(16)));
typedef uint16_t H __attribute__((vector_size(32)));

enum Filter { TORCH7, BILINEAR, BICUBIC };
enum Stage { READ, DECODE, ALL };
static const size_t HUGE_BYTES = 32 << 20;  // of one buffer of a thread
static const int AHEAD = 4;  // images that a thread has asked the disk for, of which it works on the first

extern "C" {
// n images with V views each; `Batch` of native.py has the same fields.
struct Batch {
  int64_t n, views, crop, channels, filter, bfloat16;
  int64_t last;                                    // the stage after which to stop: what each costs can so be measured
  int64_t next;                                    // the first image that no thread has taken
  const char* const* paths;                        // of the images' files, or null: `files`
  const int32_t* files;                            // open files; -1: Python reads this image
  const uint8_t* array;                            // the pixels of a data set in memory, or null: it is in files
  int64_t width, colors;                           // of its images; 1 colour or 3
  const int64_t *positions, *lengths;              // the bytes of an image in its file, or in the array
  const int32_t *boxes, *sizes, *corners;          // (n, 4), (n, 2) and (n, V, 2), as in BatchPlan
  const uint8_t* hflip;                            // (n, V)
  const float *color, *mean_color, *shift;         // (n, 3, 3), (n, 3, 3) and (n, 3); of one channel in the first row
  float around[3];                                 // the colour outside of an image, in [0, 1]
  void* out;                                       // (n, V, crop, crop, channels) float32 or bfloat16
};

// Images that a thread has taken and not yet worked on.
struct Claims {
  int64_t count, images[AHEAD];
  int32_t files[AHEAD];
};
}

template <class V, class T> static inline V load(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

// 16 numbers of another type: GCC 12 takes __builtin_convertvector apart between widths, but makes one instruction of this.
template <class V, class T> static inline V convert(const T* p) {
  V v;
  std::remove_reference_t<decltype(v[0])> to[16];
  for (int i = 0; i < 16; i++) to[i] = p[i];
  memcpy(&v, to, sizeof v);
  return v;
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC has __builtin_shufflevector from version 12 on
template <class V> struct MaskOf { typedef I type; };
template <> struct MaskOf<B> { typedef B type; };
template <> struct MaskOf<H> { typedef H type; };
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, typename MaskOf<V>::type{__VA_ARGS__})
#endif

// r[i][j] = r[j][i]: four perfect shuffles.
template <class V> static inline void transpose(V* r) {
  V t[16];
  auto step = [](const V* a, V* b) {
    for (int i = 0; i < 8; i++) {
      b[2 * i] = SHUFFLE(a[i], a[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      b[2 * i + 1] = SHUFFLE(a[i], a[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
  };
  step(r, t), step(t, r), step(r, t), step(t, r);
}

// Where an image's views lie in the resized image: the rows [y0, y1) and columns [x0, x1) that they need, one pixel at
// least, and of those the part that the first view sees.
struct Window {
  int y0, y1, x0, x1;
  int first_y0, first_y1, first_x0, first_x1;
  bool inside;  // no view reaches beyond the image
};

static Window window_of(const Batch& b, long i) {
  const int height = b.sizes[2 * i], width = b.sizes[2 * i + 1], crop = b.crop;
  Window w{height, 0, width, 0, 0, 0, 0, 0, true};
  for (long v = 0; v < b.views; v++) {
    const int top = b.corners[2 * (i * b.views + v)], left = b.corners[2 * (i * b.views + v) + 1];
    const int y0 = std::max(top, 0), y1 = std::min(top + crop, height), x0 = std::max(left, 0), x1 = std::min(left + crop, width);
    w.inside = w.inside && y1 - y0 == crop && x1 - x0 == crop;
    if (v == 0 && y0 < y1 && x0 < x1) w.first_y0 = y0, w.first_y1 = y1, w.first_x0 = x0, w.first_x1 = x1;
    w.y0 = std::min(w.y0, y0), w.y1 = std::max(w.y1, y1), w.x0 = std::min(w.x0, x0), w.x1 = std::max(w.x1, x1);
  }
  w.y0 = std::min(w.y0, height - 1), w.x0 = std::min(w.x0, width - 1);
  w.y1 = std::max(w.y1, w.y0 + 1), w.x1 = std::max(w.x1, w.x0 + 1);
  return w;
}

// Output i of an axis is the sum of `count` source pixels from start[i] on, weighted.
template <class T> struct Taps {
  int count = 0, begin = 0, end = 0;  // source pixels touched by any output: [begin, end)
  vector<int> start;
  vector<T> weights;
};

#ifdef __clang__
#pragma clang fp contract(off)
#else  // the weights to the bit, as Pillow's and the reference's
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

// Torch7's Catmull-Rom between aligned corners, going on linearly beyond the border; outputs [first, end) of `size`.
static Taps<float> torch7_taps(int length, int size, int first, int end) {
  Taps<float> taps;
  taps.count = 4;
  for (int i = first; i < end; i++) {
    double w[4] = {};  // of the pixels left - 1 to left + 2
    int left = i;
    if (length == 1) {
      left = 0, w[1] = 1;
    } else if (size == length) {
      w[1] = 1;
    } else {
      const double at = i * ((length - 1) / std::max(size - 1.0, 1.0));
      left = std::min(int(at), length - 2);
      const double t = at - left, t2 = t * t, t3 = t2 * t;
      w[0] = (-t + 2 * t2 - t3) / 2, w[1] = (2 - 5 * t2 + 3 * t3) / 2;
      w[2] = (t + 4 * t2 - 3 * t3) / 2, w[3] = (t3 - t2) / 2;
      if (left + 2 == length) w[2] += 2 * w[3], w[1] -= w[3], w[3] = 0;  // x[n] = 2 x[n-1] - x[n-2]
      if (left == 0) w[1] += 2 * w[0], w[2] -= w[0], w[0] = 0;           // x[-1] = 2 x[0] - x[1]
    }
    const int start = std::max(0, std::min(left - 1, length - 4));
    taps.start.push_back(start);
    for (int k = 0; k < 4; k++) {
      const int j = start + k - (left - 1);
      taps.weights.push_back(j >= 0 && j < 4 ? w[j] : 0);
    }
    taps.begin = i == first ? start : std::min(taps.begin, start);
    taps.end = std::min(length, std::max(taps.end, start + 4));
  }
  return taps;
}

static double pillow_filter(double x, bool cubic) {
  const double a = -0.5;
  x = std::fabs(x);
  if (!cubic) return x < 1 ? 1 - x : 0;
  return x < 1 ? ((a + 2) * x - (a + 3)) * x * x + 1 : x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

// Pillow's antialiased filters, weights in units of 2^-22; outputs [first, end) of `size`.
static Taps<int> pillow_taps(int length, int size, int first, int end, bool cubic) {
  const double scale = double(length) / size, wide = std::max(scale, 1.0), support = (cubic ? 2.0 : 1.0) * wide;
  const double inverse = 1.0 / wide;
  Taps<int> taps;
  taps.count = std::min(int(std::ceil(support)) * 2 + 1, length);
  vector<double> w;
  for (int i = first; i < end; i++) {
    const double centre = (i + 0.5) * scale;
    const int low = std::max(int(centre - support + 0.5), 0), high = std::min(int(centre + support + 0.5), length);
    w.assign(high - low, 0);
    double sum = 0;
    for (int k = 0; k < high - low; k++) sum += w[k] = pillow_filter((k + low - centre + 0.5) * inverse, cubic);
    const int start = std::min(low, length - taps.count);
    taps.start.push_back(start);
    for (int k = 0; k < taps.count; k++) {
      const int j = start + k - low;
      const double v = j < 0 || j >= high - low ? 0 : sum != 0 ? w[j] / sum : w[j];
      taps.weights.push_back(int((v < 0 ? -0.5 : 0.5) + v * (1 << 22)));
    }
    taps.begin = i == first ? start : std::min(taps.begin, start);
    taps.end = std::max(taps.end, start + taps.count);
  }
  return taps;
}
#ifndef __clang__
#pragma GCC pop_options
#endif

static const int PAD = 48;  // lanes before and behind a row of the intermediate image, and behind decoded pixels

// RGB bytes; 48 more before the first and behind the last row may be read.
struct Pixels {
  const uint8_t* at;
  long stride, rows, width;
};

// At least `size` elements that a thread keeps, but for those of a few huge images. What they hold is left over.
template <class T> static T* room(vector<T>& kept, size_t size) {
  if (kept.size() * sizeof(T) > HUGE_BYTES && size < kept.size() / 4) vector<T>().swap(kept);
  if (kept.size() < size) kept.resize(size);
  return kept.data();
}

// Resize along rows: 16 source rows in the lanes, so that taps are plain loads; then back to rows. `map` is given the first
// source row, the output, and its three colours of 16 rows, and makes of these what is stored.
template <int COUNT, class V, class T, class M, class Map>
static void across(Pixels in, const Taps<T>& taps, int n, bool mirror, M* out, long ld, Map map) {
  static thread_local vector<V> kept;
  V* columns = room(kept, 3 * (in.width + 4) + 16);
  std::fill(columns + 3 * in.width, columns + 3 * (in.width + 4) + 16, V{});
  const int count = COUNT ? COUNT : taps.count;
  for (long r = 0; r < in.rows; r += 16) {
    long ready = 0;
    const uint8_t* lines[16];
    for (int i = 0; i < 16; i++) lines[i] = in.at + std::min(r + i, in.rows - 1) * in.stride;
    for (int x0 = 0; x0 < n; x0 += 16) {
      V tile[48];
      for (int x = x0; x < std::min(x0 + 16, n); x++) {
        const long from = 3 * (taps.start[x] - taps.begin);
        for (; ready < std::min(from + 3 * count, 3 * in.width); ready += 16) {
          B block[16] = {};
          const long some = std::min(16L, 3 * in.width - ready);
          for (int i = 0; i < 16; i++)
            if (some == 16) block[i] = load<B>(lines[i] + ready);
            else memcpy(&block[i], lines[i] + ready, some);
          transpose(block);
          for (int i = 0; i < 16; i++)
            columns[ready + i] = __builtin_convertvector(convert<I>(reinterpret_cast<const uint8_t*>(block + i)), V);
        }
        V sum[3] = {};
        for (int k = 0; k < count; k++)
          for (int c = 0; c < 3; c++) sum[c] += columns[from + 3 * k + c] * taps.weights[x * count + k];
        map(r, x, sum, tile + 3 * (mirror ? 15 - (x - x0) : x - x0));
      }
      M* to = out + r * ld + PAD + 3 * (mirror ? n - 16 - x0 : x0);
      for (int c = 0; c < 3; c++) {
        transpose(tile + 16 * c);
        for (int i = 0; i < 16 && r + i < in.rows; i++) {
          typedef M Row __attribute__((vector_size(16 * sizeof(M))));
          const Row row = convert<Row>(reinterpret_cast<const T*>(tile + 16 * c + i));
          memcpy(to + i * ld + 16 * c, &row, sizeof row);
        }
      }
    }
  }
}

// Resize along columns to output row y, lanes along a row of `wide` numbers, from `first` on, which repeats after 48; `store`
// takes 16 numbers, or fewer at the end of a row.
template <int COUNT, class V, class T, class M, class Out, class Store>
static inline void down(const M* in, long ld, const Taps<T>& taps, int y, long wide, const V* first, Out* out, Store store) {
  const int count = COUNT ? COUNT : taps.count;
  const T* weights = taps.weights.data() + y * count;
  V weight[COUNT ? COUNT : 1];
  for (int k = 0; k < COUNT; k++) weight[k] = V{} + weights[k];  // before the stores, which might change them
  in += (taps.start[y] - taps.begin) * ld + PAD;
  for (long j = 0; j < wide; j += 48) {
    V sum[3] = {first[0], first[1], first[2]};
    for (int k = 0; k < count; k++)
      for (int c = 0; c < 3; c++) sum[c] += convert<V>(in + k * ld + j + 16 * c) * (COUNT ? weight[k] : V{} + weights[k]);
    for (int c = 0; c < 3 && j + 16 * c < wide; c++) store(out + j + 16 * c, sum[c], std::min(16L, wide - j - 16 * c));
  }
}

// n numbers to a batch, past the caches, from which they would be gone before the network reads them.
template <class Out> static inline void write(Out* to, const Out* from, long n) {
#ifdef __x86_64__
  const long lanes = 16 / sizeof(Out);
  if (reinterpret_cast<uintptr_t>(to) % 16 == 0)
    for (; n >= lanes; n -= lanes, to += lanes, from += lanes)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
  memcpy(to, from, n * sizeof(Out));
}

// As they are stored, of a type that only the pointer tells.
static inline F numbers(const F& v, const float*) { return v; }

static inline H numbers(const F& v, const uint16_t*) {  // bfloat16, ties to even
  const I bits = load<I>(&v), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return convert<H>(reinterpret_cast<const int32_t*>(&rounded));
}

// What stores up to 16 numbers of a row that is used again at once; of a batch; and of an image in Pillow's fixed point, clipped.
static const auto put = [](auto* to, const F& v, long n) {
  const auto row = numbers(v, to);
  if (n == 16) memcpy(to, &row, sizeof row);
  else memcpy(to, &row, n * sizeof *to);
};

static const auto put_away = [](auto* to, const F& v, long n) {
  const auto row = numbers(v, to);
  if (n == 16) write(to, reinterpret_cast<const std::remove_pointer_t<decltype(to)>*>(&row), 16);
  else memcpy(to, &row, n * sizeof *to);
};

static const auto put_bytes = [](uint8_t* to, I v, long n) {
  v >>= 22;
  v = v < 0 ? I{} : v;
  v = v > 255 ? I{} + 255 : v;
  const B row = convert<B>(reinterpret_cast<const int32_t*>(&v));
  if (n == 16) memcpy(to, &row, sizeof row);
  else memcpy(to, &row, n);
};

// The colour map of one image: pixels in 0..255 become A x + `first`, where that is B m + t.
struct Colors {
  float a[9];                    // A / 255
  float first[3], around[3];     // `around`: what a pixel outside of the image becomes
  float periodic[48];            // `first`, sixteen times

  // `sum`: of the first view's pixels inside of the image, of which there are `inside`.
  Colors(const Batch& b, long i, const double* sum, long inside) {
    const float *color = b.color + 9 * i, *mean_color = b.mean_color + 9 * i;
    const double pixels = double(b.crop) * b.crop;
    double mean[3];
    for (int c = 0; c < 3; c++) mean[c] = (sum[c] / 255 + (pixels - inside) * b.around[c]) / pixels;
    for (int c = 0; c < 3; c++) {
      double shift = b.shift[3 * i + c], outside = 0;
      for (int k = 0; k < 3; k++) shift += mean_color[3 * c + k] * mean[k], outside += double(color[3 * c + k]) * b.around[k];
      first[c] = shift, around[c] = shift + outside;
    }
    for (int k = 0; k < 9; k++) a[k] = color[k] / 255;
    for (int l = 0; l < 48; l++) periodic[l] = first[l % 3];
  }
};

// Mirror a row of n pixels, 16 at a time; 48 numbers before the first, and behind the last of `out`, may be touched.
template <class Out> static void turn(const Out* in, Out* out, long n) {
  using V = decltype(numbers(F(), in));
  for (long x = 0; x < n; x += 16) {
    const Out* from = in + 3 * (n - 16 - x);
    const V a = load<V>(from), b = load<V>(from + 16), c = load<V>(from + 32);
    const V middle = SHUFFLE(b, c, 15, 16, 11, 12, 13, 8, 9, 10, 5, 6, 7, 2, 3, 4, 0, 0);
    const V turned[3] = {
        SHUFFLE(b, c, 29, 30, 31, 26, 27, 28, 23, 24, 25, 20, 21, 22, 17, 18, 19, 14),
        SHUFFLE(middle, a, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 31, 15),
        SHUFFLE(a, b, 17, 12, 13, 14, 9, 10, 11, 6, 7, 8, 3, 4, 5, 0, 1, 2),
    };
    memcpy(out + 3 * x, turned, sizeof turned);
  }
}

// Cut the views, row by row of the window: a row is made, and mirrored, once, and stays in the nearest cache while the views
// that see it take their parts. `make` makes row y of the window, of which one view alone is mirrored already.
template <class Out, class Make>
static void cut_views(const Batch& b, long i, const Window& w, const float* around, Out* out, Make make) {
  static thread_local vector<Out> kept;
  const int crop = b.crop, n = w.x1 - w.x0;
  const uint8_t* hflip = b.hflip + b.views * i;
  const bool turning = b.views > 1 && std::any_of(hflip, hflip + b.views, [](uint8_t flip) { return flip; });
  Out *plain = room(kept, 6 * n + 3 * PAD) + PAD, *turned = plain + 3 * n + PAD, outside[3];
  for (int c = 0; c < 3; c++) put(outside + c, F{} + around[c], 1);
  auto surround = [&](Out* to, int pixels) {
    for (int p = 0; p < pixels; p++)
      for (int c = 0; c < 3; c++) to[3 * p + c] = outside[c];
  };
  for (int y = w.y0; y < w.y1; y++) {
    make(y - w.y0, plain);
    if (turning) turn(plain, turned, n);
    for (long v = 0; v < b.views; v++) {
      const int top = b.corners[2 * (i * b.views + v)], left = b.corners[2 * (i * b.views + v) + 1];
      if (y < top || y >= top + crop) continue;
      const int at = hflip[v] ? w.x1 - left - crop : left - w.x0;  // the window's column in the view's first
      const int begin = std::min(std::max(-at, 0), crop), end = std::max(begin, std::min(n - at, crop));
      Out* to = out + 3L * crop * (crop * v + y - top);
      surround(to, begin);
      write(to + 3 * begin, (turning && hflip[v] ? turned : plain) + 3 * (at + begin), 3L * (end - begin));
      surround(to + 3 * end, crop - end);
    }
  }
  for (long v = 0; v < b.views; v++) {
    const int top = b.corners[2 * (i * b.views + v)];
    for (int y = top; y < top + crop; y++)
      if (y < w.y0 || y >= w.y1) surround(out + 3L * crop * (crop * v + y - top), crop);
  }
}

// The colours are mapped between the passes; their mean comes from the first pass's rows and the sums of the second's weights.
template <class Out> static void finish_torch7(const Batch& b, long i, const Window& w, Pixels in, const Taps<float>& y, const Taps<float>& x, Out* out) {
  static thread_local vector<float> kept_middle;
  const int n = w.x1 - w.x0, m = w.y1 - w.y0;
  const long ld = 2 * PAD + 3 * n, rows = std::max(in.rows, 4L);
  float* middle = room(kept_middle, rows * ld + PAD);
  for (long k = in.rows * ld; k < rows * ld; k++) middle[k] = 0;
  vector<float> weight(in.rows + 16);
  for (int r = w.first_y0; r < w.first_y1; r++)
    for (int k = 0; k < 4; k++) weight[std::min<long>(y.start[r - w.y0] - y.begin + k, in.rows)] += y.weights[4 * (r - w.y0) + k];
  std::fill(weight.begin() + in.rows, weight.end(), 0.f);
  float a[9];
  for (int k = 0; k < 9; k++) a[k] = b.color[9 * i + k] / 255;
  F sums[3] = {};
  const int from = w.first_x0 - w.x0, to = w.first_x1 - w.x0;
  const bool one = b.views == 1, mirror = one && b.hflip[i];
  across<4, F>(in, x, n, mirror, middle, ld, [&](long r, int column, const F* s, F* mapped) {
    const F of_row = column >= from && column < to ? load<F>(&weight[r]) : F{};
    for (int c = 0; c < 3; c++) sums[c] += of_row * s[c], mapped[c] = a[3 * c] * s[0] + a[3 * c + 1] * s[1] + a[3 * c + 2] * s[2];
  });
  double sum[3] = {};
  for (int c = 0; c < 3; c++)
    for (int lane = 0; lane < 16; lane++) sum[c] += sums[c][lane];
  const Colors colors(b, i, sum, long(w.first_y1 - w.first_y0) * (w.first_x1 - w.first_x0));
  const F first[3] = {load<F>(colors.periodic), load<F>(colors.periodic + 16), load<F>(colors.periodic + 32)};
  if (one && w.inside)
    for (int r = 0; r < m; r++) down<4>(middle, ld, y, r, 3 * n, first, out + 3L * n * r, put_away);
  else
    cut_views(b, i, w, colors.around, out, [&](int r, Out* row) { down<4>(middle, ld, y, r, 3 * n, first, row, put); });
}

// Pillow 13 goes down first where that saves more than twice as many rows as it saves columns to go across first.
static bool goes_down_first(const int32_t* box, const int32_t* size) {
  return size[0] < box[2] && 2 * (long(box[3]) - size[1]) < long(box[2]) - size[0];
}

// Bytes between and after the passes, as Pillow has them, and then the colours.
template <class Out> static void finish_pillow(const Batch& b, long i, const Window& w, Pixels in, const Taps<int>& y, const Taps<int>& x, Out* out) {
  static thread_local vector<uint8_t> kept_middle, kept_sheet;
  const int n = w.x1 - w.x0, m = w.y1 - w.y0;
  const bool one = b.views == 1, mirror = one && b.hflip[i];
  const long ld = 2 * PAD + 3 * n;
  uint8_t* sheet = room(kept_sheet, m * ld + PAD);
  const I half = I{} + (1 << 21), first[3] = {half, half, half};
  auto clip = [&](long, int, const I* s, I* to) {
    for (int c = 0; c < 3; c++) {
      const I v = (s[c] + half) >> 22, low = v < 0 ? I{} : v;
      to[c] = low > 255 ? I{} + 255 : low;
    }
  };
  if (goes_down_first(b.boxes + 4 * i, b.sizes + 2 * i)) {
    uint8_t* middle = room(kept_middle, 3 * in.width * m);
    for (int r = 0; r < m; r++) down<0>(in.at - PAD, in.stride, y, r, 3 * in.width, first, middle + 3 * in.width * r, put_bytes);
    across<0, I>(Pixels{middle, 3 * in.width, m, in.width}, x, n, mirror, sheet, ld, clip);
  } else {
    uint8_t* middle = room(kept_middle, in.rows * ld + PAD);
    across<0, I>(in, x, n, mirror, middle, ld, clip);
    for (int r = 0; r < m; r++) down<0>(middle, ld, y, r, 3 * n, first, sheet + PAD + ld * r, put_bytes);
  }

  double sum[3] = {};
  const int from = mirror ? w.x1 - w.first_x1 : w.first_x0 - w.x0, wide = w.first_x1 - w.first_x0;
  for (int r = w.first_y0; r < w.first_y1; r++) {
    const uint8_t* row = sheet + (r - w.y0) * ld + PAD + 3 * from;
    int of_row[3] = {};
    for (int p = 0; p < wide; p++) of_row[0] += row[3 * p], of_row[1] += row[3 * p + 1], of_row[2] += row[3 * p + 2];
    for (int c = 0; c < 3; c++) sum[c] += of_row[c];
  }
  const Colors colors(b, i, sum, long(w.first_y1 - w.first_y0) * wide);
  // Lanes along the row: number l of it is the sum over d of factor[d + 2][l % 48] times the byte l + d.
  float factor[5][48];
  bool apart = true;
  for (int d = -2; d <= 2; d++)
    for (int l = 0; l < 48; l++) {
      const int c = l % 3, k = c + d;
      factor[d + 2][l] = k >= 0 && k < 3 ? colors.a[3 * c + k] : 0;
      apart = apart && (d == 0 || factor[d + 2][l] == 0);
    }
  auto map = [&](int r, Out* to, auto store) {
    const uint8_t* row = sheet + r * ld + PAD;
    for (long j = 0; j < 3 * n; j += 48)
      for (long c = 0; c < 3 && j + 16 * c < 3 * n; c++) {
        F v = load<F>(colors.periodic + 16 * c) + load<F>(factor[2] + 16 * c) * convert<F>(row + j + 16 * c);
        if (!apart)
          for (int d : {-2, -1, 1, 2}) v += load<F>(factor[d + 2] + 16 * c) * convert<F>(row + j + 16 * c + d);
        store(to + j + 16 * c, v, std::min(16L, 3L * n - j - 16 * c));
      }
  };
  if (one && w.inside)
    for (int r = 0; r < m; r++) map(r, out + 3L * n * r, put_away);
  else
    cut_views(b, i, w, colors.around, out, [&](int r, Out* row) { map(r, row, put); });
}

// Keep the first of three numbers.
template <class Out> static void keep_first(const Out* three, long n, Out* out) {
  for (long k = 0; k < n; k++) out[k] = three[3 * k];
}

struct Region {
  int top, left, height, width;
};

// Work on image i: `decode` is asked for the pixels that the filter touches, or null.
template <class Decode> static bool process(const Batch& b, long i, Decode decode) {
  const int32_t *box = b.boxes + 4 * i, *size = b.sizes + 2 * i;
  const Window w = window_of(b, i);
  const long pixels = b.views * b.crop * b.crop, start = pixels * b.channels * i;
  auto with = [&](const auto& y, const auto& x, auto finish) {
    const Pixels in = decode(Region{box[0] + y.begin, box[1] + x.begin, y.end - y.begin, x.end - x.begin});
    if (!in.at || b.last == DECODE) return in.at != nullptr;
    auto into = [&](auto* out) {
      if (b.channels == 3) return finish(in, out);
      static thread_local vector<std::remove_reference_t<decltype(*out)>> kept;
      finish(in, room(kept, 3 * pixels));
      keep_first(kept.data(), pixels, out);
    };
    if (b.bfloat16) into(static_cast<uint16_t*>(b.out) + start);
    else into(static_cast<float*>(b.out) + start);
#ifdef __x86_64__
    _mm_sfence();
#endif
    return true;
  };
  if (b.filter == TORCH7) {
    const Taps<float> y = torch7_taps(box[2], size[0], w.y0, w.y1), x = torch7_taps(box[3], size[1], w.x0, w.x1);
    return with(y, x, [&](Pixels in, auto* out) { finish_torch7(b, i, w, in, y, x, out); });
  }
  const bool cubic = b.filter == BICUBIC;
  const Taps<int> y = pillow_taps(box[2], size[0], w.y0, w.y1, cubic), x = pillow_taps(box[3], size[1], w.x0, w.x1, cubic);
  return with(y, x, [&](Pixels in, auto* out) { finish_pillow(b, i, w, in, y, x, out); });
}

// JPEG files. The library is the one that Pillow decodes with, so that pixels are Pillow's to the bit. Its wheel brings no
// headers; these declarations are of the interface of libjpeg 6b, whose first part, up to what is used here, version 8 has
// too, and which has not changed since 1998. The library itself checks version and size when a decompressor is made. What is
// not used is not named.

static const int RGB = 2;
static constexpr struct Interface {
  int version;
  size_t size;  // of its Decompressor
} INTERFACES[] = {{62, 632}, {80, 656}};
static Interface interface;

struct ErrorManager;
struct Decompressor {
  ErrorManager* errors;
  void *memory, *progress, *client;
  int is_decompressor, state;
  void* source;
  unsigned width, height;
  int components, color_space, out_color_space;
  char unused[68];
  unsigned out_width, out_height;
  char unused_either[512];
};
struct ErrorManager {
  void (*exit)(Decompressor*);
  void (*message)(Decompressor*, int level);
  void (*output)(Decompressor*);
  void (*format)(Decompressor*, char* text);
  char unused[136];
};
static_assert(sizeof(void*) == 8 && offsetof(Decompressor, out_width) == 136 && sizeof(Decompressor) == 656 && sizeof(ErrorManager) == 168);

static struct {
  ErrorManager* (*std_error)(ErrorManager*);
  void (*create)(Decompressor*, int version, size_t size);
  void (*destroy)(Decompressor*);
  void (*abort)(Decompressor*);
  void (*mem_src)(Decompressor*, const uint8_t*, unsigned long length);
  int (*read_header)(Decompressor*, int require_image);
  int (*start)(Decompressor*);
  void (*crop_scanline)(Decompressor*, unsigned* left, unsigned* width);
  unsigned (*skip_scanlines)(Decompressor*, unsigned);
  unsigned (*read_scanlines)(Decompressor*, uint8_t** lines, unsigned);
} libjpeg;

// Whether a file is a complete JPEG of the kinds that all decoders see alike, as `formats.is_plain` says with the same
// rules; then `sampling` is the largest horizontal sampling factor.
static bool is_plain_jpeg(const uint8_t* bytes, long length, int& sampling) {
  bool beyond = false;
  auto at = [&](long p) { return p < length ? bytes[p] : (beyond = true, 0); };
  if (at(0) != 0xFF || at(1) != 0xD8) return false;
  struct Component {
    int name;
    std::array<int8_t, 64> lacking;  // bits of each coefficient that later scans must give; -1: all
  };
  vector<Component> components;
  sampling = 1;
  for (long p = 2; at(p) == 0xFF;) {
    const int marker = at(p + 1);
    if (marker == 0xD9) {
      for (const Component& c : components)
        if (std::any_of(c.lacking.begin(), c.lacking.end(), [](int8_t bits) { return bits; })) return false;
      return !components.empty();
    }
    const long size = at(p + 2) << 8 | at(p + 3);
    if (marker >= 0xC0 && marker <= 0xC2) {
      const int bits = at(p + 4), height = at(p + 5) << 8 | at(p + 6), width = at(p + 7) << 8 | at(p + 8), count = at(p + 9);
      if (!components.empty() || bits != 8 || !height || !width || (count != 1 && count != 3)) return false;
      for (int k = 0; k < count; k++) {
        Component c{at(p + 10 + 3 * k), {}};
        if (count == 3 && c.name != k + 1) return false;
        c.lacking.fill(-1);
        components.push_back(c);
        sampling = std::max(sampling, at(p + 11 + 3 * k) >> 4);
      }
    } else if (marker == 0xDA) {
      const int count = at(p + 4), first = at(p + 5 + 2 * count), last = at(p + 6 + 2 * count), bits = at(p + 7 + 2 * count);
      if (first > last || last > 63) return false;
      for (int k = 0; k < count; k++) {
        const int name = at(p + 5 + 2 * k), before = bits >> 4 ? bits >> 4 : -1;
        auto c = std::find_if(components.begin(), components.end(), [&](const Component& c) { return c.name == name; });
        if (c == components.end()) return false;
        for (int f = first; f <= last; f++) {
          if (c->lacking[f] != before) return false;
          c->lacking[f] = bits & 15;
        }
      }
    } else if (marker == 0xEE) {
      if (p + 9 <= length && !memcmp(bytes + p + 4, "Adobe", 5) && at(p + 15) != 1) return false;  // not YCbCr
    } else if (marker != 0xC4 && marker != 0xDB && marker != 0xDD && marker != 0xFE && (marker < 0xE0 || marker > 0xEF)) {
      return false;
    }
    p += 2 + size;
    if (beyond || p >= length) return false;
    if (marker == 0xDA) {  // within a scan only stuffing, restarts and fill bytes follow FF
      for (;; p++) {
        auto found = static_cast<const uint8_t*>(memchr(bytes + p, 0xFF, length - p));
        if (!found || found + 1 >= bytes + length) return false;
        p = found - bytes;
        const int next = bytes[p + 1];
        if (next != 0 && next != 0xFF && (next < 0xD0 || next > 0xD7)) break;
      }
    }
  }
  return false;
}

struct Jpeg {
  Decompressor info{};
  ErrorManager errors;
  jmp_buf jump;
  long warnings = 0;
  bool made = false;
  char text[256] = "";
  vector<uint8_t> pixels;

  Jpeg() {
    info.errors = libjpeg.std_error(&errors);
    info.client = this;
    errors.exit = [](Decompressor* p) { longjmp(static_cast<Jpeg*>(p->client)->jump, 1); };
    errors.message = [](Decompressor* p, int level) { static_cast<Jpeg*>(p->client)->warnings += level < 0; };
    if (setjmp(jump)) {
      errors.format(&info, text);
      return;
    }
    libjpeg.create(&info, interface.version, interface.size);
    made = true;
  }
  ~Jpeg() {
    if (made) libjpeg.destroy(&info);
  }

  // A region as a full decode gives it: with one MCU more at its sides, because chroma is interpolated across them. at = null:
  // this decoder sees damage.
  Pixels decode(const uint8_t* bytes, long length, Region r, int sampling) {
    if (setjmp(jump)) return libjpeg.abort(&info), Pixels{};
    libjpeg.abort(&info);
    warnings = 0;
    libjpeg.mem_src(&info, bytes, length);
    libjpeg.read_header(&info, 1);
    if (r.top + r.height > long(info.height) || r.left + r.width > long(info.width)) return Pixels{};  // no longer as indexed
    info.out_color_space = RGB;
    libjpeg.start(&info);
    const int mcu = 8 * sampling, right = r.left + r.width;
    unsigned from = std::max(0, (r.left / mcu - 1) * mcu);
    unsigned wide = std::min<long>(info.out_width, ((right + mcu - 1) / mcu + 1) * mcu) - from;
    if (wide < info.out_width) libjpeg.crop_scanline(&info, &from, &wide);
    const long stride = 3L * wide;
    uint8_t* into = room(pixels, r.height * stride + 2 * PAD) + PAD;
    if (r.top) libjpeg.skip_scanlines(&info, r.top);
    for (long row = 0; row < r.height;) {
      uint8_t* lines[4];
      for (long k = 0; k < 4; k++) lines[k] = into + std::min(row + k, r.height - 1L) * stride;
      row += libjpeg.read_scanlines(&info, lines, std::min(4L, r.height - row));
    }
    libjpeg.abort(&info);
    return {warnings ? nullptr : into + 3 * (r.left - long(from)), stride, r.height, r.width};
  }
};

static bool read_whole(int file, uint8_t* to, int64_t position, int64_t length) {
  while (length > 0) {
    const ssize_t got = pread(file, to, length, position);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    to += got, position += got, length -= got;
  }
  return true;
}

// A region of an image in memory, whose first pixel is `at`, as RGB.
static Pixels copied(const uint8_t* at, long stride, long colors, Region r) {
  static thread_local vector<uint8_t> kept;
  uint8_t* into = room(kept, 3L * r.width * r.height + 2 * PAD) + PAD;
  for (long row = 0; row < r.height; row++) {
    const uint8_t* from = at + stride * row;
    uint8_t* to = into + 3L * r.width * row;
    if (colors == 3) memcpy(to, from, 3L * r.width);
    else for (long x = 0; x < r.width; x++) to[3 * x] = to[3 * x + 1] = to[3 * x + 2] = from[x];
  }
  return {into, 3L * r.width, r.height, r.width};
}

// Take images of the batch until there are AHEAD, and ask the disk for them.
static void claim(Batch& b, Claims& claims) {
  while (claims.count < AHEAD) {
    const int64_t i = __atomic_fetch_add(&b.next, 1, __ATOMIC_RELAXED);
    if (i >= b.n) return;
    const int file = b.paths[i] ? open(b.paths[i], O_RDONLY | O_CLOEXEC) : b.files[i];
#ifdef POSIX_FADV_WILLNEED
    if (file >= 0) posix_fadvise(file, b.positions[i], b.lengths[i], POSIX_FADV_WILLNEED);
#endif
    claims.images[claims.count] = i, claims.files[claims.count++] = file;
  }
}

static bool run_one(const Batch& b, int64_t i, int file) {
  static thread_local Jpeg jpeg;
  static thread_local vector<uint8_t> kept;
  bool done = false;
  try {
    if (b.array) {
      const long stride = b.colors * b.width;
      const uint8_t* image = b.array + b.positions[i];
      return b.last == READ || process(b, i, [&](Region r) {
        return copied(image + stride * r.top + b.colors * r.left, stride, b.colors, r);
      });
    }
    const int64_t length = b.lengths[i];
    int sampling = 1;
    done = file >= 0 && read_whole(file, room(kept, length), b.positions[i], length) &&
           (b.last == READ || is_plain_jpeg(kept.data(), length, sampling)) &&
           (b.last == READ || process(b, i, [&](Region r) { return jpeg.decode(kept.data(), length, r, sampling); }));
  } catch (const std::bad_alloc&) {  // Python says so if it happens to Pillow too
  }
  if (file >= 0 && b.paths[i]) close(file);
  return done;
}

extern "C" {
// Take libjpeg's functions, in the order of `libjpeg`; why they cannot be used, or null.
const char* native_open(void* const* functions) {
  static_assert(sizeof libjpeg == 10 * sizeof(void*));
  static char why[256];
  memcpy(&libjpeg, functions, sizeof libjpeg);
  for (const Interface& known : INTERFACES) {
    interface = known;
    const Jpeg jpeg;
    if (jpeg.made) return nullptr;
    snprintf(why, sizeof why, "%s", jpeg.text);
  }
  return why;
}

// Work on images that nobody has taken until there are none, which is -1, or one is left to Python, which is its number.
int64_t native_run(Batch* b, Claims* claims) {
  for (;;) {
    claim(*b, *claims);
    if (!claims->count) return -1;
    const int64_t i = claims->images[0];
    const int file = claims->files[0];
    claims->count--;
    for (int k = 0; k < claims->count; k++) claims->images[k] = claims->images[k + 1], claims->files[k] = claims->files[k + 1];
    if (!run_one(*b, i, file)) return i;
  }
}

// Top, left, height and width of the pixels that the filter touches in image i. 0: there is no memory.
int native_region(const Batch* b, int64_t i, int32_t* region) try {
  process(*b, i, [&](Region r) { return memcpy(region, &r, sizeof r), Pixels{}; });
  return 1;
} catch (const std::bad_alloc&) {
  return 0;
}

// Work on image i, from those pixels. 0: there is no memory.
int native_finish(const Batch* b, int64_t i, const uint8_t* pixels, int64_t stride) try {
  return process(*b, i, [&](Region r) { return copied(pixels, stride, 3, r); });
} catch (const std::bad_alloc&) {
  return 0;
}

int native_is_plain_jpeg(const uint8_t* bytes, int64_t length) {
  int sampling;
  return is_plain_jpeg(bytes, length, sampling);
}
}
