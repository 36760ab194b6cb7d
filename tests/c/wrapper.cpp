// farface.hpp: handles move, errors throw, results grow.
//
//     wrapper model.safetensors
#include <farface.hpp>

#include <cstdio>
#include <cstdlib>
#include <utility>

static void must(bool condition, int line)
{
    if (!condition) {
        std::fprintf(stderr, "line %d\n", line);
        std::exit(1);
    }
}
#define MUST(condition) must((condition), __LINE__)

template <typename F> static farface_status thrown(F call)
{
    try {
        call();
    } catch (const farface::Error &error) {
        MUST(error.what()[0] != 0);
        return error.status();
    }
    return FARFACE_OK;
}

int main(int, char **argv)
{
    MUST(thrown([] { farface::Model model("no such file"); }) == FARFACE_ERROR_IO);
    MUST(thrown([] { farface::Model model("short", 5); }) == FARFACE_ERROR_INVALID_MODEL);
    const farface_status status = thrown([] { MUST(farface::Model::default_model().name() == "farface-nano"); });
    MUST(status == FARFACE_OK || status == FARFACE_ERROR_UNSUPPORTED);

    farface::Model first(argv[1]);
    MUST(first.name() == "random-1" && first.licence().empty() && first.training_data().empty());
    farface::Options options = first.options();
    options.score_threshold = 0;
    options.nms_iou = 1;
    farface::Session made(first, options);
    farface::Model second = std::move(first);
    {
        farface::Model gone = std::move(second);
    }
    farface::Session session = std::move(made);
    MUST(session.device() == FARFACE_DEVICE_CPU && session.workspace_bytes(96, 96) > 0);
    session.warmup(96, 96);

    // More faces than are reserved at first.
    std::vector<unsigned char> pixels(3 * 96 * 96);
    for (size_t i = 0; i < pixels.size(); i++)
        pixels[i] = static_cast<unsigned char>(i * i / 31 + i);
    const farface::Image rgb = farface::rgb(pixels.data(), 96, 96);
    const size_t all = session.detect(rgb).size();
    MUST(all > 256 && session.detect(rgb).size() == all);

    const farface::Image nv12 = farface::nv12(pixels.data(), 96, pixels.data() + 96 * 96, 96, 96, 96);
    const farface::Image bottom_up = farface::bgr(pixels.data() + 3 * 96 * 95, 96, 96, -3 * 96);
    const std::vector<std::vector<farface::Face>> batch =
        session.detect(std::vector<farface::Image>{rgb, nv12, bottom_up, farface::gray(pixels.data(), 96, 96)});
    MUST(batch.size() == 4 && batch[0].size() == all && !batch[3].empty());

    options = session.options();
    options.max_faces = 3;
    session.set_options(options);
    MUST(session.detect(rgb).size() == 3 && session.options().max_faces == 3);
    options.max_candidates = 0;
    MUST(thrown([&] { session.set_options(options); }) == FARFACE_ERROR_INVALID_ARGUMENT);
    MUST(thrown([&] { session.detect(farface::rgb(nullptr, 96, 96)); }) == FARFACE_ERROR_INVALID_IMAGE);
    MUST(thrown([&] { session.warmup(0, 1); }) == FARFACE_ERROR_INVALID_ARGUMENT);
    std::puts("clean");
    return 0;
}
