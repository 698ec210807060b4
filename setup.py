"""Builds two modules against LibTorch's stable ABI: swalp_fx._C and, where nvcc is, swalp_fx._C_cuda.

One build serves torch 2.11 and later, and CPython 3.10 and later. SWALP_FX_CUDA=0 or 1 overrides
whether the CUDA module is built; no GPU need be present.
"""

import glob
import os
import re
import shutil
from pathlib import Path

import setuptools

if int(setuptools.__version__.partition(".")[0]) < 77:  # the first that reads pyproject.toml's license
    raise SystemExit(f"setuptools {setuptools.__version__} is too old; pip install 'setuptools>=77.0.3'")


def find_cuda_home():
    """The CUDA toolkit's folder, or None: the first candidate that holds cuda_runtime.h and nvcc.

    torch guesses from the nvcc on PATH, which may be a wrapper script that lies elsewhere.
    """
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        nvcc = Path(nvcc)
        candidates.append(nvcc.resolve().parents[1])
        head = nvcc.read_bytes()[:4096]
        if head.startswith(b"#!"):
            candidates += [Path(m).parents[1] for m in re.findall(r"/[\w./+-]+/bin/nvcc", head.decode(errors="ignore"))]
    candidates += ["/usr/local/cuda", *sorted(glob.glob("/usr/local/cuda-*"), reverse=True), "/opt/cuda"]
    for home in filter(None, candidates):
        if Path(home, "include", "cuda_runtime.h").exists() and Path(home, "bin", "nvcc").exists():
            return str(home)
    return None


if cuda_home := find_cuda_home():
    os.environ["CUDA_HOME"] = cuda_home  # read by torch.utils.cpp_extension when it is imported

import torch  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

ROOT = Path(__file__).parent
MACROS = [("TORCH_TARGET_VERSION", "0x020b000000000000"), ("Py_LIMITED_API", "0x030A0000")]
# Every product and sum is rounded on its own, as the numerics contract in csrc/README.md requires.
COMMON = ["-std=c++20"]
CXX = [*COMMON, "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
# As -O3 vectorises, without its copies of loops: two thirds of the code, and of the time to compile it.
CXX += ["-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic"]
CXX += ["-g0"]  # CPython's own flags hold -g, whose debug information is six times the code
STRIP = ["-Wl,--strip-all"]
# SWALP_FX_SANITIZE=1, for `make sanitize`: the CPU module stops at the first bad access or undefined result.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-wrapv", "-g1", "-O1"]
if os.environ.get("SWALP_FX_SANITIZE") != "1":
    SANITIZE = []
NVCC = [
    *COMMON,
    "-O3",
    "-Xcompiler=-fvisibility=hidden",
    "-fmad=false",
    "--expt-relaxed-constexpr",
    "--threads=2",
    "-DUSE_CUDA",
]


# A sixth of the size. What CUDA 13 builds needs a driver that reads the smaller form; the older one, any driver reads.
if torch.version.cuda is not None and int(torch.version.cuda.split(".")[0]) >= 13:
    NVCC += ["--compress-mode=size"]
else:
    NVCC += ["-Xfatbin=-compress-all"]


def files(folder, *patterns):
    return sorted(str(p.relative_to(ROOT)) for each in patterns for p in (ROOT / "csrc" / folder).glob(each))


def with_cuda():
    wish = os.environ.get("SWALP_FX_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"SWALP_FX_CUDA={wish!r} is neither 0 nor 1; unset it to build for CUDA where nvcc is found")
    able = torch.version.cuda is not None and cuda_home is not None
    if wish == "1" and not able:
        raise SystemExit("SWALP_FX_CUDA=1 needs a torch built with CUDA, and nvcc; set CUDA_HOME to nvcc's toolkit")
    return able and wish != "0"


headers = files("", "**/*.h", "**/*.cuh")
extensions = [
    CppExtension(
        "swalp_fx._C",
        ["csrc/ops.cpp", *files("cpu", "*.cpp")],
        define_macros=MACROS,
        extra_compile_args={"cxx": CXX + SANITIZE},
        extra_link_args=SANITIZE or STRIP,
        py_limited_api=True,
        depends=headers,
    )
]
if with_cuda():
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    extensions.append(
        CUDAExtension(
            "swalp_fx._C_cuda",
            files("cuda", "*.cu", "*.cpp"),
            define_macros=MACROS,
            extra_compile_args={"cxx": CXX, "nvcc": NVCC},
            extra_link_args=STRIP,
            py_limited_api=True,
            depends=headers,
        )
    )

setuptools.setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
