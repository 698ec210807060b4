"""Lightning and accelerate run the step: its bits are those of a loop by hand. They are in the extra ``zoo``."""

import pytest
import torch
import torch.nn.functional as F
from test_optimizer import net, same, values
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from swalp_fx import convert, quantize

RECIPE = "W=bfp8[0] G=bfp8[0] M=bfp8[0] master=float"
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def batches():
    rows = torch.Generator().manual_seed(0)
    samples = TensorDataset(torch.randn(64, 6, generator=rows), torch.randint(3, (64,), generator=rows))
    return DataLoader(samples, batch_size=8)


def made(recipe=RECIPE):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return *convert(model, optimizer, recipe=recipe), optimizer


def by_hand(epochs=2, every=1, clip=None, recipe=RECIPE):
    """(model, optimizer, swalp) of a plain loop that accumulates and clips."""
    lp, swalp, optimizer = made(recipe)
    for _ in range(epochs):
        for number, (x, y) in enumerate(batches(), 1):
            (F.cross_entropy(lp(x), y) / every).backward()
            if number % every == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(lp.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return lp, optimizer, swalp


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning")


def module_of(lightning, lp, swalp, optimizer):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = lp

        def training_step(self, batch, _):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return optimizer

        def on_save_checkpoint(self, checkpoint):
            checkpoint["swalp"] = swalp.state_dict()

        def on_load_checkpoint(self, checkpoint):
            swalp.load_state_dict(checkpoint["swalp"])

    return Module()


def fit(lightning, folder, parts, resume=None, **options):
    trainer = lightning.Trainer(
        **{"max_epochs": 2, **options},
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module_of(lightning, *parts), batches(), ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("recipe", [RECIPE, "W=bfp8[0] G=bfp8[0]~nearest M=bfp10[0] master=fixed16.12"])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}], ids=["", "clip"])
def test_lightning_takes_the_steps_of_a_loop_by_hand(lightning, tmp_path, options, recipe):
    lp, swalp, optimizer = made(recipe)
    fit(lightning, tmp_path, (lp, swalp, optimizer), **options)
    due = by_hand(every=options.get("accumulate_grad_batches", 1), clip=options.get("gradient_clip_val"), recipe=recipe)
    assert same(values(lp, optimizer, swalp), values(*due))


def test_lightning_goes_on_from_its_checkpoint_to_the_bits_of_a_run_that_was_not_stopped(lightning, tmp_path):
    parts = made()
    fit(lightning, tmp_path, parts, max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    again = made()
    fit(lightning, tmp_path, again, resume=tmp_path / "one.ckpt")
    due = by_hand()
    assert same(values(again[0], again[2], again[1]), values(*due))


def test_the_average_of_lightnings_callback_is_kept(lightning, tmp_path):
    """Its pass for batch norm ends in a step. Without gradients that leaves the average, off the grid, as it is.

    With them it is a step, as in float: Lightning leaves those of the epoch before, unless they are zeroed.
    """
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    parts = made()

    class Zeroing(lightning.Callback):
        def on_train_epoch_end(self, *_):
            parts[2].zero_grad()

    average = callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    fit(lightning, tmp_path, parts, max_epochs=4, callbacks=[average, Zeroing()])
    weight = parts[0][3].weight.detach()
    assert int(average.n_averaged) > 1 and not torch.equal(quantize(weight, "bfp8[0]"), weight)


@pytest.fixture
def accelerator():
    return pytest.importorskip("accelerate").Accelerator(cpu=True, gradient_accumulation_steps=2)


def test_accelerate_takes_the_steps_of_a_loop_by_hand(accelerator):
    lp, swalp, optimizer = made()
    prepared, stepper, loader = accelerator.prepare(lp, optimizer, batches())
    for _ in range(2):
        for x, y in loader:
            with accelerator.accumulate(prepared):
                accelerator.backward(F.cross_entropy(prepared(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), 0.1)
                stepper.step()
                stepper.zero_grad()
    assert same(values(lp, optimizer, swalp), values(*by_hand(every=2, clip=0.1)))


def test_accelerates_own_optimizer_is_refused_with_the_one_inside(accelerator):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared = accelerator.prepare(optimizer)
    with pytest.raises(ValueError, match=r"AcceleratedOptimizer wraps another .*; attach to its \.optimizer"):
        convert(model, prepared)
    convert(model, prepared.optimizer)
