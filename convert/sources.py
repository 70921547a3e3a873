"""Where models come from: the Hub, a local folder, timm, or the demo model that ships with the package."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..interp.errors import OrthoactError
from .files import read_json
from .names import CONFIG, DEMO, DEMO_NAME, WEIGHTS, is_adapter
from .record import SENTINEL, spec_of

log = logging.getLogger("orthoact")

TASKS = {
    "base": "AutoModel",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
}
"""What `--task` chooses; without it the class that the checkpoint was saved from."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

REPORT = "orthoact.json"
"""The file beside the weights that says how they were made: base, sites with their fits, what is left, versions."""

CARRIED = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "feature_extractor*.json"),
    *("chat_template*", "generation_config.json", "LICENSE*", "NOTICE*"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json"),
)
"""Files that are carried from the base to the converted folder as they are."""


@dataclass
class Source:
    """A model that was loaded by name."""

    model: nn.Module
    """The model, in evaluation mode."""
    name: str
    """How files may name it: a Hub id, `demo`, `timm:NAME`, or the last part of a local folder."""
    kind: str
    """`transformers` or `timm`."""
    folder: Path | None
    """The folder that holds its files, None where timm loaded it by name."""
    revision: str | None = None
    """Hub revision that was asked for."""

    @property
    def base(self) -> str:
        """The name of the model that this one was converted from; its own name where it was not."""
        report = self.folder / REPORT if self.folder else None
        recorded = read_json(report, strict=False).get("base") or {} if report and report.is_file() else {}
        name = recorded.get("model") or (spec_of(self.model) or {}).get("base", {}).get("model") or self.name
        return DEMO if DEMO_NAME.fullmatch(name) else name

    @property
    def planned(self) -> bool:
        """Whether its weights were left where they are: it is on the meta device."""
        return any(parameter.is_meta for parameter in self.model.parameters())

    @property
    def converted(self) -> bool:
        """Whether it holds learnable activations already."""
        return spec_of(self.model) is not None


def load_source(
    name: str,
    *,
    task: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
    config: Mapping[str, Any] | None = None,
    scratch: bool = False,
    most: int | None = None,
) -> Source:
    """Load the model called `name`: a Hub id, a local folder, `timm:NAME` or `demo`.

    `config` replaces values of its config (timm: arguments of create_model); with `scratch` it has that architecture
    and new random weights. With `most`, transformers' weights of more than so many bytes are neither downloaded nor
    loaded: the model is built on the meta device, which is enough to plan.

    Raises `OrthoactError` for a path that is missing, a folder that is no checkpoint, weights that cannot be read.
    """
    if task is not None and task not in TASKS:
        raise OrthoactError(f"--task {task!r}: expected one of {', '.join(TASKS)}")
    if dtype is not None and dtype not in DTYPES:
        raise OrthoactError(f"--dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if name.startswith("timm:"):
        source = _timm(name, name.removeprefix("timm:"), None, revision, config or {}, scratch)
    else:
        folder, local = _folder(name, revision)
        if is_adapter(folder):
            from .adapter import load_applied

            options = {"task": task, "dtype": dtype, "trust_remote_code": trust_remote_code, "device": device}
            return load_applied(folder.resolve().name if local else name, folder, local, **options)
        found = read_json(folder / "config.json", strict=False)
        if SENTINEL in found:
            found = read_json(folder / "config.json")
        recorded = DEMO if name == DEMO else folder.resolve().name if local else name
        if local and revision:
            raise OrthoactError(
                f"--revision {revision}: {name} is a local folder; revisions are those of Hub repositories"
            )
        if "architecture" in found and "model_type" not in found:
            where = f"local-dir:{folder}" if local else f"hf-hub:{name}{'@' + revision if revision else ''}"
            source = _timm(recorded, where, folder, revision, config or {}, scratch)
        elif "model_type" in found or found.get("auto_map"):
            planned = most is not None and _bytes(name, folder, local, revision) > most
            loads = {"task": task, "dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
            how = {"change": config or {}, "scratch": scratch, "planned": planned}
            source = _transformers(name, recorded, folder, local, found, **loads, **how)
        else:
            raise OrthoactError(
                f"{name}: its config.json has neither model_type (transformers) nor architecture (timm)"
            )
    if dtype is not None:
        source.model.to(DTYPES[dtype])
    if source.planned:
        source.model.eval()
        return source
    try:
        source.model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise OrthoactError(f"--device {device!r}: torch cannot use it ({str(error).splitlines()[0]})") from error
    return source


def load(folder: str | Path, **options) -> nn.Module:
    """The model in a folder (or behind a name), converted or not, of transformers or timm; in evaluation mode.

    `options` are those of `load_source`: task, dtype, revision, trust_remote_code, device.
    """
    return load_source(str(folder), **options).model


def weight_bytes(folder: Path | None) -> int:
    """The size of the weights in a folder."""
    kinds = ("*.safetensors", "*.bin", "*.gguf")
    return sum(path.stat().st_size for kind in kinds for path in folder.glob(kind)) if folder else 0


def _bytes(name: str, folder: Path, local: bool, revision: str | None) -> int:
    found = weight_bytes(folder)
    return found if found or local else hub_bytes(name, revision)


def hub_bytes(name: str, revision: str | None) -> int:
    """The size of the weights in a Hub repository; 0 where the Hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=20).siblings or []
    except Exception:  # no network, no such repository: loading will say so
        return 0
    return sum(file.size or 0 for file in files if file.rfilename.endswith((".safetensors", ".bin")))


def demo_folder() -> Path:
    """The folder of the demo model."""
    return Path(__file__).parent / DEMO


def _folder(name: str, revision: str | None) -> tuple[Path, bool]:
    """The folder with the files of a model, and whether it is the user's own."""
    if name == DEMO:
        return demo_folder(), True
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not is_adapter(path):
            held = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
            raise OrthoactError(f"{name}: expected a checkpoint folder with a config.json, it holds {held}")
        return path, True
    if path.exists():
        raise OrthoactError(f"{name}: expected a checkpoint folder, this is a file; give the folder that holds it")
    if not re.fullmatch(r"[\w][\w.-]*(/[\w.-]+)?", name):
        raise OrthoactError(f"{name}: there is no such folder, and it is no Hub id; check the path")
    return _download(name, revision, ["config.json", "README.md", CONFIG, WEIGHTS, *CARRIED]), False


def fetch(name: str, patterns: list[str]) -> Path:
    """The folder of a model, its files of these patterns downloaded where it is a Hub id."""
    folder, local = _folder(name, None)
    return folder if local else _download(name, None, [*patterns, "config.json", CONFIG])


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:
        if is_offline_mode() and isinstance(error, LocalEntryNotFoundError):
            raise OrthoactError(
                f"{name}: there is no such folder here, and HF_HUB_OFFLINE keeps it from being fetched; check the "
                f"name, or unset HF_HUB_OFFLINE"
            ) from error
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OrthoactError(
            f"{name}: there is no such folder here, and the Hub did not give it ({type(error).__name__}: {why}); "
            f"check the name, the network, HF_HUB_OFFLINE and your token"
        ) from error
    if not (folder / "config.json").is_file() and not is_adapter(folder):
        raise OrthoactError(f"{name}: the repository has no config.json; expected a transformers or timm checkpoint")
    return folder


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn whatever a library raises while loading into one sentence."""
    try:
        yield
    except OrthoactError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = lines[0][:300] if lines else "no message"
        raise OrthoactError(f"{name}: its weights could not be loaded ({type(error).__name__}: {why})") from error


def _timm(name: str, where: str, folder: Path | None, revision: str | None, change, scratch: bool) -> Source:
    import timm

    with _readable(name):
        model = timm.create_model(where, pretrained=not scratch, **change)
    return Source(model, name, "timm", folder, revision)


def _transformers(
    name, recorded, folder, local, config, *, task, dtype, revision, trust_remote_code, change, scratch, planned
) -> Source:
    import transformers

    where = str(folder) if local else name
    architecture = (config.get("architectures") or [None])[0]
    options: dict[str, Any] = {"revision": revision} if revision and not local else {}
    remote = bool(config.get("auto_map")) and trust_remote_code
    if task is not None:
        cls = getattr(transformers, TASKS[task])
    elif remote:
        heads = [auto for auto in config["auto_map"] if auto != "AutoConfig"]
        cls = getattr(transformers, heads[0]) if heads else transformers.AutoModel
    elif architecture is None:
        cls = transformers.AutoModel
    elif hasattr(transformers, architecture):
        cls = getattr(transformers, architecture)
    else:
        extra = "; --trust-remote-code runs its own code" if config.get("auto_map") else ""
        raise OrthoactError(
            f"{name}: transformers {transformers.__version__} has no class {architecture}{extra}; or choose a --task"
        )
    if remote:
        options["trust_remote_code"] = True
    if scratch or planned:
        with _readable(name), torch.device("meta" if planned else "cpu"):
            known = getattr(cls, "config_class", None) or transformers.AutoConfig
            read = known.from_pretrained(where, **options, **change)
            make = getattr(cls, "from_config", None) or cls._from_config  # pyright: ignore[reportAttributeAccessIssue]
            trusted = {"trust_remote_code": True} if remote else {}
            precision = torch.float32 if scratch else DTYPES[dtype] if dtype else read.dtype or torch.float32
            return Source(make(read, dtype=precision, **trusted), recorded, "transformers", folder, revision)
    options |= change
    with _readable(name):
        model, info = cls.from_pretrained(
            where, dtype=DTYPES[dtype] if dtype else "auto", output_loading_info=True, **options
        )
    absent = sorted(info["missing_keys"])
    if absent:
        log.warning(
            "%s: %d weights are not in the checkpoint and were initialised: %s ...", name, len(absent), absent[0]
        )
    return Source(model, recorded, "transformers", folder, revision)


def carried_files(source: Source) -> list[Path]:
    """The files of the source's folder that go along with a converted model."""
    if source.folder is None:
        return []
    found = {path for pattern in CARRIED for path in source.folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.suffix not in (".bin", ".pt", ".pth", ".pkl"))
