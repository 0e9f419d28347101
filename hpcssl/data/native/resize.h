/* Antialiased resize of 8-bit RGB, bit for bit that of torch's uint8 kernels on a CPU.
 *
 * Each axis has its own table of weights, which are rounded to 16 bits. Rows are resized along the width first, and
 * rounded to 8 bits; the results are then resized along the height.
 */
#ifndef HPCSSL_RESIZE_H
#define HPCSSL_RESIZE_H

#include <stddef.h>
#include <stdint.h>

enum { BILINEAR = 0, BICUBIC = 1 };

/* Bytes that may be read or written beyond the last pixel of a row. */
#define ROW_PADDING 64

/* The weights of one axis. Every output pixel has the same number of them, which spares a branch that the processor
 * would guess wrongly; those that are too many are 0. */
typedef struct {
    int taps;         /* weights of an output pixel, an even number */
    int precision;    /* a weight of 1 is 1 << precision */
    int *first;       /* [out] the source pixel of the first weight. At most 1 pixel beyond the source has a weight, 0 */
    int *stop;        /* [out] one past the last source pixel whose weight is not 0 */
    int16_t *weights; /* [out][taps] */
    double *exact;    /* [out][most taps] before they are rounded */
    size_t pixels, cells; /* what the memory is large enough for: output pixels, and output pixels times most taps */
} Axis;

/* Compute the weights for `in` source pixels and `out` output pixels. Returns 0 where memory is short. */
int axis_plan(Axis *axis, int in, int out, int kind);
void axis_free(Axis *axis);

/* Resize four rows of RGB along the width. Rows may be given twice. */
void resize_width(const Axis *axis, int out, const uint8_t *const source[4], uint8_t *const target[4]);

/* Make one output row of `bytes` bytes. `source` is the first row that it needs, row `first` of the axis. */
void resize_height(const Axis *axis, int row, const uint8_t *source, size_t stride, int bytes, uint8_t *target);

#endif
