"""Common uses of a Hugging Face model, on a converted one: train it with Trainer, checkpoint its layers, generate, save
it and read it back. Skipped without transformers and accelerate; `make zoo` installs them."""

import copy

import pytest
import torch
from zoo import WORDS, ZOO, skip_without

import swalp_fx
from swalp_fx import Recipe
from swalp_fx.capture import Conversion, install

STEPS = 20


@pytest.fixture(autouse=True)
def packages():
    skip_without("transformers")
    skip_without("accelerate")


@pytest.fixture
def llama():
    model, _, _ = ZOO["Llama"]()
    return model


def identity_nodes(model):
    """Every rounding is there, and changes nothing."""
    install(Conversion(model, Recipe(rounding="nearest"), identity=True))
    return model


def texts(number):
    """Texts that are padded on the left.

    Without padding, the plain model builds no mask, but a traced one does, with or without our rewrite. Attention then
    adds in another order.
    """
    mask = torch.ones(9, dtype=torch.long)
    mask[:2] = 0
    return [{"input_ids": ids, "labels": ids, "attention_mask": mask} for ids in torch.randint(3, WORDS, (number, 9))]


def train(model, folder, data, **settings):
    """The trained model and its losses, by Trainer, with SGD."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        optim="sgd",
        learning_rate=0.1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_parameters(found, expected):
    for (name, parameter), (_, other) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(parameter, other), name


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointed"])
def test_trainer_takes_twenty_steps_of_float(llama, tmp_path, settings):
    data = texts(8)
    float_model = copy.deepcopy(llama)
    expected = train(float_model, tmp_path / "float", data, **settings)
    found = train(identity_nodes(llama), tmp_path / "low", data, **settings)
    assert len(found) == STEPS and found == expected
    assert llama.graphs
    assert_same_parameters(llama, float_model)


@pytest.mark.slow
def test_trainer_steps_on_the_grid(llama, tmp_path):
    from transformers import Trainer, TrainingArguments

    optimizer = torch.optim.SGD(llama.parameters(), lr=0.1)
    lp, _ = swalp_fx.convert(llama, optimizer, recipe="bfp8[0]")
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    Trainer(model=lp, args=arguments, train_dataset=texts(8), optimizers=(optimizer, None)).train()
    assert all(torch.equal(swalp_fx.quantize(p, "bfp8[0]"), p) for p in lp.parameters())


def test_gradient_checkpointing_gives_the_gradients_of_float(llama):
    batch = {name: value.unsqueeze(0) for name, value in texts(1)[0].items()}
    float_model = copy.deepcopy(llama)
    identity_nodes(llama)
    for model in (float_model, llama):
        model.gradient_checkpointing_enable()
        model.train()(**batch).loss.backward()
    for (name, parameter), (_, other) in zip(llama.named_parameters(), float_model.named_parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 2}], ids=str)
def test_it_generates_the_words_of_float(llama, settings):
    prompt = torch.randint(3, WORDS, (2, 4))
    float_model = copy.deepcopy(llama).eval()
    identity_nodes(llama.eval())

    def words(model):
        torch.manual_seed(1)
        return model.generate(prompt, max_new_tokens=12, pad_token_id=0, **settings)

    expected = words(float_model)
    assert torch.equal(words(llama), expected)
    assert llama.graphs


def test_what_is_saved_is_read_back_in_float_and_converted_again(llama, tmp_path):
    ids = torch.randint(3, WORDS, (2, 9))
    lp, _ = swalp_fx.convert(llama.eval(), recipe="bfp4[0] rounding=nearest")
    low = lp(ids).logits
    lp.save_pretrained(tmp_path)
    back = type(llama).from_pretrained(tmp_path).eval()
    assert_same_parameters(back, llama)
    swalp_fx.restore(llama)
    assert torch.equal(back(ids).logits, llama(ids).logits)
    again, _ = swalp_fx.convert(back, recipe="bfp4[0] rounding=nearest")
    assert torch.equal(again(ids).logits, low)


def test_a_converted_model_reads_weights_that_were_saved(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    other, _, _ = ZOO["Llama"]()
    lp, _ = swalp_fx.convert(other.eval(), recipe="bfp4[0] rounding=nearest")
    ids = torch.randint(3, WORDS, (2, 9))
    before = lp(ids).logits
    lp.load_state_dict(type(llama).from_pretrained(tmp_path).state_dict())
    expected, _ = swalp_fx.convert(llama.eval(), recipe="bfp4[0] rounding=nearest")
    assert torch.equal(lp(ids).logits, expected(ids).logits) and not torch.equal(lp(ids).logits, before)
