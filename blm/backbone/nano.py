"""`nano`: a 2 M-parameter image-text-to-text model of a stock class, small enough to train on two CPU cores.

`LlavaForConditionalGeneration` with a convolutional eye. A patch-14 transformer eye trained from scratch
does not learn to localise within minutes; a convolution stem of the same size does. Only the eye is ours; it
is registered with transformers' Auto classes on import. Processor, chat template and folder are stock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
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
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

IMAGE_SIZE, GRID = 112, 4
"""Every picture is resized to 112 x 112 px and becomes GRID * GRID tokens."""
FREQUENCIES = (1, 2, 4, 5, 10)
"""Half periods of the position code over the picture. 5 and 10 tell apart what decimal digits need."""
IMAGE_TOKEN, PAD_TOKEN, END_TOKEN = "<image>", "<pad>", "<|end|>"
SPECIAL_TOKENS = (PAD_TOKEN, IMAGE_TOKEN, END_TOKEN, "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|' + message.role + '|>' }}"
    "{%- if message.content is string -%}{{ message.content }}{%- else -%}"
    "{%- for part in message.content -%}"
    "{{ '<image>' if part.type == 'image' else part.text }}{%- endfor -%}{%- endif -%}"
    "{{ '<|end|>' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
SAMPLE_TEXTS = (
    "Robot: Panda. Views: base, wrist. Point to the object, the goal and the gripper. (512, 430)",
    "Task: push the blue cube to the target. What is the next primitive? approach grasp move place push hold",
    "Is there a red cube on the table? yes no What colour is the sphere? green How many objects are there?",
)
"""What the tokenizer is trained on when no corpus is given."""


class ConvVisionConfig(PretrainedConfig):
    model_type = "blm_conv_vision"

    def __init__(
        self, channels: int = 64, blocks: int = 1, heads: int = 4, hidden_size: int = 192, **kwargs: Any
    ) -> None:
        self.channels, self.blocks, self.heads, self.hidden_size = channels, blocks, heads, hidden_size
        self.image_size, self.patch_size = IMAGE_SIZE, IMAGE_SIZE // GRID
        super().__init__(**kwargs)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class ConvVision(PreTrainedModel):
    """[N, 3, 112, 112] normalised pixels -> [N, 16, C] tokens, each a thing looked for and where it is.

    Convolutions at stride 4, then a softmax over all cells for every (token, head): the weighted mean of
    features and of a Fourier position code. This is the spatial softmax of "Deep Spatial Autoencoders for
    Visuomotor Learning" (Finn et al., 2016) with a code in place of two coordinates. The scores start large,
    so some head looks at each colour from the beginning; normalisation slows the start and is left out.
    """

    config_class = ConvVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ConvVisionConfig) -> None:
        super().__init__(config)
        channels, width, self.heads = config.channels, config.hidden_size, config.heads
        blocks = [ResidualBlock(channels) for _ in range(config.blocks)]
        self.features = nn.Sequential(nn.Conv2d(3, channels, 4, stride=4), *blocks, nn.ReLU())
        self.score = nn.Linear(channels, GRID * GRID * self.heads)
        self.value = nn.Linear(channels, width)
        self.place = nn.Linear(2 + 4 * len(FREQUENCIES), width)
        self.norm = nn.LayerNorm(width)
        self.name = nn.Parameter(torch.zeros(GRID * GRID, width))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, ConvVision):  # transformers visits modules with parameters of their own only
            for block in module.features:
                if isinstance(block, ResidualBlock):
                    nn.init.zeros_(block.conv2.weight)
            for linear in (module.value, module.place):
                nn.init.kaiming_uniform_(linear.weight, a=5**0.5)
            nn.init.normal_(module.score.weight, std=1.0)
            nn.init.normal_(module.name, std=0.5)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        grid = self.features(pixel_values)
        cells = grid.flatten(2).transpose(1, 2)
        weights = self.score(cells).softmax(dim=1).unflatten(2, (GRID * GRID, self.heads))
        values = self.value(cells) + self.place(position_code(grid))
        tokens = torch.einsum("npth,nphd->nthd", weights, values.unflatten(2, (self.heads, -1))).flatten(2)
        tokens = self.norm(tokens) + self.name
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))


def position_code(grid: Tensor) -> Tensor:
    """Return [height * width, 2 + 4 F]: x, y in -1 .. 1; sin, cos of pi f x, pi f y for F frequencies f."""
    lines = [(torch.arange(n, device=grid.device) + 0.5) / n * 2 - 1 for n in grid.shape[-2:]]
    y, x = torch.meshgrid(*lines, indexing="ij")
    place = torch.stack([x, y], dim=-1).reshape(-1, 2)
    phase = (place[:, :, None] * torch.tensor(FREQUENCIES, device=grid.device) * math.pi).flatten(1)
    return torch.cat([place, phase.sin(), phase.cos()], dim=1).to(grid.dtype)


AutoConfig.register(ConvVisionConfig.model_type, ConvVisionConfig)
AutoModel.register(ConvVisionConfig, ConvVision)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 768) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: any text survives a round trip; each digit is a token, so numbers are spelt."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"\d|, (?=\d)| ?\p{L}+| ?[^\s\p{L}\d]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in (PAD_TOKEN, END_TOKEN)],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_nano(
    texts: Iterable[str] = SAMPLE_TEXTS,
    *,
    seed: int = 0,
    layers: int = 4,
    width: int = 192,
    vocab_size: int = 768,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return an untrained model and its processor, with a tokenizer trained on `texts`."""
    tokenizer = train_tokenizer(texts, vocab_size)
    pictures = CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        resample=2,
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor = LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=IMAGE_SIZE // GRID,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.06,  # about 1 / sqrt(width); 0.02 is for wide models
        tie_word_embeddings=True,
        bos_token_id=None,
        **ids,
    )
    config = LlavaConfig(
        vision_config=ConvVisionConfig(),
        text_config=text,
        image_token_index=processor.image_token_id,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_seq_length=GRID * GRID,
        tie_word_embeddings=True,
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    return model, processor
