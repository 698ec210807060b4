"""Models as people use them today, tiny, from configurations: nothing is downloaded.

``ZOO`` has one row a model: the package that it needs, and a function that gives (model, arguments, keywords). Labels
are among the keywords where the model takes them, so that it returns its own loss. ``make zoo`` installs the packages.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"  # whoever asks for a file gets an error, and no connection

Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

WORDS, LENGTH = 64, 9  # of every language model


def skip_without(package):
    """Skips the test that asks, if the package is not there."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: `make zoo` installs it")


class Row(NamedTuple):
    package: str
    build: Callable[[], Case]

    def __call__(self) -> Case:
        skip_without(self.package)
        return self.build()


def words(length=LENGTH):
    """A batch of two texts."""
    return torch.randint(3, WORDS, (2, length))  # the first three are marks: padding, begin, end


def image(size, channels=3):
    return torch.randn(2, channels, size, size)


def classes():
    return torch.tensor([0, 2])


def small(**more):
    """The sizes of a model, by their usual names in configurations of transformers."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return sizes | {"vocab_size": WORDS, "max_position_embeddings": 64} | more


def llama() -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = words()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # the second text is padded on the left
    model = LlamaForCausalLM(LlamaConfig(**small(num_key_value_heads=2)))
    return model, (), {"input_ids": ids, "attention_mask": mask, "labels": ids}


def bert() -> Case:
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(**small(num_labels=3)))
    return model, (words(),), {"labels": classes()}


def t5() -> Case:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=WORDS, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config), (), {"input_ids": words(), "labels": words(7)}


def opt() -> Case:
    from transformers import OPTConfig, OPTForCausalLM

    ids = words()
    model = OPTForCausalLM(OPTConfig(**small(ffn_dim=64, word_embed_proj_dim=32)))
    return model, (), {"input_ids": ids, "labels": ids}


def hugging_face_vit() -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(ViTConfig(**small(image_size=16, patch_size=4, num_labels=3)))
    return model, (), {"pixel_values": image(16), "labels": classes()}


def gpt2() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = words()
    marks = {"bos_token_id": 1, "eos_token_id": 2}
    config = GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=64, **marks)
    return GPT2LMHeadModel(config), (), {"input_ids": ids, "labels": ids}


def mixtral() -> Case:
    from transformers import MixtralConfig, MixtralForCausalLM

    ids = words()
    config = MixtralConfig(**small(num_key_value_heads=2, num_local_experts=4, output_router_logits=True))
    return MixtralForCausalLM(config), (), {"input_ids": ids, "labels": ids}


def qwen3() -> Case:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    ids = words()
    model = Qwen3ForCausalLM(Qwen3Config(**small(num_key_value_heads=2, head_dim=8)))
    return model, (), {"input_ids": ids, "labels": ids}


def whisper_encoder() -> Case:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    sizes = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
    config = WhisperConfig(num_mel_bins=8, max_source_positions=16, **sizes)
    return WhisperEncoder(config), (torch.randn(2, 8, 32),), {}


def unet2d() -> Case:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    return model, (image(8), torch.tensor([1, 2])), {}


def x_transformers_decoder() -> Case:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=32, depth=2, heads=4, attn_dim_head=8, rotary_pos_emb=True)
    return TransformerWrapper(num_tokens=WORDS, max_seq_len=32, attn_layers=layers), (words(),), {}


def vit_pytorch_vit() -> Case:
    from vit_pytorch import ViT

    model = ViT(image_size=16, patch_size=4, num_classes=5, dim=32, depth=2, heads=4, mlp_dim=64, dim_head=8)
    return model, (image(16),), {}


def of_timm(name, size, **settings):
    def build() -> Case:
        import timm

        model = timm.create_model(name, num_classes=5, **settings)
        for parameter in model.parameters():
            if not parameter.any():  # some heads begin at zero, and rounding would change nothing
                nn.init.normal_(parameter, std=0.02)
        return model, (image(size),), {}

    return build


def segmentation_fpn() -> Case:
    import segmentation_models_pytorch

    encoder = "timm-mobilenetv3_small_minimal_100"
    return segmentation_models_pytorch.FPN(encoder, encoder_weights=None, classes=2), (image(32),), {}


def monai_unet() -> Case:
    from monai.networks.nets import UNet

    model = UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8), strides=(2,), num_res_units=1)
    return model, (torch.randn(2, 1, 8, 8, 8),), {}


def gcn() -> Case:
    from torch_geometric.nn import GCN

    nodes, edges = 10, 30
    model = GCN(in_channels=8, hidden_channels=16, num_layers=2, out_channels=3, dropout=0.5)
    return model, (torch.randn(nodes, 8), torch.randint(nodes, (2, edges))), {}


ZOO = {
    "Llama": Row("transformers", llama),
    "BERT": Row("transformers", bert),
    "T5": Row("transformers", t5),
    "OPT": Row("transformers", opt),
    "ViT": Row("transformers", hugging_face_vit),
    "GPT-2": Row("transformers", gpt2),
    "Mixtral": Row("transformers", mixtral),
    "Qwen3": Row("transformers", qwen3),
    "Whisper encoder": Row("transformers", whisper_encoder),
    "UNet2D": Row("diffusers", unet2d),
    "x-transformers decoder": Row("x_transformers", x_transformers_decoder),
    "vit-pytorch ViT": Row("vit_pytorch", vit_pytorch_vit),
    "timm vision_transformer": Row("timm", of_timm("test_vit", 32, img_size=32)),
    "timm convnext": Row("timm", of_timm("test_convnext", 32)),
    "timm efficientnet": Row("timm", of_timm("test_efficientnet", 32)),
    "timm nfnet": Row("timm", of_timm("test_nfnet", 32)),
    "timm mlp_mixer": Row("timm", of_timm("mixer_s32_224", 32, img_size=32)),
    "timm swin_transformer": Row(
        "timm",
        of_timm(
            "swin_tiny_patch4_window7_224", 32, img_size=32, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(2, 4)
        ),
    ),
    "segmentation FPN": Row("segmentation_models_pytorch", segmentation_fpn),
    "monai UNet": Row("monai", monai_unet),
    "GCN": Row("torch_geometric", gcn),
}
