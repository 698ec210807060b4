"""One model of each module of timm, and of sixty architectures of transformers. None crashes, and none differs from
float under identity formats. A transformer's products run in rewritten graphs. It prints a row a model:

    pytest -m slow tests/test_zoo_sweep.py                     an hour of one core
    pytest -m slow tests/test_zoo_sweep.py -k transformers     one of the two
"""

import pytest
import torch
import zoo_timm
import zoo_transformers
from audit import share_inside

import swalp_fx

pytestmark = pytest.mark.slow

ZOOS = {"timm": zoo_timm, "transformers": zoo_transformers}
ROWS = [(zoo, name) for zoo, module in ZOOS.items() for name in module.ARCHITECTURES]
AT_LEAST = {"timm": 0.0, "transformers": 0.95}  # of the multiply-adds, inside rewritten graphs

# Models that compute other bits under any trace by PyTorch's front end.
BRANCHES = {"mamba": "its forward asks whether it is being compiled, and takes another way to the same numbers"}


@pytest.fixture(autouse=True)
def nothing_is_kept():
    yield
    torch._dynamo.reset()


@pytest.fixture
def row(capsys):
    """Prints a row of the table, at once."""

    def show(*cells):
        with capsys.disabled():
            print(f"\n| {' | '.join(map(str, cells))} |", end=" ")

    return show


@pytest.mark.parametrize("zoo, name", ROWS, ids=["-".join(row) for row in ROWS])
def test_a_model_of_today_is_the_same_in_rewritten_graphs(zoo, name, row):
    model, args, keywords = ZOOS[zoo].build(name)
    verdict = swalp_fx.check(model, *args, **keywords)
    lp, _ = swalp_fx.convert(model, recipe="bfp8[0]")
    share = share_inside(lp, args, keywords)
    row(zoo, name, "equal" if verdict else "differs", len(lp.graphs), f"{share:.3f}")
    assert share >= AT_LEAST[zoo]
    if name in BRANCHES and not verdict:
        pytest.xfail(BRANCHES[name])
    assert verdict


def test_no_module_of_timm_is_left_out():
    timm = pytest.importorskip("timm", reason="timm is not installed: `make zoo` installs it")
    assert set(zoo_timm.ARCHITECTURES) == set(timm.list_modules())


def test_there_are_sixty_of_transformers():
    assert len(zoo_transformers.ARCHITECTURES) >= 60
