"""Module names in LoRA files of diffusion models, and the names torch gives them.

kohya writes `lora_unet_down_blocks_0_attentions_1_proj_in`, where the dots are lost:
the words that modules are made of bring them back. cloneofsimo's files number them.
"""

from collections.abc import Sequence
import functools as ft
import re

from ._errors import show

PREFIXES = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
    "lora_transformer": "transformer",
}
COMPONENTS = tuple(dict.fromkeys(PREFIXES.values()))
_WORDS = frozenset(
    """
    down_blocks mid_block up_blocks attentions transformer_blocks resnets downsamplers
    upsamplers attn1 attn2 to_q to_k to_v to_out ff net proj proj_in proj_out conv conv1
    conv2 conv_in conv_out conv_shortcut time_emb_proj time_embedding add_embedding
    linear_1 linear_2 text_model text_projection encoder embeddings token_embedding
    position_embedding layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2
    input_blocks middle_block output_blocks in_layers out_layers emb_layers
    skip_connection op time_embed label_emb out double_blocks single_blocks img_attn
    txt_attn img_mlp txt_mlp img_mod txt_mod qkv lin linear1 linear2 modulation norm
    joint_blocks x_block context_block attn adaLN_modulation final_layer x_embedder
    context_embedder t_embedder y_embedder attn2 block layer SelfAttention
    DenseReluDense q k v o wi_0 wi_1 wo single_transformer_blocks add_q_proj add_k_proj
    add_v_proj to_add_out ff_context norm1 norm1_context proj_mlp linear
    """.split()
)
_LONGEST = max(word.count("_") for word in _WORDS) + 1
_CLIP = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def of_kohya(name: str) -> tuple[str, str]:
    """Component and module of `lora_unet_mid_block_attentions_0_proj_in` and the like.

    Raises:
      ValueError: the prefix, or a word behind it, is none that is known.
    """
    prefix = next((p for p in PREFIXES if name.startswith(f"{p}_")), None)
    if prefix is None:
        raise ValueError(f"{show(name)} begins with none of {', '.join(PREFIXES)}")
    parts = tuple(name.removeprefix(f"{prefix}_").split("_"))
    words = _parsed(parts)
    if words is None:
        raise ValueError(f"{show(name)} holds words that no known module has")
    return PREFIXES[prefix], ".".join(words)


def to_kohya(component: str, module: str, *, several: bool) -> str:
    """The inverse; `several` text encoders are numbered from 1.

    Raises:
      ValueError: the name would not say which module it is of.
    """
    prefix = next((p for p, c in PREFIXES.items() if c == component), None)
    if prefix is None:
        raise ValueError(f"kohya has no name for the component {component!r}")
    if component == "text_encoder" and several:
        prefix = "lora_te1"
    name = f"{prefix}_{module.replace('.', '_')}"
    if _parsed(tuple(module.replace(".", "_").split("_"))) != tuple(module.split(".")):
        raise ValueError(f"{module!r} cannot be told from its name in kohya's: {name}")
    return name


def of_diffusers(name: str, *, old: bool) -> tuple[str, str]:
    """Component and module of `unet.mid_block.attentions.0.proj_in` and the like.

    `old` are the names of attention processors: `...attn1.processor.to_out`.
    """
    component = next((c for c in COMPONENTS if name.startswith(f"{c}.")), "unet")
    module = name.removeprefix(f"{component}.").replace(".processor.", ".")
    if old and component.startswith("text_encoder"):
        head, _, last = module.rpartition(".")
        module = f"{head}.{_CLIP.get(last, last)}"
    elif old:
        module = re.sub(r"\.to_out$", ".to_out.0", module)
    return component, module


def numbered(component: str, count: int) -> Sequence[str]:
    """The modules that cloneofsimo's files number, in the order they do.

    Those of Stable Diffusion: of each attention block in `down_blocks`, `up_blocks` and
    `mid_block` the first attention, perhaps the feed-forward, the second attention; of
    each layer of CLIP k, v, q and out.

    Raises:
      ValueError: another number of modules than that.
    """
    if component == "text_encoder" and count % 4 == 0:
        inner = ("k_proj", "v_proj", "q_proj", "out_proj")
        layers = range(count // 4)
        head = "text_model.encoder.layers"
        return [f"{head}.{i}.self_attn.{name}" for i in layers for name in inner]
    if component != "unet" or count not in (128, 144):
        raise ValueError(
            f"{count} numbered modules of the {component}: only those of Stable "
            "Diffusion 1 and 2 (128 or 144, 4 per layer of CLIP) have known names"
        )
    blocks = [f"down_blocks.{i}.attentions.{j}" for i in range(3) for j in range(2)]
    blocks += [f"up_blocks.{i}.attentions.{j}" for i in range(1, 4) for j in range(3)]
    blocks += ["mid_block.attentions.0"]
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    inner = [f"attn1.{end}" for end in ends]
    inner += ["ff.net.0.proj"] * (count == 144)
    inner += [f"attn2.{end}" for end in ends]
    return [f"{b}.transformer_blocks.0.{name}" for b in blocks for name in inner]


@ft.lru_cache(maxsize=4096)
def _parsed(parts: tuple[str, ...]) -> tuple[str, ...] | None:
    """The words that underscores join, longest first; None where there are none."""
    if not parts:
        return ()
    for size in range(min(_LONGEST, len(parts)), 0, -1):
        word = "_".join(parts[:size])
        if word in _WORDS or (size == 1 and word.isdigit()):
            rest = _parsed(parts[size:])
            if rest is not None:
                return (word, *rest)
    return None
