/*
 * farface.hpp - farface.h for C++11 and later: handles that destroy themselves, errors as exceptions
 *
 *     farface::Model model("model.safetensors");
 *     farface::Session session(model);
 *     for (const farface::Face &face : session.detect(farface::rgb(pixels, 640, 480)))
 *         std::printf("%g %g %g %g %g\n", face.x, face.y, face.width, face.height, face.score);
 *
 * Header-only: nothing is compiled into the library for it. Every failure throws farface::Error with
 * the status and the message. Handles move and do not copy; a moved-from or destroyed handle must
 * not be used. Threads as in farface.h: a Model from any, a Session from one at a time.
 */
#ifndef FARFACE_HPP
#define FARFACE_HPP

#include "farface.h"

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace farface {

using Face = farface_face;
using Image = farface_image;
using Options = farface_session_options;

/** A call that failed: what() is the message of farface_last_error(). */
class Error : public std::runtime_error {
public:
    Error(farface_status status, const std::string &message)
        : std::runtime_error(message), status_(status) {}

    /** One of the FARFACE_ERROR_ codes. */
    farface_status status() const noexcept { return status_; }

private:
    farface_status status_;
};

/** Throws Error unless `status` is FARFACE_OK. */
inline void check(farface_status status)
{
    if (status != FARFACE_OK)
        throw Error(status, farface_last_error());
}

/** A picture of one plane; `stride` in bytes, 0 = rows without padding. The pixels are not copied. */
inline Image image(farface_format format, const void *data, uint32_t width, uint32_t height,
                   uint32_t bytes_per_pixel, ptrdiff_t stride = 0)
{
    Image picture = Image();
    picture.width = width;
    picture.height = height;
    picture.format = format;
    picture.planes[0].data = data;
    picture.planes[0].stride = stride != 0 ? stride : static_cast<ptrdiff_t>(width) * bytes_per_pixel;
    return picture;
}

/** A picture of red, green, blue bytes. */
inline Image rgb(const void *data, uint32_t width, uint32_t height, ptrdiff_t stride = 0)
{
    return image(FARFACE_FORMAT_RGB8, data, width, height, 3, stride);
}

/** A picture of blue, green, red bytes. */
inline Image bgr(const void *data, uint32_t width, uint32_t height, ptrdiff_t stride = 0)
{
    return image(FARFACE_FORMAT_BGR8, data, width, height, 3, stride);
}

/** A picture of one byte a pixel. */
inline Image gray(const void *data, uint32_t width, uint32_t height, ptrdiff_t stride = 0)
{
    return image(FARFACE_FORMAT_GRAY8, data, width, height, 1, stride);
}

/** A picture of Y, Cb/Cr 4:2:0, both strides in bytes. */
inline Image nv12(const void *luma, ptrdiff_t luma_stride, const void *chroma,
                  ptrdiff_t chroma_stride, uint32_t width, uint32_t height)
{
    Image picture = image(FARFACE_FORMAT_NV12, luma, width, height, 1, luma_stride);
    picture.planes[1].data = chroma;
    picture.planes[1].stride = chroma_stride;
    return picture;
}

/** A loaded model. Sessions hold it by themselves: it may go before them. */
class Model {
public:
    /** Loads a model file. */
    explicit Model(const std::string &path)
    {
        farface_model *handle = nullptr;
        check(farface_model_load(path.c_str(), &handle));
        handle_.reset(handle);
    }

    /** Loads a model from a file's bytes, which are not kept. */
    Model(const void *data, size_t size)
    {
        farface_model *handle = nullptr;
        check(farface_model_load_memory(data, size, &handle));
        handle_.reset(handle);
    }

    /** The model within the library; throws where it was built without one. */
    static Model default_model()
    {
        farface_model *handle = nullptr;
        check(farface_model_default(&handle));
        return Model(handle);
    }

    /** Name, or "". */
    std::string name() const { return text(farface_model_name); }
    /** Licence of the weights, or "". */
    std::string licence() const { return text(farface_model_licence); }
    /** Data the weights were trained on, or "". */
    std::string training_data() const { return text(farface_model_training_data); }

    /** The model's own settings, to change and to make a session with. */
    Options options() const
    {
        Options options;
        check(farface_session_options_init(&options, sizeof options, get()));
        return options;
    }

    /** The C handle, still owned by this. */
    farface_model *get() const noexcept { return handle_.get(); }

private:
    struct Destroy {
        void operator()(farface_model *handle) const { farface_model_destroy(handle); }
    };

    explicit Model(farface_model *handle) noexcept : handle_(handle) {}

    std::string text(farface_status (*getter)(const farface_model *, const char **)) const
    {
        const char *value = nullptr;
        check(getter(get(), &value));
        return value;
    }

    std::unique_ptr<farface_model, Destroy> handle_;
};

/** A detector at work. */
class Session {
public:
    /** Session with the model's own settings, on one thread. */
    explicit Session(const Model &model) { create(model, nullptr); }

    /** Session with these settings. */
    Session(const Model &model, const Options &options) { create(model, &options); }

    /** The settings. */
    Options options() const
    {
        Options options = Options();
        options.struct_size = sizeof options;
        check(farface_session_get_options(get(), &options));
        return options;
    }

    /** Changes the settings from the next call on. */
    void set_options(const Options &options) { check(farface_session_set_options(get(), &options)); }

    /** Prepares for pictures of this upright size, in pixels. */
    void warmup(uint32_t width, uint32_t height)
    {
        check(farface_session_warmup(get(), width, height));
        reserve();
    }

    /** Bytes held once warmed up for this upright size. */
    uint64_t workspace_bytes(uint32_t width, uint32_t height) const
    {
        uint64_t bytes = 0;
        check(farface_session_workspace_bytes(get(), width, height, &bytes));
        return bytes;
    }

    /** FARFACE_DEVICE_CPU or FARFACE_DEVICE_CUDA. */
    farface_device device() const
    {
        farface_device device = 0;
        check(farface_session_device(get(), &device, nullptr));
        return device;
    }

    /** Finds all faces, best first. The reference is valid until the next call. */
    const std::vector<Face> &detect(const Image &image)
    {
        if (faces_.capacity() == 0)
            reserve();
        size_t count = 0;
        faces_.resize(faces_.capacity());
        farface_status status = farface_detect(get(), &image, faces_.data(), faces_.size(), &count);
        if (status == FARFACE_ERROR_BUFFER_TOO_SMALL) {
            faces_.resize(count);
            status = farface_detect(get(), &image, faces_.data(), faces_.size(), &count);
        }
        if (status != FARFACE_OK)
            count = 0;
        faces_.resize(count);
        check(status);
        return faces_;
    }

    /** Finds the faces of several pictures; any that fails throws. */
    std::vector<std::vector<Face>> detect(const std::vector<Image> &images)
    {
        std::vector<std::vector<Face>> found;
        found.reserve(images.size());
        for (const Image &image : images)
            found.push_back(detect(image));
        return found;
    }

    /** The C handle, still owned by this. */
    farface_session *get() const noexcept { return handle_.get(); }

private:
    struct Destroy {
        void operator()(farface_session *handle) const { farface_session_destroy(handle); }
    };

    void create(const Model &model, const Options *options)
    {
        farface_session *handle = nullptr;
        check(farface_session_create(model.get(), options, &handle));
        handle_.reset(handle);
    }

    /* Room for as many faces as most pictures have, so that detect() seldom allocates. */
    void reserve() { faces_.reserve(256); }

    std::unique_ptr<farface_session, Destroy> handle_;
    std::vector<Face> faces_;
};

} // namespace farface

#endif
