"""A converted model is freed with its last reference."""

import subprocess
import sys

# In a process of its own: pytest keeps what the front end logs, and what that holds.
SCRIPT = """
import gc, weakref
import torch, swalp_fx

model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
lp, swalp = swalp_fx.convert(model, torch.optim.SGD(model.parameters(), lr=0.1))
lp(torch.ones(3, 8)).sum().backward()
held = [weakref.ref(each) for each in (model, model[0].weight, swalp)]
del model, lp, swalp
gc.collect()
print([each() is None for each in held])
"""


def test_a_converted_model_that_has_run_is_freed() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.stdout.strip() == "[True, True, True]", done.stderr
