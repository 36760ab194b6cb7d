// Finds faces in a binary PPM picture (P6) and prints a line for each: x y width height score.
//
//     c++ -std=c++11 detect.cpp -o detect $(pkg-config --cflags --libs farface)
//     ./detect model.safetensors picture.ppm
#include <farface.hpp>

#include <cstdio>
#include <exception>
#include <fstream>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

struct Picture {
    uint32_t width, height;
    std::vector<char> rgb;
};

// Next number of a PPM header; comments run from '#' to the line's end.
static uint32_t header_number(std::istream &in)
{
    while ((in >> std::ws).peek() == '#')
        in.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
    uint32_t value = 0;
    in >> value;
    return value;
}

static Picture read_ppm(const char *path)
{
    std::ifstream in(path, std::ios::binary);
    if (!in)
        throw std::runtime_error(std::string(path) + ": cannot be opened");
    Picture picture;
    const bool p6 = in.get() == 'P' && in.get() == '6';
    picture.width = header_number(in);
    picture.height = header_number(in);
    const uint32_t most = header_number(in);
    in.get(); // the one space before the pixels
    if (!p6 || !in || most != 255 || picture.width > 100000 || picture.height > 100000)
        throw std::runtime_error(std::string(path) + ": not a P6 picture with 8 bits a channel");
    picture.rgb.resize(size_t(3) * picture.width * picture.height);
    if (!in.read(picture.rgb.data(), std::streamsize(picture.rgb.size())))
        throw std::runtime_error(std::string(path) + ": truncated");
    return picture;
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        std::fprintf(stderr, "usage: %s model.safetensors picture.ppm\n", argv[0]);
        return 2;
    }
    try {
        const Picture picture = read_ppm(argv[2]);
        const farface::Model model((std::string(argv[1])));
        farface::Session session(model);
        const farface::Image image = farface::rgb(picture.rgb.data(), picture.width, picture.height);
        for (const farface::Face &face : session.detect(image))
            std::printf("%.2f %.2f %.2f %.2f %.4f\n", double(face.x), double(face.y),
                        double(face.width), double(face.height), double(face.score));
    } catch (const std::exception &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
