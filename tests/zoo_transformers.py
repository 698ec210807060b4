"""One tiny model of each of sixty architectures of transformers, from its configuration; see zoo.py.

``ARCHITECTURES``: name -> (class, its arguments, its configuration beyond SIZES). The names of a
size differ from one configuration to the next, so that SIZES sets each name that a configuration has.
"""

from typing import Any

import torch
from zoo import WORDS, Case, skip_without, words

SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embed_dim", "dim", "embedding_size", "projection_dim"], 32),
    **dict.fromkeys(["intermediate_size", "d_ff", "ffn_dim", "n_inner", "hidden_dim", "d_inner"], 64),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim"], 64),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers"], 2),
    **dict.fromkeys(["encoder_layers", "decoder_layers", "num_decoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads"], 2),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"], 64),
    **dict.fromkeys(["head_dim", "d_kv"], 8),
    **dict.fromkeys(["num_local_experts", "num_experts", "n_routed_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok"], 2),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 16),
    **dict.fromkeys(["pad_token_id"], 0),
    **dict.fromkeys(["bos_token_id", "eos_token_id", "decoder_start_token_id"], 1),
    **dict.fromkeys(["image_size"], 16),
    **dict.fromkeys(["patch_size"], 4),
}


def language():
    ids = words()
    return {"input_ids": ids, "labels": ids}


def texts():
    return {"input_ids": words(), "labels": torch.tensor([0, 1])}


def encoded():
    return {"input_ids": words()}


def translation():
    return {"input_ids": words(), "labels": words(7)}


def masked_translation():
    """Where it is compiled, its forward needs the mask: without one, it makes none then."""
    return {**translation(), "attention_mask": torch.ones(2, 9)}


def pictures(size=16):
    return {"pixel_values": torch.randn(2, 3, size, size), "labels": torch.tensor([0, 1])}


def pictures_of(size):
    return lambda: pictures(size)


def sound():
    return {"input_values": torch.randn(2, 800), "labels": words(4)}


def spectrum():
    return {"input_features": torch.randn(2, 8, 32), "labels": words(5)}


def captioned():
    return {"input_ids": words(), "pixel_values": torch.randn(2, 3, 16, 16), "return_loss": True}


def series():
    return {"past_values": torch.randn(2, 32, 3), "future_values": torch.randn(2, 4, 3)}


_CONVOLUTIONS = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
_POSITIONS = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}
_HALF_TOWERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_HALF_TOWERS, "vocab_size": WORDS, "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0}
_VISION = {**_HALF_TOWERS, "image_size": 16, "patch_size": 4}

ARCHITECTURES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    # Language models
    "biogpt": ("BioGptForCausalLM", language, {}),
    "bloom": ("BloomForCausalLM", language, {}),
    "codegen": ("CodeGenForCausalLM", language, {"rotary_dim": 4}),
    "cohere": ("CohereForCausalLM", language, {}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        language,
        {
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
        },
    ),
    "falcon": ("FalconForCausalLM", language, {}),
    "gemma": ("GemmaForCausalLM", language, {}),
    "gemma2": ("Gemma2ForCausalLM", language, {"sliding_window": 8}),
    "gemma3_text": ("Gemma3ForCausalLM", language, {"sliding_window": 8}),
    "glm4": ("Glm4ForCausalLM", language, {}),
    "gpt2": ("GPT2LMHeadModel", language, {}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", language, {}),
    "gpt_neo": ("GPTNeoForCausalLM", language, {"attention_types": [[["global", "local"], 1]], "window_size": 4}),
    "gpt_neox": ("GPTNeoXForCausalLM", language, {}),
    "gpt_oss": ("GptOssForCausalLM", language, {"sliding_window": 8}),
    "gptj": ("GPTJForCausalLM", language, {"rotary_dim": 4}),
    "granitemoe": ("GraniteMoeForCausalLM", language, {}),
    "llama": ("LlamaForCausalLM", language, {}),
    "mamba": ("MambaForCausalLM", language, {"state_size": 4}),
    "mistral": ("MistralForCausalLM", language, {"sliding_window": 8}),
    "mixtral": ("MixtralForCausalLM", language, {}),
    "mpt": ("MptForCausalLM", language, {}),
    "olmo2": ("Olmo2ForCausalLM", language, {}),
    "olmoe": ("OlmoeForCausalLM", language, {}),
    "opt": ("OPTForCausalLM", language, {"word_embed_proj_dim": 32}),
    "phi": ("PhiForCausalLM", language, {}),
    "phi3": ("Phi3ForCausalLM", language, {}),
    "qwen2": ("Qwen2ForCausalLM", language, {}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", language, {}),
    "qwen3": ("Qwen3ForCausalLM", language, {}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", language, {}),
    "smollm3": ("SmolLM3ForCausalLM", language, {}),
    "stablelm": ("StableLmForCausalLM", language, {}),
    "starcoder2": ("Starcoder2ForCausalLM", language, {}),
    # Encoders
    "albert": ("AlbertForSequenceClassification", texts, {}),
    "bert": ("BertForSequenceClassification", texts, {}),
    "convbert": ("ConvBertForSequenceClassification", texts, {}),
    "deberta": (
        "DebertaForSequenceClassification",
        texts,
        {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        texts,
        {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "distilbert": ("DistilBertForSequenceClassification", texts, {"hidden_dim": 64}),
    "electra": ("ElectraForSequenceClassification", texts, {}),
    "esm": ("EsmForSequenceClassification", texts, {"mask_token_id": 2}),
    "fnet": ("FNetForSequenceClassification", texts, {}),
    "longformer": ("LongformerForSequenceClassification", texts, {"attention_window": 4}),
    "modernbert": ("ModernBertForSequenceClassification", texts, {"cls_token_id": 1, "sep_token_id": 2}),
    "mpnet": ("MPNetForSequenceClassification", texts, {}),
    "roberta": ("RobertaForSequenceClassification", texts, {}),
    "xlnet": ("XLNetForSequenceClassification", texts, {}),
    # Encoders with decoders
    "bart": ("BartForConditionalGeneration", translation, {}),
    "led": ("LEDForConditionalGeneration", translation, {"attention_window": 4, "max_encoder_position_embeddings": 64}),
    "m2m_100": ("M2M100ForConditionalGeneration", translation, {}),
    "marian": ("MarianMTModel", translation, {}),
    "pegasus": ("PegasusForConditionalGeneration", translation, {}),
    "switch_transformers": (
        "SwitchTransformersForConditionalGeneration",
        masked_translation,
        {"decoder_start_token_id": 0, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    ),
    "t5": ("T5ForConditionalGeneration", translation, {"decoder_start_token_id": 0}),
    # Pictures
    "beit": ("BeitForImageClassification", pictures, {}),
    "convnext": ("ConvNextForImageClassification", pictures_of(32), {"hidden_sizes": [8, 16], "depths": [1, 1]}),
    "deit": ("DeiTForImageClassification", pictures, {}),
    "dinov2": ("Dinov2ForImageClassification", pictures, {}),
    "resnet": (
        "ResNetForImageClassification",
        pictures_of(32),
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    ),
    "segformer": (
        "SegformerForImageClassification",
        pictures_of(32),
        {
            "hidden_sizes": [8, 16, 16, 16],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 2],
            "patch_sizes": [7, 3, 3, 3],
        },
    ),
    "swin": (
        "SwinForImageClassification",
        pictures,
        {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2, "patch_size": 2},
    ),
    "vit": ("ViTForImageClassification", pictures, {}),
    # Sound, pairs, series
    "clip": ("CLIPModel", captioned, {"text_config": _TEXT, "vision_config": _VISION}),
    "siglip": ("SiglipModel", captioned, {"text_config": _TEXT, "vision_config": _VISION}),
    "hubert": ("HubertForCTC", sound, {**_CONVOLUTIONS, **_POSITIONS}),
    "patchtst": (
        "PatchTSTForPrediction",
        series,
        {"num_input_channels": 3, "context_length": 32, "prediction_length": 4, "patch_length": 4, "patch_stride": 4},
    ),
    "wav2vec2": ("Wav2Vec2ForCTC", sound, {**_CONVOLUTIONS, **_POSITIONS}),
    "whisper": (
        "WhisperForConditionalGeneration",
        spectrum,
        {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
    ),
}


def build(name: str) -> Case:
    skip_without("transformers")
    import transformers

    kind, inputs, special = ARCHITECTURES[name]
    kind = getattr(transformers, kind)
    aliases = kind.config_class.attribute_map
    known = {*vars(kind.config_class()), *aliases}
    sizes = {key: size for key, size in SIZES.items() if key in known and aliases.get(key) not in special}
    config = kind.config_class(**sizes | special)
    return kind(config), (), inputs()
