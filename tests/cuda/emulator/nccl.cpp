// A libnccl.so.2 that adds up through files: ranks are threads of one process or processes of one machine, which find each other by a
// folder that their identity names. A sum is work of an emulated stream, not done until every rank has come to it; any call can be made
// to fail (farface_emulated_nccl_fail_at), and communicators count among what the driver's emulator calls live.

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fstream>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

namespace {

enum Result { SUCCESS = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6 };
constexpr int UINT32 = 3, FLOAT32 = 7, SUM = 0, MEAN = 4;

struct Id {
    char internal[128];
};

// What a rank says of a sum before its values.
struct Head {
    std::uint64_t count;
    int type, reduce;
};

struct Shared {
    std::string folder;
    int ranks, rank;
    long next = 0;
    // Of the last sum; whatever was given to another stream before has to be done by then.
    void *stream = nullptr;
    std::atomic<long> done{0};
    std::atomic<bool> aborted{false};
    std::atomic<int> failed{SUCCESS};

    std::string file(const std::string &name, int of) const { return folder + "/" + name + "." + std::to_string(of); }
    void remove_own(const std::string &name) const { unlink(file(name, rank).c_str()); }
};

struct Comm {
    std::shared_ptr<Shared> shared = std::make_shared<Shared>();
};

std::atomic<long> calls, fail_at;
thread_local int group;

bool fails() { return ++calls == fail_at; }

template <class F> F of_driver(const char *name)
{
    void *found = dlsym(RTLD_DEFAULT, name);
    if (!found) {
        std::fprintf(stderr, "%s: the emulated driver is not there\n", name);
        std::abort();
    }
    return (F)found;
}

void count(int by) { of_driver<void (*)(int)>("farface_emulator_count")(by); }

bool put(const std::string &path, const void *head, std::size_t head_bytes, const void *data, std::size_t bytes)
{
    std::string part = path + ".part";
    std::ofstream out(part, std::ios::binary);
    out.write((const char *)head, (std::streamsize)head_bytes);
    out.write((const char *)data, (std::streamsize)bytes);
    out.close();
    return out.good() && std::rename(part.c_str(), path.c_str()) == 0;
}

bool all_there(const Shared &s, const std::string &name)
{
    for (int r = 0; r < s.ranks; r++)
        if (access(s.file(name, r).c_str(), R_OK) != 0)
            return false;
    return true;
}

// A sum, asked again until it returns no -1.
struct Reduction {
    std::shared_ptr<Shared> shared;
    const void *from;
    void *to;
    Head head;
    long number;
    bool given = false;

    int operator()()
    {
        Shared &s = *shared;
        if (s.aborted || s.failed)
            return SUCCESS;
        std::string name = std::to_string(number);
        if (!given) {
            given = true;
            if (!put(s.file(name, s.rank), &head, sizeof head, from, head.count * 4)) {
                s.failed = SYSTEM_ERROR;
                return SUCCESS;
            }
        }
        if (!all_there(s, name))
            return -1;
        int added = head.type == UINT32 ? add<std::uint32_t>(s, name) : add<float>(s, name);
        // Who went meanwhile has taken its values along: nothing comes any more.
        if (added == SYSTEM_ERROR)
            return -1;
        if (added != SUCCESS) {
            s.failed = added;
            return SUCCESS;
        }
        // All are past the sum before.
        if (number > 0)
            s.remove_own(std::to_string(number - 1));
        s.done++;
        return SUCCESS;
    }

    // SYSTEM_ERROR where a rank's values are gone, INVALID_USAGE where not all ask for the same.
    template <class T> int add(Shared &s, const std::string &name)
    {
        std::vector<T> sum(head.count), values(head.count);
        for (int r = 0; r < s.ranks; r++) {
            std::ifstream in(s.file(name, r), std::ios::binary);
            Head other{};
            if (!in.read((char *)&other, sizeof other))
                return SYSTEM_ERROR;
            if (other.count != head.count || other.type != head.type || other.reduce != head.reduce) {
                std::fprintf(stderr, "ranks ask for different sums\n");
                return INVALID_USAGE;
            }
            in.read((char *)values.data(), (std::streamsize)(head.count * 4));
            for (std::size_t i = 0; i < head.count; i++)
                sum[i] = r == 0 ? values[i] : sum[i] + values[i];
        }
        T share = head.reduce == MEAN ? T(1) / T(s.ranks) : T(1);
        for (std::size_t i = 0; i < head.count; i++)
            ((T *)to)[i] = sum[i] * share;
        return SUCCESS;
    }
};

void clear(const Shared &s)
{
    s.remove_own("joined");
    for (long n = 0; n < s.next; n++)
        s.remove_own(std::to_string(n));
    // Whoever is last.
    rmdir(s.folder.c_str());
}

} // namespace

extern "C" {

void farface_emulated_nccl_fail_at(long n)
{
    calls = 0;
    fail_at = n;
}
long farface_emulated_nccl_calls() { return calls; }

int ncclGetVersion(int *version)
{
    if (fails())
        return SYSTEM_ERROR;
    *version = 22809;
    return SUCCESS;
}
const char *ncclGetErrorString(int) { return "an emulated NCCL error"; }
const char *ncclGetLastError(void *) { return "emulated detail"; }

int ncclGetUniqueId(Id *id)
{
    if (fails())
        return SYSTEM_ERROR;
    const char *folder = std::getenv("TMPDIR");
    std::memset(id, 0, sizeof *id);
    std::snprintf(id->internal, sizeof id->internal, "%s/farface-nccl-XXXXXX", folder ? folder : "/tmp");
    return mkdtemp(id->internal) ? SUCCESS : SYSTEM_ERROR;
}

int ncclCommInitRank(void **comm, int ranks, Id id, int rank)
{
    if (fails())
        return SYSTEM_ERROR;
    if (ranks < 1 || rank < 0 || rank >= ranks || id.internal[127])
        return INVALID_ARGUMENT;
    auto made = std::make_unique<Comm>();
    Shared &s = *made->shared;
    s.folder = id.internal;
    s.ranks = ranks;
    s.rank = rank;
    if (!put(s.file("joined", rank), "", 0, "", 0))
        return SYSTEM_ERROR;
    for (int tries = 0; !all_there(s, "joined"); tries++) {
        if (tries == 5000) {
            clear(s);
            return REMOTE_ERROR;
        }
        usleep(1000);
    }
    count(1);
    *comm = made.release();
    return SUCCESS;
}

int ncclGroupStart()
{
    if (fails())
        return SYSTEM_ERROR;
    group++;
    return SUCCESS;
}

int ncclGroupEnd()
{
    if (group == 0)
        return INVALID_USAGE;
    group--;
    return fails() ? SYSTEM_ERROR : SUCCESS;
}

int ncclAllReduce(const void *from, void *to, std::size_t values, int type, int reduce, void *comm, void *stream)
{
    if (fails())
        return SYSTEM_ERROR;
    bool known = type == FLOAT32 ? reduce == SUM || reduce == MEAN : type == UINT32 && reduce == SUM;
    if (!comm || !known || group == 0)
        return INVALID_ARGUMENT;
    auto &shared = ((Comm *)comm)->shared;
    if (shared->stream && shared->stream != stream && shared->done != shared->next) {
        std::fprintf(stderr, "sums in two streams at once\n");
        return INVALID_USAGE;
    }
    shared->stream = stream;
    Head head{values, type, reduce};
    auto work = std::make_shared<Reduction>(Reduction{shared, from, to, head, shared->next++});
    using Give = int (*)(void *, std::uint64_t, std::size_t, std::function<int()> *);
    std::function<int()> run = [work] { return (*work)(); };
    return of_driver<Give>("farface_emulator_give")(stream, (std::uint64_t)to, values * 4, &run) ? INVALID_ARGUMENT : SUCCESS;
}

int ncclCommGetAsyncError(void *comm, int *error)
{
    if (fails())
        return SYSTEM_ERROR;
    *error = ((Comm *)comm)->shared->failed;
    return SUCCESS;
}

int ncclCommDestroy(void *comm)
{
    clear(*((Comm *)comm)->shared);
    delete (Comm *)comm;
    count(-1);
    return fails() ? SYSTEM_ERROR : SUCCESS;
}

int ncclCommAbort(void *comm)
{
    ((Comm *)comm)->shared->aborted = true;
    clear(*((Comm *)comm)->shared);
    delete (Comm *)comm;
    count(-1);
    return SUCCESS;
}

} // extern "C"
