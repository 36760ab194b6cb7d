"""Compiles cuda/*.cu by NVRTC, prints registers and spills of every kernel, and fails where one spills.

usage: compile.py FOLDER [TARGET ..]   (FOLDER has libnvrtc, such as that of pip's nvidia-cuda-nvrtc-cu11)
"""

import ctypes
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2] / "cuda"
# PTX for the oldest, which newer devices' drivers compile, and machine code for those that differ; by name also sm_75, sm_86 and sm_89.
TARGETS = ["compute_70", "sm_80", "sm_90"]
# Kernels whose registers are printed.
SHOWN = "sm_90"


def check(nvrtc, status, call):
    if status != 0:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        sys.exit(f"{call}: {nvrtc.nvrtcGetErrorString(status).decode()}")


def compile_file(nvrtc, path, headers, target):
    """The compiler's messages and whether it succeeded."""
    program = ctypes.c_void_p()
    texts = (ctypes.c_char_p * len(headers))(*[header.read_bytes() for header in headers])
    names = (ctypes.c_char_p * len(headers))(*[header.name.encode() for header in headers])
    source, name = path.read_bytes(), path.name.encode()
    made = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, name, len(headers), texts, names)
    check(nvrtc, made, "nvrtcCreateProgram")
    options = [f"--gpu-architecture={target}", "--std=c++17"]
    if target.startswith("sm_"):
        options.append("--ptxas-options=-v")
    array = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
    status = nvrtc.nvrtcCompileProgram(program, len(options), array)
    size = ctypes.c_size_t()
    check(nvrtc, nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)), "nvrtcGetProgramLogSize")
    log = ctypes.create_string_buffer(size.value)
    check(nvrtc, nvrtc.nvrtcGetProgramLog(program, log), "nvrtcGetProgramLog")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return log.value.decode(), status == 0


def kernels(log):
    """(name, registers, bytes spilled) of every kernel that ptxas reports."""
    parts = re.split(r"Compiling entry function '(\w+)'", log)
    for name, text in zip(parts[1::2], parts[2::2]):
        registers = int(re.search(r"Used (\d+) registers", text).group(1))
        stores, loads = map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text).groups())
        yield name, registers, stores + loads


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    targets = sys.argv[2:] or TARGETS
    libraries = sorted(pathlib.Path(sys.argv[1]).glob("**/libnvrtc.so*"))
    if not libraries:
        sys.exit(f"{sys.argv[1]}: no libnvrtc.so there")
    nvrtc = ctypes.CDLL(str(libraries[0]))
    headers = sorted(ROOT.glob("*.cuh"))
    files = sorted(ROOT.glob("*.cu"))
    failed = []
    for target in targets:
        for path in files:
            log, compiled = compile_file(nvrtc, path, headers, target)
            if not compiled or "warning" in log:
                failed.append(f"{path.name} for {target}:\n{log}")
                continue
            for name, registers, spilled in kernels(log):
                if target == SHOWN:
                    print(f"{path.name:12} {name:24} {registers:4} registers, {spilled} bytes spilled")
                if spilled:
                    failed.append(f"{name} of {path.name} spills {spilled} bytes for {target}")
    for text in failed:
        print(text, file=sys.stderr)
    print(f"{len(files)} files for {', '.join(targets)}: {len(failed)} faults")
    sys.exit(1 if failed else 0)


main()
