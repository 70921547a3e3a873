"""From texts and images to tensors: packed windows, padded sentences, pixels; and the order in which a run sees them.

A split is a sequence; `split[i]` is the example as it is measured. `split.trained(i, epoch, seed)` is the one that is
trained on, which may be shifted or cropped, by a generator of its own: what a run sees depends on its seed and on the
number of the example in the run, on nothing else, so that a resumed run sees the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..convert.data import input_name, rgb, takes_images, tokenizer_of, transform_of
from ..convert.sources import Source
from ..interp.errors import OrthoactError
from .sections import Data

Example = dict[str, Tensor]
IGNORED = -100
"""The label of a position that no loss counts."""


class Stream(Dataset):
    """The examples of a whole run in their order: epoch after epoch, each shuffled by the seed."""

    def __init__(self, split: Any, count: int, seed: int):
        self.split, self.count, self.seed = split, count, seed
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> Example:
        if not 0 <= position < self.count:
            raise IndexError(position)
        epoch, at = divmod(position, len(self.split))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(mixed(self.seed, epoch))
            self.epoch, self.order = epoch, torch.randperm(len(self.split), generator=generator)
        return self.split.trained(int(self.order[at]), mixed(self.seed, epoch), mixed(self.seed, epoch, at))


def mixed(*numbers: int) -> int:
    """One seed of several numbers."""
    return hash(numbers) % 2**62


def _tokenizer(source: Source) -> Any:
    try:
        tokenizer = tokenizer_of(source)
    except OrthoactError as error:
        raise OrthoactError(f"model: {source.name} has no tokenizer in its folder that can be read") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# -- causal language models --------------------------------------------------------------------------------------------


class Windows:
    """Packing: all documents in one stream of tokens, cut into windows; every token but the first is a label."""

    unit = "tokens"

    def __init__(self, source: Source, data: Data):
        self.tokenizer, self.data = _tokenizer(source), data
        most = getattr(source.model.config, "max_position_embeddings", None) or data.length
        if data.length > most:
            raise OrthoactError(f"data.length: {source.name} takes at most {most} tokens, got {data.length}")

    def split(self, name: str, texts: list[str]) -> WindowSplit:
        ids: list[int] = []
        for text in self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            ids += [self.tokenizer.eos_token_id, *text] if self.data.eos else text
        limit = getattr(self.data, f"{name}_limit")
        found = WindowSplit(torch.tensor(ids), self.data.length, limit)
        if len(found) == 0 or (name == "train" and len(ids) <= self.data.length):
            raise OrthoactError(
                f"data.length: a window of {self.data.length} tokens is longer than the {len(ids)} tokens of the "
                f"{name} text; give more text or a smaller length"
            )
        return found

    @staticmethod
    def collate(examples: list[Example]) -> Example:
        return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


class WindowSplit:
    """Windows of a stream of tokens; the last is filled up with positions that do not count."""

    def __init__(self, ids: Tensor, length: int, limit: int | None):
        self.ids, self.length = ids, length
        self.count = min(-(-max(len(ids) - 1, 0) // length), limit or 2**62)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < self.count:
            raise IndexError(i)
        return self.window(i * self.length)

    def window(self, start: int) -> Example:
        found = self.ids[start : start + self.length + 1]
        short = self.length + 1 - len(found)
        inputs = torch.nn.functional.pad(found[:-1], (0, short))
        return {"input_ids": inputs, "labels": torch.nn.functional.pad(found[1:], (0, short), value=IGNORED)}

    def trained(self, i: int, epoch: int, seed: int) -> Example:
        """A full window; every epoch cuts the stream at another place."""
        room = len(self.ids) - 1 - self.length
        shift = int(torch.randint(self.length, (1,), generator=torch.Generator().manual_seed(epoch)))
        return self.window(min(max(i * self.length - shift, 0), room))


# -- classification of text --------------------------------------------------------------------------------------------


class Sentences:
    """Texts, cut off at a length, padded to the longest of their batch."""

    unit = "texts"

    def __init__(self, source: Source, data: Data):
        self.tokenizer = _tokenizer(source)
        config: Any = source.model.config
        if getattr(config, "pad_token_id", None) is None:  # decoders find the last token of a text by it
            config.pad_token_id = self.tokenizer.pad_token_id
        most = getattr(config, "max_position_embeddings", None) or data.length
        self.length = min(data.length, most)

    def split(self, name: str, pairs: Any) -> EncodedSplit:
        texts, numbers = [pairs[i][0] for i in range(len(pairs))], pairs.numbers
        encoded = self.tokenizer(texts, truncation=True, max_length=self.length, verbose=False)
        return EncodedSplit(
            [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)], numbers
        )

    def collate(self, examples: list[dict[str, Any]]) -> Example:
        labels = torch.tensor([example["labels"] for example in examples])
        rows = [{k: v for k, v in example.items() if k != "labels"} for example in examples]
        return {**self.tokenizer.pad(rows, return_tensors="pt"), "labels": labels}


class EncodedSplit:
    """Tokens of texts with the numbers of their classes."""

    def __init__(self, rows: list[dict[str, list[int]]], numbers: list[int]):
        self.rows, self.numbers = rows, numbers

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**self.rows[i], "labels": self.numbers[i]}

    def trained(self, i: int, epoch: int, seed: int) -> dict[str, Any]:
        return self[i]


# -- classification of images ------------------------------------------------------------------------------------------


class Images:
    """Pixels as the model's own library prepares them."""

    unit = "images"

    def __init__(self, source: Source, data: Data):
        if not takes_images(source.model):
            raise OrthoactError(f"task: {source.name} takes no images")
        self.name = input_name(source)
        self.prepare, self.augment = pixels(source, data.size), data.augment

    def split(self, name: str, pairs: Any) -> ImageSplit:
        return ImageSplit(pairs, self.name, self.prepare, self.augment and name == "train")

    @staticmethod
    def collate(examples: list[Example]) -> Example:
        return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


class ImageSplit:
    """Images that are decoded and prepared when they are asked for."""

    def __init__(self, pairs: Any, name: str, prepare: Any, augment: bool):
        self.pairs, self.name, self.prepare, self.augment = pairs, name, prepare, augment

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> Example:
        return self.example(*self.pair(i))

    def pair(self, i: int) -> tuple[Any, int]:
        try:
            return self.pairs[i]
        except (OSError, ValueError, SyntaxError) as error:  # decoded now
            raise OrthoactError(f"data.image: an image cannot be read ({error}); repair it or take it out") from error

    def example(self, image: Any, number: int) -> Example:
        return {self.name: self.prepare(rgb(image)), "labels": torch.tensor(number)}

    def trained(self, i: int, epoch: int, seed: int) -> Example:
        """The image, randomly cropped to at least 60 % of its area and mirrored."""
        if not self.augment:
            return self[i]
        from torchvision.transforms import RandomResizedCrop
        from torchvision.transforms.functional import crop, hflip

        image, number = self.pair(i)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            image = crop(image, *RandomResizedCrop.get_params(image, [0.6, 1.0], [3 / 4, 4 / 3]))
            image = hflip(image) if torch.rand(1) < 0.5 else image
        return self.example(image, number)


def pixels(source: Source, size: int | None) -> Any:
    """From a PIL image to the model's input; with `size`, its mean and deviation alone are the library's."""
    try:
        prepare = transform_of(source)
    except OrthoactError as error:
        raise OrthoactError(f"model: {source.name} has no image processor in its folder that can be read") from error
    if size is None:
        return prepare
    from torchvision import transforms

    if source.kind == "timm":
        from timm.data.config import resolve_model_data_config

        config = resolve_model_data_config(source.model)
        mean, std = config["mean"], config["std"]
    else:
        from transformers import AutoImageProcessor

        processor: Any = AutoImageProcessor.from_pretrained(str(source.folder))
        mean, std = processor.image_mean, processor.image_std
    resize = transforms.Resize(size, transforms.InterpolationMode.BICUBIC, antialias=True)
    steps = [resize, transforms.CenterCrop(size), transforms.ToTensor(), transforms.Normalize(mean, std)]
    return transforms.Compose(steps)
