"""What each architecture wants of the cutter and of a stage, as data: one rule, no subclasses.

This file may import ``errors``. A rule says whether a model may be cut, where, and what a
shard's metadata and the engine must do so that stages together compute the whole model's bits.
Source: ``src/models/*.cpp`` of the llama.cpp that llama-cpp-python 0.3.36 carries. The
contract tests prove the rules of the architectures named in ``tests/tinymodels.py``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from edgellm.errors import UnsupportedModelError


class Support(enum.StrEnum):
    """How far an architecture is supported."""

    CUT = "cut"
    SOLO = "solo"
    """Runs whole on one device; why it cannot be cut yet is in ``reason``."""
    NONE = "none"
    """Does not generate text token by token."""


class Scale(enum.StrEnum):
    """How token embeddings are scaled before the first layer, where *we* look them up."""

    NONE = "none"
    SQRT_WIDTH = "sqrt_width"
    """By the float32 square root of the width, for tokens only (not for rows from a peer)."""
    METADATA = "metadata"
    """By ``{arch}.embedding_scale``; llama.cpp would repeat it, so every shard says 1."""


class Recurrence(enum.StrEnum):
    """How llama.cpp learns which layers carry a recurrent state instead of KV cells."""

    NONE = "none"
    ALL = "all"
    EVERY = "every"
    """Every layer has attention and a recurrent state."""
    NO_KV_HEADS = "no_kv_heads"
    """Layers whose ``attention.head_count_kv`` is 0."""
    NO_KV_HEADS_NO_FFN = "no_kv_heads_no_ffn"
    """Layers with neither KV heads nor a feed-forward length."""
    INTERVAL = "interval"
    """``attention.recurrent_layers``, else all but every ``full_attention_interval``-th layer."""


@dataclass(frozen=True, slots=True)
class Window:
    """Sliding-window attention in some layers.

    The pattern is ``attention.sliding_window_pattern``: one flag a layer, or a period (every
    ``period``-th layer is full, the last of each group or, with ``full_first``, the first).
    """

    period: int
    full_first: bool = False
    default_size: int = 0
    """Tokens, where ``attention.sliding_window`` is absent; 0: then there is no window at all."""


@dataclass(frozen=True, slots=True)
class ArchitectureRule:
    """Everything the cutter, the card and the engine must know about one architecture."""

    support: Support = Support.CUT
    reason: str = ""
    residual_node: str = "l_out"
    """Graph node ``{residual_node}-{layer}`` that holds the rows a stage hands on."""
    input_node: str | None = None
    """Graph node that a later stage overwrites with the rows it received, because llama.cpp
    would change them on the way in (Gemma multiplies embeddings and rows alike)."""
    scale: Scale = Scale.NONE
    default_scale: float = 0.0
    """The ``METADATA`` scale where the key is absent; 0: no scale."""
    depth_scale: float = 0.0
    """``residual_scale`` is this over the root of the number of layers where the key is absent:
    a shard has fewer layers, so it says the value. 0: it does not depend on them."""
    tied_only: bool = False
    """llama.cpp never reads ``output.weight``: the head is always ``token_embd.weight``."""
    final_norm: str = "output_norm"
    window: Window | None = None
    recurrence: Recurrence = Recurrence.NONE
    boundary_multiple: int = 1
    """Boundaries are multiples of this, where a layer's graph depends on its index."""
    boundary_step_key: str | None = None
    """... or of the value under this metadata suffix."""
    layer_counts: frozenset[int] = frozenset()
    """Layer counts that change llama.cpp's arithmetic: a model or a span of so many is not cut."""
    overrides: tuple[tuple[str, int], ...] = ()
    """Metadata suffixes that a shard sets to a value, where the source has them."""


PER_LAYER_KEYS: tuple[str, ...] = (
    "feed_forward_length",
    "expert_feed_forward_length",
    "expert_used_count",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.sliding_window_pattern",
    "attention.recurrent_layers",
    "attention.rope_pattern",
    "swiglu_clamp_exp",
    "swiglu_clamp_shexp",
)
"""Suffixes whose arrays hold one value a layer: a shard holds its slice."""

PER_LAYER_FULL_KEYS: tuple[str, ...] = (
    "xielu.alpha_n",
    "xielu.alpha_p",
    "xielu.beta",
    "xielu.eps",
)
"""The same, without the architecture in front."""

WHOLE_ARRAY_KEYS: tuple[str, ...] = (
    "rope.dimension_sections",
    "classifier.output_labels",
)
"""Suffixes of arrays that are not per layer, whatever their length."""

_PLAIN = """
    llama deci falcon gptneox refact stablelm qwen qwen2 qwen2moe qwen2vl qwen3 qwen3moe phi2 phi3
    phimoe plamo codeshell orion internlm2 starcoder2 xverse dbrx olmo olmoe arctic deepseek
    deepseek2-ocr chatglm glm4 glm4moe jais jais2 nemotron exaone chameleon bailingmoe
    bailingmoe2 dots1 arcee ernie4_5 hunyuan-moe hunyuan-dense hunyuan_vl hy_v3 seed_oss grovemoe
    apertus minimax-m2 pangu-embedded mistral3 paddleocr maincoder
"""

_TEXT_ONLY = (("n_deepstack_layers", 0),)
_LITE = frozenset({26, 27, 47, 48})

_RULED: dict[str, ArchitectureRule] = {
    "gemma": ArchitectureRule(input_node="inp_scaled", tied_only=True),
    "gemma2": ArchitectureRule(
        input_node="inp_scaled",
        tied_only=True,
        window=Window(period=2, default_size=4096),
        layer_counts=frozenset({46}),
    ),
    "gemma3": ArchitectureRule(
        scale=Scale.SQRT_WIDTH, window=Window(period=6), layer_counts=frozenset({62})
    ),
    "cohere2": ArchitectureRule(tied_only=True, window=Window(period=4)),
    "command-r": ArchitectureRule(tied_only=True),
    "bitnet": ArchitectureRule(tied_only=True),
    "openelm": ArchitectureRule(tied_only=True),
    "plm": ArchitectureRule(tied_only=True),
    "olmo2": ArchitectureRule(window=Window(period=4)),
    "gpt-oss": ArchitectureRule(window=Window(period=2)),
    "mellum": ArchitectureRule(window=Window(period=4)),
    "grok": ArchitectureRule(scale=Scale.METADATA, default_scale=78.38367176906169),
    "minicpm": ArchitectureRule(scale=Scale.METADATA, default_scale=12.0, depth_scale=1.4),
    "granite": ArchitectureRule(scale=Scale.METADATA),
    "granitemoe": ArchitectureRule(scale=Scale.METADATA),
    "granitehybrid": ArchitectureRule(scale=Scale.METADATA, recurrence=Recurrence.NO_KV_HEADS),
    "deepseek2": ArchitectureRule(layer_counts=_LITE),
    "mistral4": ArchitectureRule(layer_counts=_LITE),
    "smollm3": ArchitectureRule(boundary_multiple=4),
    "ernie4_5-moe": ArchitectureRule(boundary_step_key="interleave_moe_layer_step"),
    "qwen3vl": ArchitectureRule(overrides=_TEXT_ONLY),
    "qwen3vlmoe": ArchitectureRule(overrides=_TEXT_ONLY),
    "mamba": ArchitectureRule(recurrence=Recurrence.ALL),
    "mamba2": ArchitectureRule(recurrence=Recurrence.ALL),
    "falcon-h1": ArchitectureRule(recurrence=Recurrence.EVERY),
    "jamba": ArchitectureRule(recurrence=Recurrence.NO_KV_HEADS),
    "lfm2": ArchitectureRule(recurrence=Recurrence.NO_KV_HEADS, final_norm="token_embd_norm"),
    "lfm2moe": ArchitectureRule(recurrence=Recurrence.NO_KV_HEADS, final_norm="token_embd_norm"),
    "nemotron_h": ArchitectureRule(recurrence=Recurrence.NO_KV_HEADS_NO_FFN),
    "nemotron_h_moe": ArchitectureRule(recurrence=Recurrence.NO_KV_HEADS_NO_FFN),
    "qwen3next": ArchitectureRule(recurrence=Recurrence.INTERVAL),
    "qwen35": ArchitectureRule(recurrence=Recurrence.INTERVAL),
    "qwen35moe": ArchitectureRule(recurrence=Recurrence.INTERVAL),
    "minimax-01": ArchitectureRule(recurrence=Recurrence.INTERVAL),
}

_SOLO_REASONS: dict[str, str] = {
    "it adds position embeddings at its input": "gpt2 starcoder",
    "it normalises its input again in every stage": "bloom rwkv6",
    "its graph depends on the index of a layer": "afmoe",
    "a two-part run was close but not bit-equal": "mpt",
    "its arithmetic depends on the number of layers": "baichuan exaone4 exaone-moe llama4 minicpm3",
    "layers share values with the first layer": "rwkv6qwen2 rwkv7 arwkv7 gemma3n gemma4",
    "layers share indexers or caches": "deepseek32 deepseek4 glm-dsa glm5-next dots3note hy_v4"
    " qwen4exp minimax-m3",
    "layers are looped or stacked by index": "hrm_text nanbeige kimi-k3 talkie",
    "layer shapes come from the metadata of layer 0": "kimi-linear bailingmoe3",
    "its cut has not been verified yet": "plamo2 plamo3 muse-glimmer cohere2moe laguna"
    " smallthinker granite_swa graniteswitch maple mimo2 step35 spark2_5 cogvlm",
}

_NO_TEXT = """
    clip bert modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 eurobert
    gemma-embedding llama-embed t5 t5encoder wavtokenizer-dec pockettts qwen3tts eagle3 dflash
    gemma4-assistant dream llada llada-moe rnd1 gptj
"""


def _table() -> dict[str, ArchitectureRule]:
    rules = dict.fromkeys(_PLAIN.split(), ArchitectureRule())
    rules.update(_RULED)
    for reason, names in _SOLO_REASONS.items():
        rules.update(dict.fromkeys(names.split(), ArchitectureRule(Support.SOLO, reason)))
    refused = ArchitectureRule(Support.NONE, "it does not generate text token by token")
    rules.update(dict.fromkeys(_NO_TEXT.split(), refused))
    return rules


ARCHITECTURES: dict[str, ArchitectureRule] = _table()
"""Every architecture name that llama.cpp knows, with its rule."""


def architecture_rule(name: str) -> ArchitectureRule:
    """The rule of an architecture that can at least run whole.

    Raises ``UnsupportedModelError`` for an unknown name and for models that do not generate text.
    """
    rule = ARCHITECTURES.get(name)
    if rule is None:
        raise UnsupportedModelError(
            f"llama.cpp does not know the architecture {name[:60]!r}.",
            field="general.architecture",
        )
    if rule.support is Support.NONE:
        raise UnsupportedModelError(
            f"architecture {name!r} cannot be run: {rule.reason}.", field="general.architecture"
        )
    return rule
