/*
 * Warms a session up, then detects where the kernel kills the process at any system call but
 * read, write and exit (seccomp's strict mode), and writes the number of faces as 8 digits.
 *
 *     silent model picture.rgb width height rgb|nv12 tile_px octaves [loud]
 *
 * With "loud" it makes a system call of its own, to show that this is deadly.
 */
#define _GNU_SOURCE
#include <farface.h>
#include <linux/seccomp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

static farface_face faces[5000];
static unsigned char pixels[1 << 24];

static void must(farface_status status)
{
    if (status != FARFACE_OK) {
        fprintf(stderr, "%s\n", farface_last_error());
        exit(1);
    }
}

int main(int argc, char **argv)
{
    farface_model *model;
    farface_session *session;
    farface_session_options options;
    farface_image image = {0};
    farface_status status = FARFACE_OK;
    size_t count = 0;
    char text[9] = "        ";
    int i;
    FILE *file;

    if (argc < 8 || (file = fopen(argv[2], "rb")) == NULL)
        return 2;
    if (fread(pixels, 1, sizeof pixels, file) == 0)
        return 2;
    fclose(file);
    image.width = (uint32_t)atoi(argv[3]);
    image.height = (uint32_t)atoi(argv[4]);
    image.planes[0].data = pixels;
    if (strcmp(argv[5], "nv12") == 0) {
        image.format = FARFACE_FORMAT_NV12;
        image.planes[0].stride = (ptrdiff_t)image.width;
        image.planes[1].data = pixels + (size_t)image.width * image.height;
        image.planes[1].stride = (ptrdiff_t)image.width;
    } else {
        image.format = FARFACE_FORMAT_RGB8;
        image.planes[0].stride = 3 * (ptrdiff_t)image.width;
    }
    must(farface_model_load(argv[1], &model));
    must(farface_session_options_init(&options, sizeof options, model));
    options.score_threshold = 0.3f;
    options.tile_px = (uint32_t)atoi(argv[6]);
    if (atoi(argv[7]) > 0) {
        options.pyramid = FARFACE_PYRAMID_OCTAVES;
        options.pyramid_min = (float)-atoi(argv[7]);
    }
    must(farface_session_create(model, &options, &session));
    must(farface_session_warmup(session, image.width, image.height));

    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT) != 0)
        return 77; /* the kernel does not let us test */
    for (i = 0; i < 2; i++)
        status |= farface_detect(session, &image, faces, 5000, &count);
    if (argc > 8)
        syscall(SYS_getppid);
    /* An error is silent too. */
    status |= farface_detect(session, &image, faces, 0, &count) ^ FARFACE_ERROR_BUFFER_TOO_SMALL;
    for (i = 7; i >= 0; i--, count /= 10)
        text[i] = (char)('0' + count % 10);
    if (write(1, text, 8) != 8)
        status = FARFACE_ERROR_IO;
    syscall(SYS_exit, status); /* exit_group would be killed */
    return 0;
}
