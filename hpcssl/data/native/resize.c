#include "resize.h"

#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAVE_AVX2 1
#endif

static double weight_of(double x, int kind) {
    if (x < 0) x = -x;
    if (kind == BILINEAR) return x < 1 ? 1 - x : 0;
    /* Keys' cubic with a = -1/2, in the form and order in which torch computes it */
    const double a = -0.5;
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
    return 0;
}

static int axis_reserve(Axis *axis, size_t pixels, size_t cells) {
    if (pixels > axis->pixels || cells > axis->cells) {
        axis_free(axis);
        axis->first = malloc(pixels * sizeof *axis->first);
        axis->stop = malloc(pixels * sizeof *axis->stop);
        axis->weights = malloc(cells * sizeof *axis->weights);
        axis->exact = malloc(cells * sizeof *axis->exact);
        if (!axis->first || !axis->stop || !axis->weights || !axis->exact) {
            axis_free(axis);
            return 0;
        }
        axis->pixels = pixels;
        axis->cells = cells;
    }
    return 1;
}

/* Compute `first`, `stop` and the exact weights, whose rows are `room` long. Returns the largest weight. */
static double compute_weights(Axis *axis, int in, int out, int kind, double support, double inverse, int room) {
    const double scale = (double)in / out;
    double largest = 0;
    axis->taps = 2;
    for (int i = 0; i < out; i++) {
        const double center = scale * (i + 0.5);
        int first = (int)(center - support + 0.5), stop = (int)(center + support + 0.5);
        double *weights = axis->exact + (size_t)i * (size_t)room, sum = 0;
        if (first < 0) first = 0;
        if (stop > in) stop = in;
        const int count = stop - first;
        for (int j = 0; j < count; j++) {
            weights[j] = weight_of((j + first - center + 0.5) * inverse, kind);
            sum += weights[j];
        }
        for (int j = 0; j < count; j++) {
            if (sum != 0) weights[j] /= sum;
            if (weights[j] > largest) largest = weights[j];
        }
        if (count > axis->taps) axis->taps = (count + 1) & ~1;
        axis->first[i] = first;
        axis->stop[i] = stop;
    }
    return largest;
}

int axis_plan(Axis *axis, int in, int out, int kind) {
    const double scale = (double)in / out, stretch = scale >= 1 ? scale : 1;
    const double support = (kind == BICUBIC ? 2 : 1) * stretch;
    const int room = 2 * (int)support + 4; /* more than the pixels of any output pixel, and even */
    if (!axis_reserve(axis, (size_t)out, (size_t)out * (size_t)room)) return 0;
    const double largest = compute_weights(axis, in, out, kind, support, 1 / stretch, room);
    /* as many bits as the largest weight leaves room for in 16 bits */
    int precision = 0;
    while (precision < 22 && (int)(0.5 + largest * (1 << (precision + 1))) < 1 << 15) precision++;
    axis->precision = precision;
    memset(axis->weights, 0, (size_t)out * (size_t)axis->taps * sizeof *axis->weights);
    for (int i = 0; i < out; i++) {
        const int first = axis->first[i], count = axis->stop[i] - first;
        /* near the end, weights of 0 come first, so that nothing is read far beyond it */
        const int start = first <= in - axis->taps ? first : in > axis->taps ? in - axis->taps : 0;
        int16_t *weights = axis->weights + (size_t)i * (size_t)axis->taps + (first - start);
        for (int j = 0; j < count; j++) {
            const double weight = axis->exact[(size_t)i * (size_t)room + (size_t)j] * (1 << precision);
            weights[j] = (int16_t)(weight < 0 ? weight - 0.5 : weight + 0.5);
        }
        axis->first[i] = start;
    }
    return 1;
}

void axis_free(Axis *axis) {
    free(axis->first);
    free(axis->stop);
    free(axis->weights);
    free(axis->exact);
    axis->first = axis->stop = NULL;
    axis->weights = NULL;
    axis->exact = NULL;
    axis->pixels = axis->cells = 0;
}

static inline uint8_t round_to_byte(int32_t sum, int precision) {
    sum >>= precision;
    return (uint8_t)(sum < 0 ? 0 : sum > 255 ? 255 : sum);
}

static void resize_width_plain(const Axis *axis, int out, const uint8_t *const source[4], uint8_t *const target[4]) {
    for (int row = 0; row < 4; row++) {
        for (int i = 0; i < out; i++) {
            const int16_t *weights = axis->weights + (size_t)i * axis->taps;
            const uint8_t *pixel = source[row] + 3 * (size_t)axis->first[i];
            int32_t red = 1 << axis->precision >> 1, green = red, blue = red;
            for (int j = 0; j < axis->taps; j++, pixel += 3) {
                red += pixel[0] * weights[j];
                green += pixel[1] * weights[j];
                blue += pixel[2] * weights[j];
            }
            target[row][3 * i] = round_to_byte(red, axis->precision);
            target[row][3 * i + 1] = round_to_byte(green, axis->precision);
            target[row][3 * i + 2] = round_to_byte(blue, axis->precision);
        }
    }
}

static void resize_height_plain(
    const Axis *axis, int row, const uint8_t *source, size_t stride, int bytes, uint8_t *target) {
    const int16_t *weights = axis->weights + (size_t)row * axis->taps;
    for (int x = 0; x < bytes; x++) {
        int32_t sum = 1 << axis->precision >> 1;
        for (int j = 0; j < axis->taps; j++) sum += source[(size_t)j * stride + x] * weights[j];
        target[x] = round_to_byte(sum, axis->precision);
    }
}

#ifdef HAVE_AVX2

/* Two neighboring weights in each 32 bits, as multiply-and-add of pairs takes them. */
__attribute__((target("avx2"))) static inline __m256i pair_of(const int16_t *weights) {
    int32_t pair;
    memcpy(&pair, weights, sizeof pair);
    return _mm256_set1_epi32(pair);
}

/* 16 bytes of each of two rows, one row in each half. */
__attribute__((target("avx2"))) static inline __m256i two_rows(const uint8_t *low, const uint8_t *high) {
    const __m256i first = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)low));
    return _mm256_inserti128_si256(first, _mm_loadu_si128((const __m128i *)high), 1);
}

/* One output pixel of two rows. Each half holds four 32-bit sums of one row: red, green, blue, and one without meaning. */
__attribute__((target("avx2"), always_inline)) static inline __m256i sum_pixels(
    const int16_t *weights, int taps, const uint8_t *low, const uint8_t *high, __m256i sum) {
    const __m256i pixels_01 = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
    const __m256i pixels_23 = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1));
    for (; taps >= 4; taps -= 4, weights += 4, low += 12, high += 12) {
        const __m256i rows = two_rows(low, high);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(rows, pixels_01), pair_of(weights)));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(rows, pixels_23), pair_of(weights + 2)));
    }
    if (taps) {
        const __m256i rows = _mm256_shuffle_epi8(two_rows(low, high), pixels_01);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(rows, pair_of(weights)));
    }
    return sum;
}

/* Four output pixels of two rows at a time. Up to 16 bytes are written beyond the last pixel. */
__attribute__((target("avx2"), always_inline)) static inline void resize_two_rows(
    const Axis *axis, const int taps, int out, const uint8_t *const *source, uint8_t *const *target) {
    const __m256i half = _mm256_set1_epi32(1 << axis->precision >> 1);
    const __m256i without_fourth = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    const __m128i shift = _mm_cvtsi32_si128(axis->precision);
    /* copies: the compiler must assume that a store of bytes changes what `axis` points to */
    const int16_t *const weights = axis->weights;
    const int *const first = axis->first;
    const uint8_t *const low = source[0], *const high = source[1];
    uint8_t *const target_low = target[0], *const target_high = target[1];
    for (int i = 0; i < out; i += 4) {
        __m256i sums[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            const int pixel = i + k < out ? i + k : out - 1;
            const size_t at = 3 * (size_t)first[pixel];
            const __m256i sum = sum_pixels(weights + pixel * taps, taps, low + at, high + at, half);
            sums[k] = _mm256_sra_epi32(sum, shift);
        }
        const __m256i words_01 = _mm256_packs_epi32(sums[0], sums[1]);
        const __m256i words_23 = _mm256_packs_epi32(sums[2], sums[3]);
        const __m256i bytes = _mm256_shuffle_epi8(_mm256_packus_epi16(words_01, words_23), without_fourth);
        _mm_storeu_si128((__m128i *)(target_low + 3 * i), _mm256_castsi256_si128(bytes));
        _mm_storeu_si128((__m128i *)(target_high + 3 * i), _mm256_extracti128_si256(bytes, 1));
    }
}

/* The usual numbers of weights are constants, so that the loops over them are unrolled. */
__attribute__((target("avx2"))) static void resize_width_avx2(
    const Axis *axis, int out, const uint8_t *const source[4], uint8_t *const target[4]) {
    for (int row = 0; row < 4; row += 2) {
        switch (axis->taps) {
        case 2: resize_two_rows(axis, 2, out, source + row, target + row); break;
        case 4: resize_two_rows(axis, 4, out, source + row, target + row); break;
        case 6: resize_two_rows(axis, 6, out, source + row, target + row); break;
        case 8: resize_two_rows(axis, 8, out, source + row, target + row); break;
        default: resize_two_rows(axis, axis->taps, out, source + row, target + row);
        }
    }
}

__attribute__((target("avx2"))) static void resize_height_avx2(
    const Axis *axis, int row, const uint8_t *source, size_t stride, int bytes, uint8_t *target) {
    const int16_t *weights = axis->weights + (size_t)row * axis->taps;
    const int whole = bytes & ~15;
    const __m256i half = _mm256_set1_epi32(1 << axis->precision >> 1);
    const __m128i shift = _mm_cvtsi32_si128(axis->precision);
    for (int x = 0; x < whole; x += 16) {
        __m256i low = half, high = half;
        for (int j = 0; j < axis->taps; j += 2) {
            const uint8_t *even = source + (size_t)j * stride + x;
            const __m128i a = _mm_loadu_si128((const __m128i *)even);
            const __m128i b = _mm_loadu_si128((const __m128i *)(even + stride));
            const __m256i pair = pair_of(weights + j);
            const __m256i first = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b));
            const __m256i second = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(a, b));
            low = _mm256_add_epi32(low, _mm256_madd_epi16(first, pair));
            high = _mm256_add_epi32(high, _mm256_madd_epi16(second, pair));
        }
        const __m256i words = _mm256_packs_epi32(_mm256_sra_epi32(low, shift), _mm256_sra_epi32(high, shift));
        const __m256i ordered = _mm256_permute4x64_epi64(words, 0xD8); /* undo the order of halves that packing makes */
        const __m128i packed = _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
        _mm_storeu_si128((__m128i *)(target + x), packed);
    }
    if (whole < bytes) resize_height_plain(axis, row, source + whole, stride, bytes - whole, target + whole);
}

static int use_avx2(void) {
    return __builtin_cpu_supports("avx2");
}

#endif

void resize_width(const Axis *axis, int out, const uint8_t *const source[4], uint8_t *const target[4]) {
#ifdef HAVE_AVX2
    if (use_avx2()) {
        resize_width_avx2(axis, out, source, target);
        return;
    }
#endif
    resize_width_plain(axis, out, source, target);
}

void resize_height(const Axis *axis, int row, const uint8_t *source, size_t stride, int bytes, uint8_t *target) {
#ifdef HAVE_AVX2
    if (use_avx2()) {
        resize_height_avx2(axis, row, source, stride, bytes, target);
        return;
    }
#endif
    resize_height_plain(axis, row, source, stride, bytes, target);
}
