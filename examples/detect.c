/*
 * Finds faces in a binary PPM picture (P6) and prints a line for each: x y width height score.
 *
 *     cc detect.c -o detect $(pkg-config --cflags --libs farface)
 *     ./detect model.safetensors picture.ppm
 */
#include <farface.h>
#include <stdio.h>
#include <stdlib.h>

/* Next number of a PPM header; comments run from '#' to the line's end. -1 where there is none. */
static long header_number(FILE *file)
{
    long value = -1;
    int c = getc(file);
    while (c == '#' || c == ' ' || c == '\t' || c == '\r' || c == '\n') {
        while (c == '#' && (c = getc(file)) != '\n' && c != EOF)
            c = '#';
        c = getc(file);
    }
    for (; c >= '0' && c <= '9' && value < 100000000; c = getc(file))
        value = (value < 0 ? 0 : value * 10) + (c - '0');
    return value;
}

/* Pixels of a P6 file with 8 bits a channel, for free(); NULL with a message where it is none. */
static unsigned char *read_ppm(const char *path, long *width, long *height)
{
    unsigned char *pixels = NULL;
    size_t bytes;
    FILE *file = fopen(path, "rb");
    if (file == NULL) {
        perror(path);
        return NULL;
    }
    if (getc(file) != 'P' || getc(file) != '6' || (*width = header_number(file)) < 1 ||
        (*height = header_number(file)) < 1 || header_number(file) != 255 || *width > 100000 ||
        *height > 100000) {
        fprintf(stderr, "%s: not a P6 picture with 8 bits a channel\n", path);
    } else {
        bytes = (size_t)*width * (size_t)*height * 3;
        pixels = malloc(bytes);
        if (pixels == NULL || fread(pixels, 1, bytes, file) != bytes) {
            fprintf(stderr, "%s: truncated, or too large for memory\n", path);
            free(pixels);
            pixels = NULL;
        }
    }
    fclose(file);
    return pixels;
}

/* The message of the last call, and of what it was about. */
static int failed(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, farface_last_error());
    return 1;
}

/* Finds and prints all faces of the picture. 0 where all went well. */
static int detect(farface_session *session, const farface_image *image)
{
    farface_face *faces;
    size_t capacity = 64, count = 0, i;
    farface_status status;
    for (;;) {
        faces = malloc(capacity * sizeof *faces);
        if (faces == NULL) {
            fprintf(stderr, "no memory for %lu faces\n", (unsigned long)capacity);
            return 1;
        }
        status = farface_detect(session, image, faces, capacity, &count);
        if (status != FARFACE_ERROR_BUFFER_TOO_SMALL)
            break;
        free(faces); /* now we know how many there are */
        capacity = count;
    }
    for (i = 0; status == FARFACE_OK && i < count; i++)
        printf("%.2f %.2f %.2f %.2f %.4f\n", faces[i].x, faces[i].y, faces[i].width,
               faces[i].height, faces[i].score);
    free(faces);
    return status == FARFACE_OK ? 0 : failed("detect");
}

int main(int argc, char **argv)
{
    farface_model *model = NULL;
    farface_session *session = NULL;
    farface_image image = {0};
    unsigned char *pixels;
    long width = 0, height = 0;
    int result = 1;

    if (argc != 3) {
        fprintf(stderr, "usage: %s model.safetensors picture.ppm\n", argv[0]);
        return 2;
    }
    pixels = read_ppm(argv[2], &width, &height);
    if (pixels == NULL)
        return 1;
    image.width = (uint32_t)width;
    image.height = (uint32_t)height;
    image.format = FARFACE_FORMAT_RGB8;
    image.planes[0].data = pixels;
    image.planes[0].stride = 3 * (ptrdiff_t)width;

    if (farface_model_load(argv[1], &model) != FARFACE_OK)
        failed("model");
    else if (farface_session_create(model, NULL, &session) != FARFACE_OK)
        failed("session");
    else
        result = detect(session, &image);

    farface_session_destroy(session);
    farface_model_destroy(model);
    free(pixels);
    return result;
}
