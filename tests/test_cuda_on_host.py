"""The CUDA kernels and their launches, run on the CPU where no GPU is: the same bits as the law and the CPU op."""

import itertools
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from tables import DTYPES, KEY, STREAM, assert_same_bits
from torch.utils.cpp_extension import include_paths

from swalp_fx import _C, ops
from swalp_fx.recipe import ROUNDINGS

GXX = shutil.which("g++")
FOLDER = Path(__file__).parent / "cuda_on_host"
TORCH = Path(torch.__file__).parent
FLAGS = ["-std=c++20", "-O0", "-ffp-contract=off", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
FLAGS += ["-ffunction-sections", "-Wl,--gc-sections"]  # leaves out the functions that need libtorch
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

pytestmark = pytest.mark.skipif(GXX is None, reason="g++ is not on the PATH; install it to run the kernels on the CPU")


def compile_to(target, source, *flags):
    includes = [f"-I{path}" for path in (FOLDER, *include_paths(), sysconfig.get_paths()["include"])]
    command = [GXX, *FLAGS, *includes, str(source), *flags, "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target


def require_sanitizers(folder):
    source = folder / "empty.cpp"
    source.write_text("int main() {}")
    command = [GXX, *SANITIZERS, str(source), "-o", str(folder / "empty")]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("g++ has no sanitizers here")


@pytest.mark.parametrize(
    "sanitizers", [[], pytest.param(SANITIZERS, marks=pytest.mark.slow)], ids=["plain", "sanitized"]
)
def test_kernels(tmp_path, sanitizers):
    """Under the sanitizers, reads and writes out of range show too."""
    if sanitizers:
        require_sanitizers(tmp_path)
    program = compile_to(tmp_path / "kernels_test", FOLDER / "kernels_test.cpp", *sanitizers)
    result = subprocess.run([program], capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr


# ---- the launches --------------------------------------------------------------------------------

SPECS = [
    "fixed8.6",
    "e4m3",
    "bf16",
    "bfp8",
    "mxfp4[]",
    "mxfp8_e5m2[]",
    "int8",
    "e4m3[]",
    "nvfp4[]",
    "nf4[]",
    "e8m7[]+e8m0",
]
WHOLE = ([], [])  # dims, sizes
ROWS = ([0], [])
CODES = ["nearest", "stochastic", "stochastic24"]
MARGIN = 64


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    """The CUDA ops, on CPU tensors."""
    libraries = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    flags = ["-shared", "-fPIC", "-fvisibility=hidden", "-DPy_LIMITED_API=0x030A0000"]
    target = tmp_path_factory.mktemp("on_host") / "ops_on_host.so"
    torch.ops.load_library(compile_to(target, FOLDER / "ops_on_host.cpp", *flags, *libraries))
    return torch.ops.swalp_fx_on_host


def fenced(x, offset=0):
    """A copy of dense ``x``, and the memory that it lies in the middle of: huge values, which must neither change nor
    enter a maximum. ``offset`` elements misalign it."""
    first = MARGIN + offset
    memory = torch.full((x.numel() + 2 * MARGIN + offset,), torch.finfo(x.dtype).max, dtype=x.dtype)
    inside = memory[first : first + x.numel()].as_strided(x.shape, x.stride(), first)
    return inside.copy_(x), memory


def numbers_of(spec, blocks, rounding):
    *format, _, _, code, bits = ops._find(spec, rounding)
    return *format, *blocks, code, bits


def by_plan(address, x):
    y, key = torch.empty_like(x), torch.tensor(KEY)
    _C.round(_C.own(address), x.data_ptr(), y.data_ptr(), key.data_ptr(), STREAM)
    return y


def assert_follows_cpu(on_host, spec, x, blocks, rounding, offset=0):
    """Fresh, in place and by a plan, with ``blocks`` as (dims, sizes)."""
    numbers = (*numbers_of(spec, blocks, rounding), torch.tensor(KEY), STREAM)
    due = torch.ops.swalp_fx.quantize(x, *numbers)
    if x.numel() == 0 or due.stride() != x.stride():  # x has gaps or overlaps
        assert_same_bits(on_host.quantize(x, *numbers), due, x)
        return
    inside, memory = fenced(x, offset)
    result = on_host.quantize(inside, *numbers)
    assert result.stride() == due.stride()
    assert_same_bits(result, due, x)
    assert_same_bits(inside, x)
    assert_same_bits(by_plan(on_host.quantize_plan(x, *numbers), inside), due, x)
    on_host.quantize_(inside, *numbers)
    assert_same_bits(inside, due, x)
    first = MARGIN + offset
    for outside in (memory[:first], memory[first + x.numel() :]):
        assert (outside == torch.finfo(x.dtype).max).all()


def values(*shape, dtype=torch.float32):
    """Rows of many scales, with NaN, infinities and zeros among them."""
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=generator)
    if x.dim() > 1:
        x *= torch.exp2(torch.randint(-30, 10, (shape[0], *[1] * (len(shape) - 1)), generator=generator).float())
    flat = x.view(-1)
    flat[7::97], flat[8::89], flat[9::83], flat[10::13] = torch.nan, torch.inf, -torch.inf, 0.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_every_format_dtype_and_rounding(on_host, spec, dtype):
    x, few = values(9, 160, dtype=dtype), values(5, 60, dtype=dtype)  # a run or a rectangle has a thread block
    cases = [(x, WHOLE), (x, ROWS), (few, ([1], [32])), (few, ([0, 1], [4, 48]))]
    for rounding, (given, blocks) in itertools.product(ROUNDINGS, cases):
        assert_follows_cpu(on_host, spec, given, blocks, rounding)


@pytest.mark.parametrize("rounding", CODES)
@pytest.mark.parametrize("spec", ["fixed8.6", "bfp8"])
def test_sizes(on_host, spec, rounding):
    """Around a vector, a block of random bits and a thread block; and where kernels change over."""
    for n in (0, 1, 3, 4, 127, 128, 129, 1023, 5000):
        assert_follows_cpu(on_host, spec, values(n), WHOLE, rounding)
        assert_follows_cpu(on_host, spec, values(n), WHOLE, rounding, offset=1)
        assert_follows_cpu(on_host, spec, values(3, n), ROWS, rounding)
    assert_follows_cpu(on_host, spec, torch.tensor(0.3), WHOLE, rounding)
    for n in (16, 32, 64, 1020, 1024, 1028):
        assert_follows_cpu(on_host, spec, values(7, n), ROWS, rounding)
        assert_follows_cpu(on_host, spec, values(7, n), ROWS, rounding, offset=2)


@pytest.mark.parametrize("rounding", CODES)
@pytest.mark.parametrize("spec", ["bfp8", "nvfp4"])
def test_runs_along_an_axis(on_host, spec, rounding):
    """Of every length with a kernel of its own and of others, the last of a row short or not."""
    lengths = (8, 16, 24, 32, 64, 128, 256, 1000, 2**63 - 1)
    tensors = [(1, (3, 384)), (1, (3, 100)), (0, (100, 3)), (0, (300,))]
    one_each = [(1, (3, 7)), (0, (7, 3)), (0, (9,))]  # a thread block for each number
    for size, (axis, shape) in (*itertools.product(lengths, tensors), *itertools.product([1], one_each)):
        assert_follows_cpu(on_host, spec, values(*shape), ([axis], [size]), rounding)


@pytest.mark.parametrize("rounding", CODES[:2])
@pytest.mark.parametrize("spec", ["e4m3", "bfp8"])
def test_layouts(on_host, spec, rounding):
    x = values(4, 6, 10, 14)
    for laid_out in (
        x.contiguous(memory_format=torch.channels_last),
        x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        x[:, 1:5, :, 3:],
        x[..., ::2],
        x[:, :1].expand(4, 6, 10, 14),
        x[:, :0],
    ):
        for blocks in (WHOLE, ROWS, ([1], []), ([0, -1], []), ([1], [4]), ([3], [16]), ([0, 3], [3, 8])):
            assert_follows_cpu(on_host, spec, laid_out, blocks, rounding)


def test_a_list_of_tensors(on_host):
    tensors = [values(30, 40), values(7, 5).t(), values(64, dtype=torch.float64), values(0, 3)]
    due = [x.clone() for x in tensors]
    arguments = (*numbers_of("bfp8", ROWS, "stochastic"), torch.tensor(KEY), [4, 0, 2**40, 1])
    on_host.quantize_foreach_(tensors, *arguments)
    torch.ops.swalp_fx.quantize_foreach_(due, *arguments)
    for result, expected in zip(tensors, due, strict=True):
        assert_same_bits(result, expected)
