"""Vectors for a test bench: a file is read back, and each line is proved by the laws for one number."""

import csv
import re
import struct
from fractions import Fraction

import pytest
import torch
from refusal import refusal

import vectors
from swalp_fx import parse, reference
from swalp_fx.formats import Absmax, PowerOfTwo, Static, TwoLevel

SPECS = ["fixed8.6", "bfp8[0]", "bfp4[-1:16]+twos", "int8[0]", "e4m3", "e4m3[4x8]", "mxfp4", "nvfp4", "nf4", "posit8.1"]
SPECS += ["bfp6[0,1]", "e5m2+inf", "bf16", "int4[]+scale0.37"]


def written(tmp_path, *words):
    path = tmp_path / "vectors.csv"
    vectors.main([*words, "--out", str(path)])
    first, *rest = path.read_text().splitlines()
    about = re.fullmatch(r"# format (\S+), rounding (\w+), shape (\S+), seed \d+", first)
    shape = tuple(map(int, about[3].split("x")))
    return about[1], about[2], shape, list(csv.DictReader(rest))


def float32(word):
    return struct.unpack(">f", bytes.fromhex(word))[0]


def as_float32(number):
    return struct.unpack("f", struct.pack("f", number))[0]


def scale_of(format, word):
    """The number that a stored scale stands for."""
    scale = format.scale
    if isinstance(scale, PowerOfTwo):
        stored = int(word, 16)
        return 2.0 ** (stored - scale.bias if scale.biased else stored - (stored >> 7 << 8))
    if isinstance(scale, Absmax):
        return float32(word)
    if isinstance(scale, TwoLevel):
        inner, outer = word.split(":")
        return as_float32(Fraction(scale.inner.number(int(inner, 16))) * Fraction(float32(outer)))
    return scale.value if isinstance(scale, Static) else 1.0


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "stochastic8", "down"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_bench_that_reads_the_file_gets_its_outputs(spec, rounding, tmp_path):
    name, found_rounding, shape, rows = written(tmp_path, spec, "--rounding", rounding, "--n", "256")
    format = parse(spec)
    assert (parse(name), found_rounding) == (format, rounding) and len(rows) == torch.Size(shape).numel() == 256
    x = torch.tensor([float32(row["input"]) for row in rows]).view(shape)
    output = torch.tensor([float32(row["output"]) for row in rows]).view(shape)
    draws = torch.tensor([int(row["random"] or "0", 16) for row in rows])
    assert rounding.startswith("stochastic") == bool(draws.any())
    due = reference.quantize(x, format, rounding, draws=draws)
    torch.testing.assert_close(output, due, rtol=0, atol=0)  # as numbers: some formats have no -0
    codes = [int(row["code"], 16) for row in rows]
    assert len({len(row["code"]) for row in rows}) == 1 and max(codes) < 2**format.element_bits
    for code, row, number in zip(codes, rows, output.flatten().tolist(), strict=True):
        element, scale = format.element.number(code), scale_of(format, row["scale"])
        if abs(element) != float("inf"):
            assert as_float32(Fraction(element) * Fraction(scale)) == number
        else:
            assert element == number


def test_the_numbers_are_worth_a_bench(tmp_path):
    _, _, _, rows = written(tmp_path, "e4m3", "--n", "4096")
    x, output = (torch.tensor([float32(row[name]) for row in rows]) for name in ("input", "output"))
    assert len({row["code"] for row in rows}) > 200  # of 254
    assert (x == output).any() and (x.abs() > 448).any() and (x == 0).any()
    below, above = reference.quantize(x, "e4m3", "down").double(), reference.quantize(x, "e4m3", "up").double()
    assert ((below + above) / 2 == x)[below < above].sum() > 200  # ties


def test_blocks_of_several_axes_get_whole_rows(tmp_path):
    assert written(tmp_path, "bfp8[0]", "--n", "33")[2] == (2, 32)
    assert written(tmp_path, "mxfp8", "--n", "33")[2] == (33,)


def test_one_seed_gives_one_file(capsys):
    def printed(seed):
        vectors.main(["mxfp4", "--rounding", "stochastic", "--n", "64", "--seed", seed])
        return capsys.readouterr().out

    assert printed("3") == printed("3") != printed("4")


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["bfp"], "unknown format spec 'bfp'"),
        (["float"], "float rounds nothing, and has no codes"),
        (["bfp8[c:32]"], "[c:32] is along an axis that a tensor does not know"),
        (["bfp8", "--rounding", "nearst"], "unknown rounding 'nearst'"),
        (["bfp8", "--n", "0"], "'0' is not a whole number of 1 or more"),
        (["bfp8", "--out", "/nowhere/vectors"], "/nowhere/vectors cannot be written: No such file or directory"),
    ],
)
def test_bad_input_is_one_line(words, complaint, capsys):
    assert complaint in refusal(capsys, vectors.main, words)
