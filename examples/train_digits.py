"""SWALP from start to end: handwritten digits in 4 bits, the average of the weights, and both test errors.

python examples/train_digits.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import swalp_fx

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
train, test = slice(0, 1400), slice(1400, None)

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
)  # fmt: skip
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
model, swalp = swalp_fx.convert(model, optimizer, recipe="bfp4[0]")


def batches():
    return zip(images[train].split(100), labels[train].split(100), strict=True)


def error(classifier):
    """Percent of the test images."""
    with torch.no_grad():
        wrong = classifier.eval()(images[test]).argmax(1) != labels[test]
    return 100 * wrong.float().mean().item()


warm_up, epochs = 6, 12
for epoch in range(epochs):
    model.train()
    if epoch == warm_up:
        optimizer.param_groups[0]["lr"] = 0.05
    for x, y in batches():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if epoch >= warm_up:
            swalp.update_average()

print(f"the weights of the last step, in 4 bits:  {error(model):.2f} % wrong")
print(f"their average, in float:                  {error(swalp.averaged_model(batches())):.2f} % wrong")
with swalp.averaged(batches()):
    print(f"their average, rounded to 4 bits:         {error(model):.2f} % wrong")
