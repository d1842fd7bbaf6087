"""What a config.json can ask for that does not fit a dense decoder step, as one table: signs, reason, advice.

A checkpoint is refused by the feature that does not fit, before its family is looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from kvexport.errors import CheckpointError
from kvexport.model.config import shown
from kvexport.model.expressions import evaluate
from kvexport.model.families import families

Sign = Callable[[Any], bool] | tuple[str, ...]  # a test, or patterns of the value or of one entry of a list

_DENSE = "use a model of a supported family (docs/families.md) without it"
_KINDS = ("layer_types", "layers_block_type", "block_types")  # keys that list the kind of each layer
# keys of the text part in a model for several media
_TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")

_SAVE_TEXT_PART = (  # one line, so that it can be copied from the message
    'save its text part, and give the folder TEXT: python -c "'
    "from transformers import CLASS as M, AutoModelForCausalLM as C, AutoTokenizer as T; "
    "m = M.from_pretrained('CHECKPOINT', dtype='auto'); "
    "t = C.from_config(m.config.get_text_config(), dtype=m.dtype); "
    "setattr(t, t.base_model_prefix, m.get_decoder()); "
    "t.set_output_embeddings(m.get_output_embeddings()); "
    "t.generation_config = m.generation_config; "
    "t.save_pretrained('TEXT'); "
    "T.from_pretrained('CHECKPOINT').save_pretrained('TEXT')\""
)


@dataclass(frozen=True)
class Feature:
    """A part of a model that a dense decoder step does not have.

    Attributes:
        name: of the feature, as in "must not have NAME".
        reason: why it is not supported.
        advice: what a user can do.
        signs: key of config.json, dots for nested ones, and what its value is if the model has the feature.
        layer_kinds: patterns of the kinds of such layers, where config.json lists the kind of each layer;
            then `signs` are not looked at.
    """

    name: str
    reason: str
    signs: Mapping[str, Sign]
    advice: str = _DENSE
    layer_kinds: tuple[str, ...] = ()

    def evidence(self, config: Mapping[str, Any]) -> str | None:
        """The first setting of config.json that shows the feature; None if there is none."""
        if self.layer_kinds:
            listed = [key for key in _KINDS if isinstance(config.get(key), (list, str)) and config[key]]
            signs: Mapping[str, Sign] = dict.fromkeys(listed, self.layer_kinds) or self.signs
        else:
            signs = self.signs
        for key, sign in signs.items():
            value = evaluate(key, config)
            if sign(value) if callable(sign) else _matches(value, sign):
                return f"{key} = {shown(value)}"
        return None


def _is_given(value: Any) -> bool:
    return value not in (None, False, 0, "", [], {})


def _is_several(value: Any) -> bool:
    """Whether a count is above 1; a list has one count for each layer."""
    if isinstance(value, list):
        return any(map(_is_several, value[:1000]))
    return isinstance(value, (int, float)) and value > 1


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and any(type(each) is int for each in value)


def _matches(value: Any, patterns: tuple[str, ...]) -> bool:
    values = value if isinstance(value, list) else [value]
    texts = {str(each) for each in values if isinstance(each, (str, bool))}
    return any(fnmatchcase(text, pattern) for text in texts for pattern in patterns)


FEATURES = (
    Feature(
        "a separate encoder",
        "a decoder step computes one sequence from its own tokens",
        {
            "is_encoder_decoder": ("True",),
            "add_cross_attention": ("True",),
            "cross_attention_layers": _is_given,
            "encoder.model_type": _is_given,
        },
        "use a decoder-only model",
    ),
    Feature(
        "a mixture of experts",
        "each token is computed by other weights, which a dense decoder step cannot choose",
        {
            **dict.fromkeys(
                (
                    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
                    "num_moe_experts", "n_experts", "num_expert", "ffn_config.moe_num_experts",
                ),
                _is_several,
            ),
            "model_type": ("*_moe", "*moe", "mixtral", "gpt_oss"),
        },
    ),
    Feature(
        "latent attention",
        "its cache (MLA) is one vector for all heads, and not keys and values of KV heads",
        {"kv_lora_rank": _is_given, "attn_config.kv_lora_rank": _is_given},
    ),
    Feature(
        "recurrent or convolutional layers",
        "their state has a fixed size and holds no keys and values",
        {
            **dict.fromkeys(
                (
                    "mamba_d_state", "mamba_d_ssm", "mamba_num_heads", "mamba_expand", "ssm_cfg",
                    "ssm_state_size", "state_size", "conv_L_cache", "conv_kernel", "linear_num_key_heads",
                    "linear_attn_config", "hybrid_override_pattern", "attn_layer_period",
                    "attn_layer_indices", "lru_width", "attention_hidden_size",
                ),
                _is_given,
            ),
            "model_type": ("*mamba*", "*rwkv*", "*xlstm*", "*recurrent*", "retnet", "hyena"),
        },
        layer_kinds=(
            "*mamba*", "*linear_attention*", "*recurrent*", "*conv*", "*hybrid*", "*rwkv*", "*deltanet*",
        ),
    ),
    Feature(
        "KV caches that layers share",
        "each layer must have keys and values of its own",
        {"num_kv_shared_layers": _is_given, "use_cla": ("True",), "cla_share_factor": _is_several},
    ),
    Feature(
        "embeddings for each layer",
        "layers read only what the layer before computes",
        {"hidden_size_per_layer_input": _is_given, "altup_num_inputs": _is_several},
    ),
    Feature(
        "layers of different sizes",
        "all layers must have the same shapes in the checkpoint",
        {
            "block_configs": _is_given,
            "num_attention_heads_per_layer": _is_given,
            **dict.fromkeys(
                (
                    "num_attention_heads", "num_key_value_heads", "num_query_heads", "num_kv_heads",
                    "intermediate_size", "head_dim",
                ),
                _is_list,
            ),
        },
    ),
    Feature(
        "attention sinks of learned weights",
        "the softmax of attention has no such term",
        {
            "add_swa_attention_sink_bias": ("True",),
            "add_full_attention_sink_bias": ("True",),
            "model_type": ("gpt_oss*",),
        },
    ),
    Feature(
        "sparse attention",
        "layers attend to all tokens, or to a sliding window",
        {
            "index_topk": _is_given,
            "sparse_config": _is_given,
            "attention_chunk_size": _is_given,
            "layer_types": ("*indexed*", "*sparse*", "*compressed*", "*chunked*"),
        },
    ),
    Feature(
        "bidirectional attention",
        "a decoder step sees only the tokens before it",
        {
            "use_bidirectional_attention": ("True", "all"),
            "is_causal": ("False",),
            "architectures": ("*ForMaskedLM", "*ForPreTraining", "LLaDA*", "Dream*", "SDAR*", "*Diffusion*"),
            "model_type": (
                "*bert", "bert*", "roberta*", "deberta*", "electra", "mpnet", "xlm-roberta*",
                "llada*", "[Dd]ream", "sdar*", "*diffusion*",
            ),
        },
        "use a model that generates text token by token",
    ),
    Feature(
        "a head other than the one for the next token",
        "the output of a decoder step is the logits of the next token",
        {
            "architectures": (
                "*ForSequenceClassification", "*ForTokenClassification", "*ForQuestionAnswering",
                "*ForMultipleChoice", "*ForImageClassification", "*ForAudioClassification", "*ForCTC",
                "*RewardModel",
            ),
        },
        "use a model whose architectures in config.json ends with ForCausalLM",
    ),
    Feature(
        "parts for images or sound",
        "the input of a decoder step is token ids",
        dict.fromkeys(("vision_config", "audio_config", "mm_vision_tower", "visual"), _is_given),
        "use a text model; this config.json has no text_config of a part that could be taken alone",
    ),
)  # fmt: skip


def require_dense_decoder(config: Mapping[str, Any]) -> None:
    """Check that config.json asks for nothing that a dense decoder step does not have.

    Raises:
        CheckpointError: it does; the message names the feature, the reason and what to do.
    """
    text = _text_part(config)
    for feature in FEATURES:
        evidence = feature.evidence(config if text is None else text)
        if evidence is not None:
            raise CheckpointError(
                f"the model must not have {feature.name}: {feature.reason}",
                got=evidence
                + ("" if text is None else f" in the text part of {shown(config.get('model_type'))}"),
                fix=feature.advice,
            )
    if text is not None:
        raise _wrapped(config, text)


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Settings of the text model within those of a model for several media; None: it is a text model."""
    found = None
    for _ in range(len(_TEXT_PARTS)):
        nested = [config[key] for key in _TEXT_PARTS if isinstance(config.get(key), dict) and config[key]]
        if not nested:
            break
        found = config = nested[0]
    return found


def _wrapped(config: Mapping[str, Any], text: Mapping[str, Any]) -> CheckpointError:
    """The refusal of a model for several media, with the command that saves its text part."""
    model_type = text.get("model_type")
    supported = isinstance(model_type, str) and model_type in families()
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    name = next((each for each in names if isinstance(each, str) and each.isidentifier()), None)
    return CheckpointError(
        "the checkpoint must be a text model, without parts for images or sound",
        got=f"model_type = {shown(config.get('model_type'))}, whose text part has "
        f"model_type = {shown(model_type)}, which is {'' if supported else 'not '}supported",
        expected=None if supported else ", ".join(sorted(families())),
        fix=_SAVE_TEXT_PART.replace("CLASS", name or "AutoModelForImageTextToText")
        if supported
        else "use a text model of a supported family",
    )
