"""A converted model is freed with its last reference; a child that is kept works on."""

import subprocess
import sys

# In a process of its own: pytest keeps the front end's log, and so the objects in it.
BEGIN = """
import copy, gc, weakref
import torch, swalp_fx

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
"""
MODEL = """
lp, swalp = swalp_fx.convert(model, torch.optim.SGD(model.parameters(), lr=0.1))
lp(torch.ones(3, 8)).sum().backward()
held = [weakref.ref(each) for each in (model, model[0].weight, swalp)]
del model, lp, swalp
gc.collect()
print([each() is None for each in held])
"""
CHILD = """
lp, x = swalp_fx.convert(model, recipe="bfp4[0] rounding=nearest").module, torch.randn(3, 8)
lp(x)
child, expected, held = lp[0], lp[0](x), [weakref.ref(each) for each in (lp, lp[2].weight)]
del model, lp
gc.collect()
right = [torch.equal(each(x), expected) for each in (child, copy.deepcopy(child))]
right.append(torch.allclose(child.double()(x.double()).float(), expected, atol=1e-6))
print(right, [each() is None for each in held])
"""


def printed(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", BEGIN + script], capture_output=True, text=True)
    return done.stdout.strip() or done.stderr


def test_a_converted_model_that_has_run_is_freed() -> None:
    assert printed(MODEL) == "[True, True, True]"


def test_a_child_computes_the_same_when_the_rest_of_its_model_is_freed() -> None:
    assert printed(CHILD) == "[True, True, True] [True, True]"
