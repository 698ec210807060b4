"""A new user's first script, from start to end. tests/test_package.py runs it, and checks its types."""

import io
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swalp_fx


def loss(out: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(out, target)


def made() -> tuple[nn.Module, torch.optim.SGD]:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


model, optimizer = made()
loader = [(torch.randn(8, 1, 8, 8), torch.randint(3, (8,))) for _ in range(5)]
assert swalp_fx.check(model, loader[0][0])

lp, swalp = swalp_fx.convert(model, optimizer, recipe="bfp8[0]")
for x, y in loader:
    optimizer.zero_grad()
    loss(lp(x), y).backward()  # type: ignore[no-untyped-call]  # of torch
    optimizer.step()
swalp.update_average()
averaged = swalp.averaged_model(loader).eval()
assert averaged(loader[0][0]).isfinite().all()

print("swalp_fx of", Path(swalp_fx.__file__).parent)
print(swalp_fx.report(lp))
print(swalp_fx.measure(lp, loader, loss))
swalp_fx.draw(lp, sys.argv[1])

stored = io.BytesIO()
torch.save({"model": lp.state_dict(), "swalp": swalp.state_dict(), "optimizer": optimizer.state_dict()}, stored)
stored.seek(0)
state = torch.load(stored)
model, optimizer = made()
lp_again, swalp_again = swalp_fx.convert(model, optimizer, recipe="bfp8[0]")
lp_again.load_state_dict(state["model"])
swalp_again.load_state_dict(state["swalp"])
optimizer.load_state_dict(state["optimizer"])
for name, value in swalp_again.averaged_model(loader).state_dict().items():
    assert torch.equal(value, averaged.state_dict()[name]), name
