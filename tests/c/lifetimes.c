/*
 * Every function of the interface once and more, in many orders of making and destroying, for the
 * memory checkers: run under valgrind or AddressSanitizer it must be clean.
 *
 *     lifetimes model.safetensors
 */
#include <farface.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WIDTH = 96, HEIGHT = 64, CAPACITY = 50 };

#define MUST(condition)                                                                       \
    do {                                                                                      \
        if (!(condition)) {                                                                   \
            fprintf(stderr, "line %d: %s: %s\n", __LINE__, #condition, farface_last_error()); \
            exit(1);                                                                          \
        }                                                                                     \
    } while (0)

/* A picture whose planes are exactly as long as they need to be, so that a checker sees the end. */
static farface_image picture(farface_format format, int bottom_up)
{
    farface_image image = {0};
    int chroma = format == FARFACE_FORMAT_NV12, i;
    size_t row = format == FARFACE_FORMAT_RGB8 ? 3 * WIDTH : WIDTH;
    image.width = WIDTH;
    image.height = HEIGHT;
    image.format = format;
    for (i = 0; i <= chroma; i++) {
        size_t rows = i == 0 ? HEIGHT : HEIGHT / 2, n, stride = row + 5;
        unsigned char *data = malloc(stride * (rows - 1) + row);
        MUST(data != NULL);
        for (n = 0; n < stride * (rows - 1) + row; n++)
            data[n] = (unsigned char)(n * n * 31 / 17 + n / 7);
        image.planes[i].data = bottom_up ? data + stride * (rows - 1) : data;
        image.planes[i].stride = bottom_up ? -(ptrdiff_t)stride : (ptrdiff_t)stride;
    }
    return image;
}

static void release(const farface_image *image)
{
    int i;
    for (i = 0; i < 3; i++) {
        const char *top = image->planes[i].data;
        ptrdiff_t stride = image->planes[i].stride, rows = i == 0 ? HEIGHT : HEIGHT / 2;
        if (top != NULL)
            free((void *)(top + (stride < 0 ? stride * (rows - 1) : 0)));
    }
}

static void settings(farface_model *model, farface_session *session)
{
    farface_session_options options;
    farface_device device = 0;
    uint32_t index = 9;
    uint64_t bytes = 0;
    MUST(farface_session_options_init(&options, sizeof options, model) == FARFACE_OK);
    options.score_threshold = 0.2f;
    options.threads = 2;
    MUST(farface_session_set_options(session, &options) == FARFACE_OK);
    options.score_threshold = 2;
    MUST(farface_session_set_options(session, &options) == FARFACE_ERROR_INVALID_ARGUMENT);
    MUST(farface_session_get_options(session, &options) == FARFACE_OK);
    MUST(options.score_threshold == 0.2f && options.threads == 2);
    MUST(farface_session_device(session, &device, &index) == FARFACE_OK);
    MUST(device == FARFACE_DEVICE_CPU && index == 0);
    MUST(farface_session_workspace_bytes(session, WIDTH, HEIGHT, &bytes) == FARFACE_OK && bytes > 0);
    MUST(farface_session_warmup(session, WIDTH, HEIGHT) == FARFACE_OK);
}

static void search(farface_session *session)
{
    farface_image images[4];
    farface_face *faces = malloc(4 * CAPACITY * sizeof *faces);
    farface_status statuses[4], status;
    size_t counts[4], count = 0;
    int i;
    MUST(faces != NULL);
    images[0] = picture(FARFACE_FORMAT_RGB8, 0);
    images[1] = picture(FARFACE_FORMAT_RGB8, 1);
    images[2] = picture(FARFACE_FORMAT_NV12, 0);
    images[3] = picture(FARFACE_FORMAT_NV12, 1);
    images[1].rotation = 90;
    images[2].mirrored = 1;
    images[3].roi.x = 7;
    images[3].roi.width = 41;
    images[3].roi.height = 33;
    status = farface_detect_batch(session, images, 4, faces, CAPACITY, counts, statuses);
    for (i = 0; i < 4; i++) {
        MUST(statuses[i] == FARFACE_OK || statuses[i] == FARFACE_ERROR_BUFFER_TOO_SMALL);
        MUST((statuses[i] == FARFACE_OK) == (counts[i] <= CAPACITY));
        MUST(status != FARFACE_OK || statuses[i] == FARFACE_OK);
        status |= farface_detect(session, &images[i], faces, CAPACITY, &count);
        MUST(count == counts[i]);
        release(&images[i]);
    }
    MUST(farface_detect(session, NULL, faces, CAPACITY, &count) == FARFACE_ERROR_INVALID_ARGUMENT);
    MUST(strstr(farface_last_error(), "image is NULL") != NULL);
    MUST(farface_session_wait(session, faces, CAPACITY, &count) == FARFACE_ERROR_UNSUPPORTED);
    free(faces);
}

int main(int argc, char **argv)
{
    farface_model *model = NULL, *copy = NULL;
    farface_session *first = NULL, *second = NULL;
    const char *name = NULL;
    char *bytes;
    size_t size;
    FILE *file;

    MUST(argc == 2 && farface_abi_version() == FARFACE_ABI_VERSION);
    MUST(farface_model_load("no such file", &model) == FARFACE_ERROR_IO && model == NULL);
    /* The default model, or NULL where the library was built without. */
    MUST((farface_model_default(&model) == FARFACE_OK) == (model != NULL));
    farface_model_destroy(model);
    MUST(farface_model_load(argv[1], &model) == FARFACE_OK);

    /* From memory, given back before use; cut short, refused. */
    MUST((file = fopen(argv[1], "rb")) != NULL && fseek(file, 0, SEEK_END) == 0);
    size = (size_t)ftell(file);
    rewind(file);
    MUST((bytes = malloc(size)) != NULL && fread(bytes, 1, size, file) == size);
    fclose(file);
    MUST(farface_model_load_memory(bytes, size - 1, &copy) == FARFACE_ERROR_INVALID_MODEL);
    MUST(copy == NULL && farface_model_load_memory(bytes, size, &copy) == FARFACE_OK);
    free(bytes);

    MUST(farface_session_create(model, NULL, &first) == FARFACE_OK);
    MUST(farface_session_create(copy, NULL, &second) == FARFACE_OK);
    settings(model, first);
    MUST(farface_model_name(model, &name) == FARFACE_OK && name != NULL);

    /* The models go first, the sessions keep working. */
    farface_model_destroy(model);
    search(first);
    farface_model_destroy(copy);
    farface_session_destroy(first);
    search(second);
    farface_session_destroy(second);
    farface_session_destroy(NULL);
    farface_model_destroy(NULL);
    puts("clean");
    return 0;
}
