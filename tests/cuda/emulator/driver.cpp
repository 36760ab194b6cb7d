// A libcuda.so.1 that runs the kernels of cuda/ on the CPU: what src/gpu calls of the driver, done in order and at once, but for what
// waits for other ranks (nccl.cpp) or for an event behind that; or, if wanted, as late as may be (farface_emulator_late).
//
// It is stricter than the driver where that finds faults: memory must be inside one allocation, a context current on the thread that
// calls, an argument as large as the kernel's. Any call can be made to fail (farface_emulator_fail_at; of one thread alone,
// farface_emulator_fail_here), and what was made and not given back is counted (farface_emulator_live).

#include "fibers.hpp"
#include "library.hpp"

#include <chrono>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

namespace {

enum Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    INVALID_PTX = 218,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    CAPTURE_UNSUPPORTED = 900,
    UNKNOWN = 999,
};

using Pointer = unsigned long long;

struct Graph {
    std::vector<std::function<int()>> work;
};
// What work returns that has to wait.
constexpr int WAITS = -1;

struct Stream {
    std::unique_ptr<Graph> capture;
    // Given and not yet done.
    std::deque<std::function<int()>> work;
    int failed = SUCCESS;
    // Whose it is: ranks that share the device are threads, and on devices of their own would not wait for each other.
    std::thread::id thread = std::this_thread::get_id();
};
struct Passing {
    long marked = 0, passed = 0;
    std::chrono::steady_clock::time_point at;
};
struct Event {
    std::shared_ptr<Passing> passing = std::make_shared<Passing>();
};
struct Module {
    // Of PTX the names of its kernels; what the emulated compiler makes has all.
    bool ptx = false;
    std::set<std::string> names;
};
struct Function {
    std::size_t bytes;
    emulator::Body body;
    int shared = 48 << 10;
    long launches = 0;
};

std::recursive_mutex lock;
std::map<Pointer, std::size_t> allocations; // device and pinned memory by its first byte
long calls, fail_at, live;
bool initialized, idle, late;
int refused;
int retained, capability = 90, loaded;
Stream default_stream;
std::set<Stream *> streams{&default_stream};
std::map<std::string, std::unique_ptr<Function>> functions; // they live as long as the library, as kernels do
thread_local std::vector<void *> contexts; // the last is current
thread_local long own_calls, own_fail_at;
char context;

// Counts a call; whether it is one that shall fail.
bool fails()
{
    calls++;
    own_calls++;
    return calls == fail_at || own_calls == own_fail_at;
}

// Whether a call may go on.
int begin(bool needs_context)
{
    if (fails())
        return UNKNOWN;
    if (!initialized)
        return NOT_INITIALIZED;
    if (needs_context && (contexts.empty() || contexts.back() != &context || retained == 0))
        return INVALID_CONTEXT;
    return SUCCESS;
}

bool inside(Pointer p, std::size_t bytes)
{
    auto next = allocations.upper_bound(p);
    if (next == allocations.begin())
        return false;
    auto &[first, size] = *std::prev(next);
    return p - first <= size && bytes <= size - (p - first);
}

// Does what a stream has until something waits; whether anything was done.
bool advance(Stream &s)
{
    bool any = false;
    while (!s.work.empty()) {
        int done = s.work.front()();
        if (done == WAITS)
            break;
        if (done && !s.failed)
            s.failed = done;
        s.work.pop_front();
        any = true;
    }
    return any;
}

// Likewise, and of the other streams as much as it waits for.
void advance_for(Stream &s)
{
    advance(s);
    bool any = true;
    while (any && !s.work.empty()) {
        any = false;
        for (Stream *other : streams)
            any = advance(*other) || any;
    }
}

int run(void *stream, std::function<int()> work)
{
    Stream *s = stream ? (Stream *)stream : &default_stream;
    if (s->capture) {
        s->capture->work.push_back(std::move(work));
        return SUCCESS;
    }
    s->work.push_back(std::move(work));
    if (late)
        return SUCCESS;
    advance(*s);
    return std::exchange(s->failed, SUCCESS);
}

// Waits until a stream has done what it has; others may give in the meantime what it waits for.
int drain(Stream *s)
{
    for (;;) {
        {
            std::lock_guard<std::recursive_mutex> guard(lock);
            if (!s)
                s = &default_stream;
            advance_for(*s);
            if (s->work.empty())
                return std::exchange(s->failed, SUCCESS);
        }
        usleep(100);
    }
}

int allocate(void **p, std::size_t bytes)
{
    if (bytes == 0 || !p)
        return INVALID_VALUE;
    // At a multiple of 256, and no more than was asked for.
    if (posix_memalign(p, 256, bytes))
        return OUT_OF_MEMORY;
    std::memset(*p, idle ? 0 : 0xff, bytes);
    allocations[(Pointer)*p] = bytes;
    live++;
    return SUCCESS;
}

// As the driver, which waits for the device: for whatever this thread has given it, sums that wait for other ranks too.
int release(void *p)
{
    for (;;) {
        {
            std::lock_guard<std::recursive_mutex> guard(lock);
            bool done = true;
            for (Stream *s : streams) {
                advance_for(*s);
                done = done && (s->thread != std::this_thread::get_id() || s->work.empty());
            }
            if (done) {
                if (!allocations.erase((Pointer)p))
                    return INVALID_VALUE;
                std::free(p);
                live--;
                return SUCCESS;
            }
        }
        usleep(100);
    }
}

} // namespace

#define ENTRY(needs_context)                                                                                     \
    std::lock_guard<std::recursive_mutex> guard(lock);                                                           \
    if (int failed = begin(needs_context))                                                                       \
    return failed

extern "C" {

// The call of this number, counted from 1 since the last time this was asked for, fails; 0 for none.
void farface_emulator_fail_at(long n)
{
    std::lock_guard<std::recursive_mutex> guard(lock);
    calls = 0;
    fail_at = n;
}
long farface_emulator_calls() { return calls; }
// The same of the thread that calls this, and of its calls alone.
void farface_emulator_fail_here(long n)
{
    own_calls = 0;
    own_fail_at = n;
}
long farface_emulator_calls_here() { return own_calls; }
// How often a kernel was launched.
long farface_emulator_launches(const char *kernel)
{
    std::lock_guard<std::recursive_mutex> guard(lock);
    auto found = functions.find(kernel);
    return found == functions.end() ? 0 : found->second->launches;
}
long farface_emulator_live() { return live; }
// Kernels do nothing, and memory is zeros: for what does not ask for results.
void farface_emulator_idle(int on) { idle = on != 0; }
// Libraries refuse what they could compute, where they can be told to (library.hpp).
void farface_emulator_refuse(int where) { refused = where; }
int farface_emulator_refuses() { return refused; }
// Work is done when somebody waits for it, or asks after what waits for it: what is not ordered by an event shows.
void farface_emulator_late(int on) { late = on != 0; }
// Of nccl.cpp: counts what it has made, and gives work to a stream that writes so many bytes at `to`.
void farface_emulator_count(int by)
{
    std::lock_guard<std::recursive_mutex> guard(lock);
    live += by;
}
int farface_emulator_give(void *stream, Pointer to, std::size_t bytes, std::function<int()> *work)
{
    std::lock_guard<std::recursive_mutex> guard(lock);
    if (!inside(to, bytes))
        return INVALID_VALUE;
    return run(stream, *work);
}
// The compute capability of the device, as 90 for 9.0.
void farface_emulator_capability(int number) { capability = number; }
// The architecture of the PTX that was loaded last.
int farface_emulator_loaded() { return loaded; }
// The name of a kernel by its number; none behind the last.
const char *farface_emulator_kernel(int number) { return emulator::name(number); }
void farface_emulator_backwards(int on) { emulator::run_backwards(on != 0); }
// What the emulated libraries ask for: library.hpp.
int farface_emulator_begin(int needs_context)
{
    std::lock_guard<std::recursive_mutex> guard(lock);
    return begin(needs_context != 0);
}
void farface_emulator_made(int count)
{
    std::lock_guard<std::recursive_mutex> guard(lock);
    live += count;
}
int farface_emulator_inside(unsigned long long address, std::size_t bytes)
{
    std::lock_guard<std::recursive_mutex> guard(lock);
    return inside(address, bytes);
}
int farface_emulator_run(void *stream, const std::function<int()> *work)
{
    std::lock_guard<std::recursive_mutex> guard(lock);
    return run(stream, [work = *work] { return idle ? SUCCESS : work(); });
}
int cuInit(unsigned)
{
    std::lock_guard<std::recursive_mutex> guard(lock);
    if (fails())
        return UNKNOWN;
    initialized = true;
    return SUCCESS;
}
int cuDriverGetVersion(int *version)
{
    ENTRY(false);
    *version = 13000;
    return SUCCESS;
}
int cuDeviceGetCount(int *count)
{
    ENTRY(false);
    *count = 1;
    return SUCCESS;
}
int cuDeviceGet(int *device, int ordinal)
{
    ENTRY(false);
    *device = ordinal;
    return ordinal == 0 ? SUCCESS : INVALID_DEVICE;
}
int cuDeviceGetName(char *name, int bytes, int)
{
    ENTRY(false);
    std::snprintf(name, (std::size_t)bytes, "%s", "emulated");
    return SUCCESS;
}
int cuDeviceGetAttribute(int *value, int attribute, int)
{
    ENTRY(false);
    switch (attribute) {
    case 8: *value = 48 << 10; break;    // shared memory a block
    case 97: *value = 227 << 10; break;  // what a kernel may ask for
    case 16: *value = 4; break;          // multiprocessors
    case 75: *value = capability / 10; break;
    case 76: *value = capability % 10; break;
    default: return INVALID_VALUE;
    }
    return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void **c, int)
{
    ENTRY(false);
    *c = &context;
    retained++;
    live++;
    return SUCCESS;
}
int cuDevicePrimaryCtxRelease_v2(int)
{
    std::lock_guard<std::recursive_mutex> guard(lock);
    retained--;
    live--;
    return SUCCESS;
}
int cuCtxPushCurrent_v2(void *c)
{
    ENTRY(false);
    if (c != &context)
        return INVALID_CONTEXT;
    contexts.push_back(c);
    return SUCCESS;
}
int cuCtxPopCurrent_v2(void **c)
{
    std::lock_guard<std::recursive_mutex> guard(lock);
    if (contexts.empty())
        return INVALID_CONTEXT;
    *c = contexts.back();
    contexts.pop_back();
    return SUCCESS;
}
int cuMemAlloc_v2(Pointer *p, std::size_t bytes)
{
    ENTRY(true);
    return allocate((void **)p, bytes);
}
int cuMemFree_v2(Pointer p) { return release((void *)p); }
int cuMemHostAlloc(void **p, std::size_t bytes, unsigned)
{
    ENTRY(true);
    return allocate(p, bytes);
}
int cuMemFreeHost(void *p) { return release(p); }
int cuMemcpyHtoDAsync_v2(Pointer to, const void *from, std::size_t bytes, void *stream)
{
    ENTRY(true);
    if (!inside(to, bytes))
        return INVALID_VALUE;
    return run(stream, [=] {
        std::memcpy((void *)to, from, bytes);
        return SUCCESS;
    });
}
int cuMemcpyDtoHAsync_v2(void *to, Pointer from, std::size_t bytes, void *stream)
{
    ENTRY(true);
    if (!inside(from, bytes))
        return INVALID_VALUE;
    return run(stream, [=] {
        std::memcpy(to, (const void *)from, bytes);
        return SUCCESS;
    });
}
int cuMemsetD8Async(Pointer to, unsigned char value, std::size_t bytes, void *stream)
{
    ENTRY(true);
    if (!inside(to, bytes))
        return INVALID_VALUE;
    return run(stream, [=] {
        std::memset((void *)to, value, bytes);
        return SUCCESS;
    });
}
int cuStreamCreate(void **stream, unsigned)
{
    ENTRY(true);
    Stream *s = new Stream;
    streams.insert(s);
    *stream = s;
    live++;
    return SUCCESS;
}
int cuStreamDestroy_v2(void *stream)
{
    std::lock_guard<std::recursive_mutex> guard(lock);
    // Its work is done all the same, by the driver; here what can be.
    advance_for(*(Stream *)stream);
    streams.erase((Stream *)stream);
    delete (Stream *)stream;
    live--;
    return SUCCESS;
}
int cuStreamSynchronize(void *stream)
{
    {
        ENTRY(true);
    }
    return drain((Stream *)stream);
}
int cuStreamQuery(void *stream)
{
    ENTRY(true);
    Stream *s = stream ? (Stream *)stream : &default_stream;
    advance_for(*s);
    if (!s->work.empty())
        return NOT_READY;
    return std::exchange(s->failed, SUCCESS);
}
int cuStreamWaitEvent(void *stream, void *event, unsigned)
{
    ENTRY(true);
    auto passing = ((Event *)event)->passing;
    long marked = passing->marked;
    return run(stream, [=] { return passing->passed >= marked ? SUCCESS : WAITS; });
}
int cuStreamBeginCapture_v2(void *stream, int)
{
    ENTRY(true);
    Stream *s = (Stream *)stream;
    if (!s || s->capture)
        return CAPTURE_UNSUPPORTED;
    s->capture = std::make_unique<Graph>();
    return SUCCESS;
}
int cuStreamEndCapture(void *stream, void **graph)
{
    std::lock_guard<std::recursive_mutex> guard(lock);
    Stream *s = (Stream *)stream;
    if (!s || !s->capture)
        return CAPTURE_UNSUPPORTED;
    *graph = nullptr;
    // As the driver's, a capture ends whether or not there is a graph of it.
    std::unique_ptr<Graph> captured = std::move(s->capture);
    if (int failed = begin(true))
        return failed;
    *graph = captured.release();
    live++;
    return SUCCESS;
}
int cuGraphInstantiateWithFlags(void **exec, void *graph, unsigned long long)
{
    ENTRY(true);
    *exec = new Graph(*(Graph *)graph);
    live++;
    return SUCCESS;
}
int cuGraphLaunch(void *exec, void *stream)
{
    ENTRY(true);
    for (auto &work : ((Graph *)exec)->work)
        if (int failed = run(stream, work))
            return failed;
    return SUCCESS;
}
int cuGraphExecDestroy(void *exec)
{
    std::lock_guard<std::recursive_mutex> guard(lock);
    delete (Graph *)exec;
    live--;
    return SUCCESS;
}
int cuGraphDestroy(void *graph)
{
    std::lock_guard<std::recursive_mutex> guard(lock);
    delete (Graph *)graph;
    live--;
    return SUCCESS;
}
int cuEventCreate(void **event, unsigned)
{
    ENTRY(true);
    *event = new Event;
    live++;
    return SUCCESS;
}
int cuEventDestroy_v2(void *event)
{
    std::lock_guard<std::recursive_mutex> guard(lock);
    delete (Event *)event;
    live--;
    return SUCCESS;
}
int cuEventRecord(void *event, void *stream)
{
    ENTRY(true);
    auto passing = ((Event *)event)->passing;
    long mark = ++passing->marked;
    return run(stream, [=] {
        passing->passed = mark;
        passing->at = std::chrono::steady_clock::now();
        return SUCCESS;
    });
}
int cuEventSynchronize(void *event)
{
    auto passing = ((Event *)event)->passing;
    {
        ENTRY(true);
    }
    for (;;) {
        {
            std::lock_guard<std::recursive_mutex> guard(lock);
            for (Stream *s : streams)
                advance_for(*s);
            if (passing->passed == passing->marked)
                return SUCCESS;
        }
        usleep(100);
    }
}
int cuEventElapsedTime(float *ms, void *start, void *end)
{
    ENTRY(true);
    *ms = std::chrono::duration<float, std::milli>(((Event *)end)->passing->at - ((Event *)start)->passing->at).count();
    return SUCCESS;
}
int cuModuleLoadData(void **module, const void *image)
{
    ENTRY(true);
    if (!image)
        return INVALID_VALUE;
    auto made = std::make_unique<Module>();
    // PTX says at its head what it is for, then has `.entry NAME(` for each kernel.
    const char *text = (const char *)image;
    if (std::strcmp(text, "emulated") != 0) {
        const char *target = std::strstr(text, "\n.target sm_");
        if (!target)
            return INVALID_PTX;
        loaded = std::atoi(target + std::strlen("\n.target sm_"));
        if (loaded > capability)
            return NO_BINARY_FOR_GPU;
        made->ptx = true;
        const char *entry = text;
        while ((entry = std::strstr(entry, ".entry "))) {
            entry += std::strlen(".entry ");
            made->names.insert(std::string(entry, std::strcspn(entry, "(")));
        }
    }
    *module = made.release();
    live++;
    return SUCCESS;
}
int cuModuleUnload(void *module)
{
    std::lock_guard<std::recursive_mutex> guard(lock);
    delete (Module *)module;
    live--;
    return SUCCESS;
}
int cuModuleGetFunction(void **function, void *module, const char *name)
{
    ENTRY(true);
    if (((Module *)module)->ptx && !((Module *)module)->names.count(name))
        return NOT_FOUND;
    auto &f = functions[name];
    if (!f) {
        Function made{};
        if (!emulator::find(name, &made.bytes, &made.body))
            return NOT_FOUND;
        f = std::make_unique<Function>(made);
    }
    *function = f.get();
    return SUCCESS;
}
int cuFuncSetAttribute(void *function, int attribute, int value)
{
    ENTRY(true);
    if (attribute != 8 || value > 227 << 10)
        return INVALID_VALUE;
    ((Function *)function)->shared = value;
    return SUCCESS;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra)
{
    ENTRY(true);
    Function *f = (Function *)function;
    bool fits = gx && gy && gz && bx && by && bz && gy < 65536 && gz < 65536 && (u64)bx * by * bz <= 1024;
    // Arguments come as one block, whose size can be compared: CU_LAUNCH_PARAM_BUFFER_POINTER, _SIZE, _END.
    bool block = !parameters && extra && extra[0] == (void *)1 && extra[2] == (void *)2 && extra[4] == nullptr;
    if (!f || !fits || !block || (int)shared > f->shared)
        return INVALID_VALUE;
    std::size_t bytes = *(std::size_t *)extra[3];
    if (bytes != f->bytes) {
        std::fprintf(stderr, "an argument of %zu bytes for a kernel that takes %zu\n", bytes, f->bytes);
        return INVALID_VALUE;
    }
    auto arguments = std::make_shared<std::vector<u64>>((bytes + 7) / 8);
    std::memcpy(arguments->data(), extra[1], bytes);
    f->launches++;
    return run(stream, [=] {
        if (!idle)
            emulator::launch(f->body, arguments->data(), {gx, gy, gz}, {bx, by, bz}, shared);
        return SUCCESS;
    });
}
int cuGetErrorName(int error, const char **text)
{
    switch (error) {
    case INVALID_VALUE: *text = "CUDA_ERROR_INVALID_VALUE"; break;
    case OUT_OF_MEMORY: *text = "CUDA_ERROR_OUT_OF_MEMORY"; break;
    case NOT_INITIALIZED: *text = "CUDA_ERROR_NOT_INITIALIZED"; break;
    case INVALID_DEVICE: *text = "CUDA_ERROR_INVALID_DEVICE"; break;
    case INVALID_CONTEXT: *text = "CUDA_ERROR_INVALID_CONTEXT"; break;
    case NO_BINARY_FOR_GPU: *text = "CUDA_ERROR_NO_BINARY_FOR_GPU"; break;
    case INVALID_PTX: *text = "CUDA_ERROR_INVALID_PTX"; break;
    case NOT_FOUND: *text = "CUDA_ERROR_NOT_FOUND"; break;
    default: *text = "CUDA_ERROR_UNKNOWN"; break;
    }
    return SUCCESS;
}
int cuGetErrorString(int, const char **text)
{
    *text = "an emulated error";
    return SUCCESS;
}

} // extern "C"
