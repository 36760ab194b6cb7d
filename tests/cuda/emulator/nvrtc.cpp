// A libnvrtc.so.12 whose compiler has nothing to do: the emulated driver has the kernels already.

#include <cstddef>
#include <cstring>

extern "C" {

int nvrtcVersion(int *major, int *minor)
{
    *major = 12;
    *minor = 0;
    return 0;
}
int nvrtcGetNumSupportedArchs(int *count)
{
    *count = 1;
    return 0;
}
int nvrtcGetSupportedArchs(int *archs)
{
    archs[0] = 90;
    return 0;
}
int nvrtcCreateProgram(void **program, const char *, const char *, int, const char *const *, const char *const *)
{
    static char some;
    *program = &some;
    return 0;
}
int nvrtcCompileProgram(void *, int, const char *const *) { return 0; }
int nvrtcDestroyProgram(void **) { return 0; }
int nvrtcGetProgramLogSize(void *, std::size_t *bytes)
{
    *bytes = 1;
    return 0;
}
int nvrtcGetProgramLog(void *, char *log)
{
    *log = 0;
    return 0;
}
int nvrtcGetCUBINSize(void *, std::size_t *bytes)
{
    *bytes = 9;
    return 0;
}
int nvrtcGetCUBIN(void *, char *image)
{
    std::memcpy(image, "emulated", 9);
    return 0;
}
const char *nvrtcGetErrorString(int) { return "an emulated error"; }
}
