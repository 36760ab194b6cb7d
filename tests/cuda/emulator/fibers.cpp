// Runs a kernel's blocks side by side, the threads of each as fibers.

#include "fibers.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <iterator>
#include <map>
#include <mutex>
#include <string>
#include <sys/mman.h>
#include <thread>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// void emulator_switch(void **save, void *load): goes on with another stack, on which it was called before.
#if defined(__x86_64__)
asm(R"(
.text
.type emulator_switch,@function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch,.-emulator_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.type emulator_switch,%function
emulator_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x2, sp
    str x2, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size emulator_switch,.-emulator_switch
)");
#else
#error "fibers for this processor are not written"
#endif
extern "C" void emulator_switch(void **save, void *load);

namespace emulator {

ON_THREAD Index thread_index, block_index, block_size, grid_size;
ON_THREAD unsigned char *shared_memory;

namespace {

constexpr std::size_t STACK = 128 << 10;
constexpr unsigned MOST_THREADS = 1024;
// Threads of a grid from which on its blocks are shared between the processor's: below, waking another takes longer.
constexpr std::size_t WORTH_SHARING = 2048;

struct Kernel {
    std::size_t bytes;
    Body body;
};
std::map<std::string, Kernel> &kernels()
{
    static std::map<std::string, Kernel> all;
    return all;
}

// What a fiber waits for.
enum class Waits { Nothing, Barrier, Warp, Ended };

struct Fiber {
    char *stack = nullptr;
    void *pointer = nullptr; // its stack's, while it does not run
    void *sanitizer = nullptr;
    Index index{};
    Waits waits = Waits::Ended;
};

struct Warp {
    Slot slots[2][32];
    unsigned arrived = 0, running = 0, turn = 0;
};

// A kernel on its grid.
struct Launch {
    Body body;
    const void *arguments;
    Index grid, block;
    std::size_t shared;
    std::atomic<std::size_t> next{0}; // block that nobody has taken

    std::size_t blocks() const { return (std::size_t)grid.x * grid.y * grid.z; }
};

// What a thread of the processor runs blocks with, one after the other.
struct Runner {
    Fiber fibers[MOST_THREADS];
    Warp warps[MOST_THREADS / 32];
    unsigned count, current, arrived, running;
    void *scheduler;
    const void *scheduler_stack;
    std::size_t scheduler_size;
    const Launch *launch;

    void leave(bool ended);
    void release_barrier();
    void release_warp(unsigned w);
    void start(unsigned i);
    void resume(unsigned i);
    void run_block();
    void take_blocks(Launch &l);
};
ON_THREAD Runner *mine;
bool backwards;

void Runner::leave(bool ended)
{
    Fiber &f = fibers[current];
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(ended ? nullptr : &f.sanitizer, scheduler_stack, scheduler_size);
#endif
    emulator_switch(&f.pointer, scheduler);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(f.sanitizer, &scheduler_stack, &scheduler_size);
#endif
    (void)ended;
    thread_index = f.index;
}

void Runner::release_barrier()
{
    if (running > 0 && arrived == running) {
        arrived = 0;
        for (unsigned i = 0; i < count; i++)
            if (fibers[i].waits == Waits::Barrier)
                fibers[i].waits = Waits::Nothing;
    }
}

void Runner::release_warp(unsigned w)
{
    Warp &warp = warps[w];
    if (warp.running > 0 && warp.arrived == warp.running) {
        warp.arrived = 0;
        warp.turn ^= 1;
        for (unsigned i = w * 32; i < count && i < w * 32 + 32; i++)
            if (fibers[i].waits == Waits::Warp)
                fibers[i].waits = Waits::Nothing;
    }
}

void enter()
{
    Runner &r = *mine;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &r.scheduler_stack, &r.scheduler_size);
#endif
    thread_index = r.fibers[r.current].index;
    r.launch->body(r.launch->arguments);
    r.fibers[r.current].waits = Waits::Ended;
    r.running--;
    r.warps[r.current / 32].running--;
    r.release_barrier();
    r.release_warp(r.current / 32);
    r.leave(true);
}

void Runner::start(unsigned i)
{
    Fiber &f = fibers[i];
    if (!f.stack) {
        void *p = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED)
            abort();
        f.stack = (char *)p;
    }
    // As emulator_switch leaves a stack, with `enter` to return to.
#if defined(__x86_64__)
    void **top = (void **)(f.stack + STACK) - 2;
    top[0] = (void *)enter;
    top[1] = nullptr;
    for (int k = 1; k <= 6; k++)
        top[-k] = nullptr;
    f.pointer = top - 6;
#else
    void **top = (void **)(f.stack + STACK - 160);
    std::memset(top, 0, 160);
    top[11] = (void *)enter;
    f.pointer = top;
#endif
    f.waits = Waits::Nothing;
}

void Runner::resume(unsigned i)
{
    current = i;
#ifdef __SANITIZE_ADDRESS__
    void *own;
    __sanitizer_start_switch_fiber(&own, fibers[i].stack, STACK);
#endif
    emulator_switch(&scheduler, fibers[i].pointer);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#endif
}

void Runner::run_block()
{
    arrived = 0;
    running = count;
    for (unsigned i = 0; i < count; i++) {
        fibers[i].index = {i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y)};
        start(i);
    }
    for (unsigned w = 0; w * 32 < count; w++) {
        warps[w].arrived = 0;
        warps[w].turn = 0;
        warps[w].running = count - w * 32 < 32 ? count - w * 32 : 32;
    }
    while (running > 0) {
        bool any = false;
        for (unsigned k = 0; k < count; k++) {
            unsigned i = backwards ? count - 1 - k : k;
            // As far as it goes without the others of its block.
            while (fibers[i].waits == Waits::Nothing) {
                any = true;
                resume(i);
            }
        }
        if (!any && running > 0) {
            std::fprintf(stderr, "a block waits for itself: not all of its threads come to a barrier\n");
            std::abort();
        }
    }
}

// Runs blocks until none is left that nobody has taken.
void Runner::take_blocks(Launch &l)
{
    launch = &l;
    grid_size = l.grid;
    block_size = l.block;
    count = l.block.x * l.block.y * l.block.z;
    std::size_t lines = (l.shared + 127) / 128 * 128 + 128;
    unsigned char *memory = (unsigned char *)std::aligned_alloc(128, lines);
    if (!memory)
        std::abort();
    shared_memory = memory;
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(memory + l.shared, lines - l.shared);
#endif
    std::size_t b;
    while ((b = l.next++) < l.blocks()) {
        block_index = {(unsigned)(b % l.grid.x), (unsigned)(b / l.grid.x % l.grid.y),
                       (unsigned)(b / l.grid.x / l.grid.y)};
        std::memset(memory, 0xff, l.shared);
        run_block();
    }
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(memory + l.shared, lines - l.shared);
#endif
    std::free(memory);
}

Runner &runner()
{
    if (!mine)
        mine = new Runner{}; // as long as the thread; they are few
    return *mine;
}

// Threads beside the one that launches. One launch at a time has them: the driver's lock.
class Team {
    std::mutex lock;
    std::condition_variable begin, end;
    Launch *launch = nullptr;
    unsigned members, wanted = 0, busy = 0;

    void work()
    {
        std::unique_lock<std::mutex> held(lock);
        for (;;) {
            begin.wait(held, [this] { return wanted > 0; });
            wanted--;
            held.unlock();
            runner().take_blocks(*launch);
            held.lock();
            if (--busy == 0)
                end.notify_one();
        }
    }

public:
    Team() : members(std::min(std::max(std::thread::hardware_concurrency(), 1u), 8u) - 1)
    {
        for (unsigned i = 0; i < members; i++)
            std::thread([this] { work(); }).detach();
    }

    void run(Launch &l)
    {
        std::size_t each = (std::size_t)l.block.x * l.block.y * l.block.z;
        bool shared = l.blocks() * each >= WORTH_SHARING;
        unsigned helpers = shared ? (unsigned)std::min<std::size_t>(members, l.blocks() - 1) : 0;
        if (helpers > 0) {
            std::lock_guard<std::mutex> held(lock);
            launch = &l;
            wanted = busy = helpers;
            begin.notify_all();
        }
        runner().take_blocks(l);
        if (helpers > 0) {
            std::unique_lock<std::mutex> held(lock);
            // Who has not begun need not.
            busy -= wanted;
            wanted = 0;
            end.wait(held, [this] { return busy == 0; });
        }
    }
};

} // namespace

void barrier()
{
    Runner &r = *mine;
    r.fibers[r.current].waits = Waits::Barrier;
    r.arrived++;
    r.release_barrier();
    if (r.fibers[r.current].waits == Waits::Barrier)
        r.leave(false);
}

const Slot *together(const Slot &own)
{
    Runner &r = *mine;
    unsigned w = r.current / 32;
    Warp &warp = r.warps[w];
    Slot *slots = warp.slots[warp.turn];
    slots[r.current % 32] = own;
    r.fibers[r.current].waits = Waits::Warp;
    warp.arrived++;
    r.release_warp(w);
    if (r.fibers[r.current].waits == Waits::Warp)
        r.leave(false);
    return slots;
}

unsigned lane() { return mine->current % 32; }

Register::Register(const char *name, std::size_t bytes, Body body)
{
    if (!kernels().insert({name, {bytes, body}}).second) {
        std::fprintf(stderr, "two kernels are called %s\n", name);
        std::abort();
    }
}

bool find(const char *name, std::size_t *bytes, Body *body)
{
    auto found = kernels().find(name);
    if (found == kernels().end())
        return false;
    *bytes = found->second.bytes;
    *body = found->second.body;
    return true;
}

const char *name(int number)
{
    if (number < 0 || number >= (int)kernels().size())
        return nullptr;
    return std::next(kernels().begin(), number)->first.c_str();
}

void launch(Body kernel, const void *args, Index grid, Index block, std::size_t shared)
{
    // It stays: its threads wait until the process ends.
    static Team &team = *new Team;
    Launch l{kernel, args, grid, block, shared};
    team.run(l);
}

void run_backwards(bool on) { backwards = on; }

float half_to_float(std::uint16_t bits)
{
    static const float *table = [] {
        float *table = new float[65536];
        for (unsigned i = 0; i < 65536; i++) {
            unsigned exponent = i >> 10 & 31, mantissa = i & 1023;
            float v = exponent == 0    ? std::ldexp((float)mantissa, -24)
                      : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                       : std::ldexp((float)(mantissa | 1024), (int)exponent - 25);
            table[i] = i & 0x8000 ? -v : v;
        }
        return table;
    }();
    return table[bits];
}

std::uint16_t float_to_half(float v)
{
    std::uint32_t bits;
    std::memcpy(&bits, &v, 4);
    std::uint16_t sign = (std::uint16_t)(bits >> 16 & 0x8000);
    float size = std::fabs(v);
    if (v != v)
        return 0x7fff;
    if (size >= 65520.0f)
        return sign | 0x7c00;
    if (size == 0.0f)
        return sign;
    int exponent;
    std::frexp(size, &exponent);
    // Of the last place: half's has 11 bits, and none below 2^-24.
    int last = exponent - 11 > -24 ? exponent - 11 : -24;
    float places = std::nearbyint(std::ldexp(size, -last));
    int p = (int)places;
    if (last == -24)
        return (std::uint16_t)(sign | p);
    // 1024 <= p <= 2048, the last of which is the next power of two.
    return (std::uint16_t)(sign | (((last + 24) << 10) + p));
}

} // namespace emulator
