/* Views of a JPEG: decode the part of it that its crops cover, and resize them as its rows arrive.
 *
 * Only files that libjpeg-turbo decodes without a warning are taken, and only the common kind: baseline or extended
 * Huffman coding in one scan, 8 bits, gray or YCbCr. Of all others nothing is written, or what was written is void, and
 * the caller decodes them in another way. The entropy-coded data are read to their end, so that a file which is cut off
 * or corrupt below the crops is noticed.
 *
 * Nothing here is global: threads use a decoder each.
 */
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

#include "resize.h"

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2000000
#error "libjpeg-turbo 2.0 or newer is needed: jpeg_crop_scanline, jpeg_skip_scanlines"
#endif

#define EXPORT __attribute__((visibility("default")))
#define INTERFACE 1 /* the version of this file's functions: counted up with each change of their arguments or meaning */
#define BAND 16     /* rows that are decoded before they are resized: they stay in the nearest cache */

enum { DONE = 0, OTHER_KIND = 1, DAMAGED = 2, NO_MEMORY = 3 };

/* One view, as the caller describes it. */
typedef struct {
    int32_t top, left, height, width; /* its box in the image */
    int32_t size;                     /* side of the view, S */
    int32_t kind;                     /* BILINEAR or BICUBIC */
    uint8_t *out;                     /* uint8 [S, S, 3], written to */
} View;

/* What belongs to a view while its image is decoded. */
typedef struct {
    Axis width, height;
    uint8_t *rows;   /* [height of the box + 2][stride] rows resized along the width */
    size_t capacity; /* bytes of it */
    size_t stride;
    int next; /* the next output row */
} Resize;

typedef struct {
    struct jpeg_decompress_struct jpeg;
    struct jpeg_error_mgr errors;
    jmp_buf escape;
    Resize *resizes;
    int resize_count;
    uint8_t *band; /* [BAND][stride] decoded rows */
    size_t capacity;
} Decoder;

static void leave(j_common_ptr jpeg) {
    longjmp(((Decoder *)jpeg->client_data)->escape, 1);
}

static void leave_on_warning(j_common_ptr jpeg, int level) {
    if (level < 0) leave(jpeg); /* levels from 0 are traces */
}

static void print_nothing(j_common_ptr jpeg) {
    (void)jpeg;
}

EXPORT int hpcssl_interface(void) {
    return INTERFACE;
}

EXPORT void hpcssl_decoder_free(Decoder *decoder) {
    if (!decoder) return;
    if (!setjmp(decoder->escape)) jpeg_destroy_decompress(&decoder->jpeg);
    for (int i = 0; i < decoder->resize_count; i++) {
        axis_free(&decoder->resizes[i].width);
        axis_free(&decoder->resizes[i].height);
        free(decoder->resizes[i].rows);
    }
    free(decoder->resizes);
    free(decoder->band);
    free(decoder);
}

/* Returns 0 where memory is short, or where the library is not the one of the header. */
static int create(Decoder *decoder) {
    if (setjmp(decoder->escape)) return 0;
    jpeg_create_decompress(&decoder->jpeg);
    return 1;
}

/* A decoder for one thread, or NULL. */
EXPORT Decoder *hpcssl_decoder_new(void) {
    Decoder *decoder = calloc(1, sizeof *decoder);
    if (!decoder) return NULL;
    decoder->jpeg.err = jpeg_std_error(&decoder->errors);
    decoder->jpeg.client_data = decoder;
    decoder->errors.error_exit = leave;
    decoder->errors.emit_message = leave_on_warning;
    decoder->errors.output_message = print_nothing;
    if (create(decoder)) return decoder;
    free(decoder);
    return NULL;
}

static int reserve(uint8_t **memory, size_t *capacity, size_t bytes) {
    if (bytes > *capacity) {
        free(*memory);
        *capacity = 0;
        *memory = malloc(bytes);
        if (!*memory) return 0;
        *capacity = bytes;
    }
    return 1;
}

/* Compute the weights and reserve memory for all views. Returns 0 where memory is short. */
static int prepare(Decoder *decoder, const View *views, int count) {
    if (count > decoder->resize_count) {
        Resize *more = realloc(decoder->resizes, (size_t)count * sizeof *more);
        if (!more) return 0;
        memset(more + decoder->resize_count, 0, (size_t)(count - decoder->resize_count) * sizeof *more);
        decoder->resizes = more;
        decoder->resize_count = count;
    }
    for (int i = 0; i < count; i++) {
        const View *view = &views[i];
        Resize *resize = &decoder->resizes[i];
        resize->next = 0;
        resize->stride = 3 * (size_t)view->size + ROW_PADDING;
        if (!axis_plan(&resize->width, view->width, view->size, view->kind) ||
            !axis_plan(&resize->height, view->height, view->size, view->kind) ||
            !reserve(&resize->rows, &resize->capacity, resize->stride * ((size_t)view->height + 2)))
            return 0;
    }
    return 1;
}

/* Resize what a view shows of `lines` decoded rows from `top` on; `left` is the first decoded column. */
static void feed(
    Resize *resize, const View *view, const uint8_t *band, size_t stride, int top, int left, int lines) {
    int from = view->top > top ? view->top : top;
    int stop = view->top + view->height < top + lines ? view->top + view->height : top + lines;
    if (from >= stop) return;
    for (int row = from; row < stop; row += 4) {
        const uint8_t *source[4];
        uint8_t *target[4];
        for (int i = 0; i < 4; i++) {
            const int now = row + i < stop ? row + i : stop - 1;
            source[i] = band + (size_t)(now - top) * stride + 3 * (size_t)(view->left - left);
            target[i] = resize->rows + (size_t)(now - view->top) * resize->stride;
        }
        resize_width(&resize->width, view->size, source, target);
    }
    for (const Axis *axis = &resize->height; resize->next < view->size; resize->next++) {
        const int row = resize->next;
        if (axis->stop[row] > stop - view->top) return;
        const uint8_t *source = resize->rows + (size_t)axis->first[row] * resize->stride;
        uint8_t *target = view->out + 3 * (size_t)view->size * (size_t)row;
        resize_height(axis, row, source, resize->stride, 3 * view->size, target);
    }
}

/* Decode the columns `left` .. `right` - 1 of the rows `top` .. `bottom` - 1, and give them to the views. */
static int decode_part(
    Decoder *decoder, const View *views, int count, int top, int left, int bottom, int right) {
    struct jpeg_decompress_struct *jpeg = &decoder->jpeg;
    /* A column of chroma is interpolated from its neighbors: without them, the outermost pixels would differ. */
    const int context = jpeg->max_h_samp_factor;
    JDIMENSION start = (JDIMENSION)(left > context ? left - context : 0);
    JDIMENSION width = (JDIMENSION)(right + context) < jpeg->output_width ? (JDIMENSION)(right + context) - start
                                                                         : jpeg->output_width - start;
    if (width < jpeg->output_width) jpeg_crop_scanline(jpeg, &start, &width);
    const size_t stride = 3 * (size_t)width + ROW_PADDING;
    if (!reserve(&decoder->band, &decoder->capacity, stride * BAND)) return NO_MEMORY;
    if (top && jpeg_skip_scanlines(jpeg, (JDIMENSION)top) != (JDIMENSION)top) return DAMAGED;
    JSAMPROW lines[BAND];
    for (int i = 0; i < BAND; i++) lines[i] = decoder->band + (size_t)i * stride;
    while ((int)jpeg->output_scanline < bottom) {
        const int first = (int)jpeg->output_scanline, wanted = bottom - first < BAND ? bottom - first : BAND;
        int got = 0;
        while (got < wanted) {
            const int more = (int)jpeg_read_scanlines(jpeg, lines + got, (JDIMENSION)(wanted - got));
            if (more < 1) return DAMAGED;
            got += more;
        }
        for (int i = 0; i < count; i++)
            feed(&decoder->resizes[i], &views[i], decoder->band, stride, first, (int)start, got);
    }
    /* Skipping to the very end would not read the data. The last row is therefore decoded. */
    const JDIMENSION rest = jpeg->output_height - jpeg->output_scanline;
    if (rest > 1 && jpeg_skip_scanlines(jpeg, rest - 1) != rest - 1) return DAMAGED;
    if (rest > 0 && jpeg_read_scanlines(jpeg, lines, 1) != 1) return DAMAGED;
    return DONE;
}

static int is_common(const struct jpeg_decompress_struct *jpeg) {
    const int is_color = jpeg->num_components == 3 && jpeg->jpeg_color_space == JCS_YCbCr;
    const int is_gray = jpeg->num_components == 1 && jpeg->jpeg_color_space == JCS_GRAYSCALE;
    return (is_color || is_gray) && jpeg->data_precision == 8 && !jpeg->arith_code && !jpeg->progressive_mode;
}

/* Read the header, and decode if it announces what is decoded here. An error of libjpeg ends it by longjmp. */
static int decode(
    Decoder *decoder, const uint8_t *data, size_t bytes, int height, int width, const View *views, int count) {
    struct jpeg_decompress_struct *jpeg = &decoder->jpeg;
    int top = height, left = width, bottom = 0, right = 0;
    for (int i = 0; i < count; i++) {
        const View *view = &views[i];
        if (view->top < top) top = view->top;
        if (view->left < left) left = view->left;
        if (view->top + view->height > bottom) bottom = view->top + view->height;
        if (view->left + view->width > right) right = view->left + view->width;
    }
    jpeg_mem_src(jpeg, data, (unsigned long)bytes);
    if (jpeg_read_header(jpeg, TRUE) != JPEG_HEADER_OK || !is_common(jpeg) || jpeg_has_multiple_scans(jpeg) ||
        (int)jpeg->image_height != height || (int)jpeg->image_width != width)
        return OTHER_KIND;
    jpeg->out_color_space = JCS_RGB;
    jpeg->dct_method = JDCT_ISLOW;
    if (!prepare(decoder, views, count)) return NO_MEMORY;
    jpeg_start_decompress(jpeg);
    const int result = decode_part(decoder, views, count, top, left, bottom, right);
    if (result == DONE) jpeg_finish_decompress(jpeg);
    return result;
}

/* Decode views of a JPEG.
 *
 * height, width: size of the image, for which the boxes were drawn.
 * Returns DONE; OTHER_KIND for a file that is not decoded here or has another size, or for a box that is empty or leaves
 * the image; DAMAGED after a warning or an error of libjpeg; NO_MEMORY. After all but DONE the content of the views is
 * undefined. */
EXPORT int hpcssl_decode_views(
    Decoder *decoder, const uint8_t *data, size_t bytes, int height, int width, const View *views, int count) {
    for (int i = 0; i < count; i++) {
        const View *view = &views[i];
        if (view->top < 0 || view->left < 0 || view->height < 1 || view->width < 1 || view->size < 1 ||
            view->height > height - view->top || view->width > width - view->left)
            return OTHER_KIND;
    }
    if (count < 1) return OTHER_KIND;
    if (setjmp(decoder->escape)) {
        jpeg_abort_decompress(&decoder->jpeg);
        return DAMAGED;
    }
    const int result = decode(decoder, data, bytes, height, width, views, count);
    jpeg_abort_decompress(&decoder->jpeg);
    return result;
}
