"""Train the demo model in convert/demo: a small GPT-2 on six Jane Austen novels.

    python benchmarks/train_demo.py                train, measure, write convert/demo
    python benchmarks/train_demo.py --evaluate     measure the model in convert/demo again
    python benchmarks/train_demo.py --baselines    measure xz and the 5-gram models only

Needs torch, transformers and tokenizers, and a Debian-like system: the public-domain text comes
from Debian's package r-cran-janeaustenr (`apt-get download`; no root, no R). Without apt-get,
put the package's .deb file into --cache-dir yourself.

The last chapter of each novel is held out: neither the tokenizer nor the model nor any baseline
is trained on it, and nothing (size, dropout, learning rate, number of steps) was chosen on it.
"""

import argparse
import collections
import hashlib
import json
import lzma
import math
import os
import re
import struct
import subprocess
import tempfile
import time
import zlib
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

PACKAGE = "r-cran-janeaustenr"
DEMO = Path(__file__).resolve().parent.parent / "convert" / "demo"
END = "<|endoftext|>"
HEADING = re.compile(r"(CHAPTER|VOLUME) [0-9IVXL]+", re.IGNORECASE)
NOT_AUSTEN = re.compile(r"[\s*]+|\[(End volume|At this point in the first)[^\]]*\]", re.DOTALL)
BOOK_END = re.compile(r"(THE END|FINIS)$|\*Vide a letter", re.IGNORECASE)
SETTINGS = {"vocab": 1536, "context": 256, "width": 128, "layers": 6, "heads": 4, "init": 0.06}
SETTINGS |= {"steps": 5500, "batch": 8, "warmup": 200, "lr": 4e-3, "weight_decay": 0.1, "dropout": 0.05, "seed": 0}


# ---------------------------------------------------------------- text


def fetch_rdb(cache: Path) -> bytes:
    """Download and unpack the Debian package (once); return its R data file."""
    cache.mkdir(parents=True, exist_ok=True)
    if not list(cache.glob(f"{PACKAGE}_*.deb")):
        subprocess.run(["apt-get", "download", PACKAGE], cwd=cache, check=True)
    deb = sorted(cache.glob(f"{PACKAGE}_*.deb"))[-1]
    subprocess.run(["dpkg-deb", "-x", str(deb), str(cache / "unpacked")], check=True)
    return next((cache / "unpacked").rglob("data/Rdata.rdb")).read_bytes()


def read_character_vectors(rdb: bytes) -> list[list[str]]:
    """Decode an R lazy-load file: zlib chunks, each one XDR-serialised character vector."""
    vectors = []
    while rdb:
        (size,) = struct.unpack_from(">I", rdb)
        inflate = zlib.decompressobj()
        data = inflate.decompress(rdb[4:])
        rdb = inflate.unused_data
        if len(data) != size or data[:2] != b"X\n":
            raise ValueError("not a chunk of XDR-serialised R data")
        (encoding_size,) = struct.unpack_from(">i", data, 14)
        at = 18 + encoding_size
        kind, count = struct.unpack_from(">ii", data, at)
        if kind != 16:
            raise ValueError("not an R character vector")
        at, lines = at + 8, []
        for _ in range(count):
            _, length = struct.unpack_from(">ii", data, at)
            lines.append(data[at + 8 : at + 8 + length].decode("utf-8"))
            at += 8 + length
        vectors.append(lines)
    return vectors


def join_lines(paragraph: str) -> str:
    """Undo the hard wrapping, keep the lines of verse (indented), drop _emphasis_ marks."""
    lines = [line.strip() for line in paragraph.split("\n")]
    is_verse = all(line.startswith("  ") for line in paragraph.split("\n"))
    text = "\n".join(lines) if is_verse else re.sub("--\n", "--", "\n".join(lines)).replace("\n", " ")
    return re.sub(" +", " ", text.replace("_", "").replace("love is declared,*", "love is declared,"))


def chapters_of(lines: list[str]) -> list[str]:
    """The chapters of one novel: paragraphs apart by a blank line, no headings, no editor's notes."""
    chapters: list[list[str]] = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
        paragraph = paragraph.strip("\n").rstrip()
        if BOOK_END.match(paragraph.strip()):
            break
        if HEADING.fullmatch(paragraph.strip()):
            if paragraph.strip().upper().startswith("CHAPTER"):
                chapters.append([])
        elif chapters and not NOT_AUSTEN.fullmatch(paragraph.strip()):
            chapters[-1].append(join_lines(paragraph))
    return ["\n\n".join(chapter) for chapter in chapters]


def load_text(cache: Path) -> tuple[list[str], str, str]:
    """The training chapters, the held-out text, and the piece of it that is shipped (from Emma)."""
    novels = [chapters_of(lines) for lines in read_character_vectors(fetch_rdb(cache))]
    if [len(novel) for novel in novels] != [55, 48, 31, 24, 61, 50]:
        raise ValueError("unexpected numbers of chapters")
    train = [chapter for novel in novels for chapter in novel[:-1]]
    held_out = "\n\n".join(novel[-1] for novel in novels) + "\n"
    shipped = novels[0][-1] + "\n"
    return train, held_out, shipped


# ---------------------------------------------------------------- model


def train_tokenizer(chapters: list[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer(add_prefix_space=False)
    bpe.train_from_iterator(chapters, vocab_size, min_frequency=2, special_tokens=[END])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=END,
        eos_token=END,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def encode_chapters(tokenizer, chapters: list[str]) -> list[int]:
    """One stream of tokens, each chapter preceded by the end-of-text token."""
    ids = tokenizer(chapters, add_special_tokens=False, verbose=False)["input_ids"]
    return [i for chapter in ids for i in [tokenizer.eos_token_id, *chapter]]


def batches(stream: torch.Tensor, context: int, size: int, generator: torch.Generator):
    """Endless shuffled batches of windows; every epoch cuts the stream at another phase."""
    while True:
        phase = int(torch.randint(context, (1,), generator=generator))
        count = (len(stream) - phase - 1) // context
        for chosen in torch.randperm(count, generator=generator).split(size):
            if len(chosen) == size:
                starts = phase + chosen * context
                windows = stream[starts[:, None] + torch.arange(context + 1)]
                yield windows[:, :-1], windows[:, 1:]


def train_model(stream: list[int], tokenizer, args) -> tuple[GPT2LMHeadModel, dict]:
    torch.manual_seed(args.seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=args.context,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.heads,
        activation_function="gelu_pytorch_tanh",  # the same function as gelu_new, but faster
        embd_pdrop=args.dropout,
        resid_pdrop=args.dropout,
        attn_pdrop=0.0,
        initializer_range=args.init,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    model = GPT2LMHeadModel(config).train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)

    def rate(step: int) -> float:
        """Linear warm-up, then a cosine down to 2 % of the peak."""
        done = (step - args.warmup) / max(1, args.steps - args.warmup)
        return (step + 1) / args.warmup if done < 0 else 0.51 + 0.49 * math.cos(math.pi * done)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(args.seed)
    windows = batches(torch.tensor(stream), args.context, args.batch, generator)
    start, running = time.time(), collections.deque(maxlen=200)
    for step, (x, y) in zip(range(1, args.steps + 1), windows, strict=False):
        logits = model(x, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        running.append(loss.item())
        if step % 50 == 0 or step == args.steps:
            seen, seconds = step * args.batch * args.context, time.time() - start
            print(
                f"step {step}/{args.steps} loss {sum(running) / len(running):.4f} "
                f"epoch {seen / len(stream):.2f} {seen / seconds:.0f} tokens/s",
                flush=True,
            )
    facts = {
        "seconds": time.time() - start,
        "tokens": len(stream),
        "epochs": args.steps * args.batch * args.context / len(stream),
    }
    return model.eval(), facts


@torch.no_grad()
def measure_model(model, tokenizer, text: str) -> dict:
    """Bits of every token of the text (the first one given the end-of-text token).

    Windows of n_positions tokens slide by half their length; a window counts only the tokens
    that no window before it has counted, so that all but the first have at least half a window
    of context.
    """
    ids = torch.tensor(encode_chapters(tokenizer, [text]))
    length = model.config.n_positions
    bits, counted = 0.0, 0  # counted: how many targets ids[1:] have been counted
    for start in range(0, len(ids) - 1, length // 2):
        window = ids[start : start + length + 1]
        logits = model(window[None, :-1]).logits[0].double()
        nll = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
        bits += float(nll[counted - start :].sum()) / math.log(2)
        counted = start + len(window) - 1
        if counted == len(ids) - 1:
            break
    size = len(text.encode())
    return {"bytes": size, "tokens": counted, "perplexity": 2 ** (bits / counted), "bpb": bits / size}


# ---------------------------------------------------------------- baselines


def xz_bits_per_byte(train: bytes, test: bytes) -> dict:
    def size(data: bytes) -> int:
        return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))

    return {"alone": 8 * size(test) / len(test), "after_train": 8 * (size(train + test) - size(train)) / len(test)}


def kneser_ney_bits(train, test, start, vocab_size: int, order: int = 5) -> float:
    """Bits of `test` under interpolated modified Kneser-Ney (Chen & Goodman 1998).

    `train`, `test` and `start` (the context of the first symbols) are bytes or tuples of ids.
    """
    counts = {order: collections.Counter(train[i : i + order] for i in range(len(train) - order + 1))}
    for n in range(order - 1, 0, -1):  # lower orders count the different symbols to the left
        counts[n] = collections.Counter(gram[1:] for gram in counts[n + 1])
    discounts, totals, reserved = {}, {}, {}
    for n in counts:
        of = collections.Counter(counts[n].values())
        y = of[1] / max(1, of[1] + 2 * of[2])
        steps = [k - (k + 1) * y * of[k + 1] / of[k] if of[k] and of[k + 1] else 0.5 for k in (1, 2, 3)]
        discounts[n] = [0.0] + [min(max(d, 0.05), k) for k, d in enumerate(steps, start=1)]
        totals[n], reserved[n] = collections.Counter(), collections.Counter()
        for gram, count in counts[n].items():
            totals[n][gram[:-1]] += count
            reserved[n][gram[:-1]] += discounts[n][min(count, 3)]

    def probability(gram) -> float:
        p = 1.0 / vocab_size
        for n in range(1, order + 1):
            part = gram[order - n :]
            total = totals[n].get(part[:-1], 0)
            if total:
                count = counts[n].get(part, 0)
                p = (count - discounts[n][min(count, 3)] + reserved[n][part[:-1]] * p) / total
        return p

    stream = (start * order)[: order - 1] + test
    return -sum(math.log2(probability(stream[i : i + order])) for i in range(len(test)))


def measure_baselines(train: list[str], tokenizer, texts: dict[str, str]) -> dict:
    """Bits per byte of xz and of two 5-gram models on each text."""
    all_bytes = "\n\n".join(train).encode()
    all_tokens = tuple(encode_chapters(tokenizer, train))
    end = (tokenizer.eos_token_id,)
    result = {}
    for name, text in texts.items():
        raw = text.encode()
        ids = tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        result[name] = {
            "xz": xz_bits_per_byte(all_bytes, raw),
            "byte_5gram": kneser_ney_bits(all_bytes, raw, b"\n", 256) / len(raw),
            "token_5gram": kneser_ney_bits(all_tokens, ids, end, len(tokenizer)) / len(raw),
        }
    return result


# ---------------------------------------------------------------- results

CARD = """\
---
license: apache-2.0
language:
- en
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
- demo
- jane-austen
- trained-from-scratch
---

# A small GPT-2 on Jane Austen

A demonstration model of the project orthoact, small enough for its repository: a GPT-2 with
{parameters:,} parameters ({layers} layers of width {width}, {heads} heads, context of {context} tokens, `gelu_new`,
tied embeddings, float32) and a byte-level BPE tokenizer with {vocab} entries of its own. It was
trained from scratch, on the text below only. It writes sentences in Jane Austen's manner that make
no sense for long; it is a test object for tools that take a GPT-2, and good for nothing else.

```python
from transformers import AutoTokenizer, GPT2LMHeadModel

tokenizer = AutoTokenizer.from_pretrained("convert/demo")
model = GPT2LMHeadModel.from_pretrained("convert/demo")
prompt = tokenizer("Emma had never", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=60, do_sample=True)[0]))
```

## Text

*Emma*, *Mansfield Park*, *Northanger Abbey*, *Persuasion*, *Pride and Prejudice* and *Sense and
Sensibility*, all in the public domain, as found in Debian's package `r-cran-janeaustenr`. Lines
are joined to paragraphs, which a blank line separates; titles, headings, `_emphasis_` marks and
editors' notes are left out. A chapter is a document, preceded by `<|endoftext|>`.

The last chapter of each novel ({held_bytes:,} bytes, {held_share:.1f} % of the text) is held out: neither the
tokenizer nor the model was trained on it, and nothing was chosen on it. `heldout.txt` here is its
first {ship_bytes:,} bytes, the last chapter of *Emma*. SHA-256 of the whole held-out text: `{sha}`.

## Training

    {command}

{steps} steps of {batch} windows of {context} tokens ({epochs:.1f} epochs of {tokens:,} tokens), AdamW (peak learning
rate {lr}, {warmup} steps of warm-up, then cosine; weight decay {weight_decay}; gradients clipped at 1),
dropout {dropout} (none on attention weights), initial weights of standard deviation {init}, seed {seed},
no early stopping; {minutes:.0f} minutes on {threads} CPU cores.

## Measured

Every token of the text is counted, the first one given `<|endoftext|>`. Windows of {context} tokens
slide by {stride}, and each counts the tokens not counted before, so that all but the first
{context} have at least {stride} tokens of context. Bits per byte: the sum over all tokens, divided by the
number of UTF-8 bytes. `python benchmarks/train_demo.py --evaluate` measures it again.

| This model | bytes | tokens | perplexity per token | bits per byte |
|---|---|---|---|---|
{model_rows}

Bits per byte of others on the same texts. xz: level 9 (extreme), as the growth of the compressed
training text when the held-out text is appended, and of the held-out text alone. 5-grams:
interpolated modified Kneser-Ney, on the same training text and, for tokens, the same tokenizer.

| | entire held-out text | `heldout.txt` |
|---|---|---|
{baseline_rows}
"""
NAMES = {"held_out": "entire held-out text", "shipped": "`heldout.txt`"}


def model_rows(measured: dict) -> str:
    return "\n".join(
        f"| {NAMES[name]} | {m['bytes']:,} | {m['tokens']:,} | {m['perplexity']:.2f} | {m['bpb']:.4f} |"
        for name, m in measured.items()
    )


def baseline_rows(measured: dict, base: dict) -> str:
    rows = {
        "**this model**": lambda name: measured[name]["bpb"],
        "5-gram over tokens": lambda name: base[name]["token_5gram"],
        "5-gram over bytes": lambda name: base[name]["byte_5gram"],
        "xz, after the training text": lambda name: base[name]["xz"]["after_train"],
        "xz, alone": lambda name: base[name]["xz"]["alone"],
    }
    return "\n".join(
        f"| {label} | " + " | ".join(f"{value(name):.4f}" for name in NAMES) + " |" for label, value in rows.items()
    )


def write_demo(folder: Path, model, tokenizer, shipped: str, card: str) -> None:
    """Write the whole folder beside its place, then move the files over, one rename each."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        new = Path(name)
        model.generation_config.pad_token_id = tokenizer.eos_token_id
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        for file, changes in (
            ("config.json", {"activation_function": "gelu_new"}),
            ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ):
            content = json.loads((new / file).read_text(encoding="utf-8")) | changes
            content.pop("_name_or_path", None)
            (new / file).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (new / "heldout.txt").write_text(shipped, encoding="utf-8")
        (new / "README.md").write_text(card, encoding="utf-8")
        for file in new.iterdir():
            file.chmod(0o644)
            os.replace(file, folder / file.name)


def parse_arguments() -> tuple[argparse.Namespace, str]:
    """The options, and the command that repeats this training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    hyper = parser.add_argument_group("training")
    for option, default in SETTINGS.items():
        hyper.add_argument(f"--{option.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, default=DEMO, help="default: convert/demo")
    parser.add_argument("--cache-dir", type=Path, default=Path(tempfile.gettempdir()) / "janeaustenr")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--evaluate", action="store_true", help="measure the model in --folder")
    mode.add_argument("--baselines", action="store_true", help="measure xz and the 5-grams only")
    args = parser.parse_args()
    given = [
        f" --{name.replace('_', '-')} {getattr(args, name)}"
        for name, default in SETTINGS.items()
        if getattr(args, name) != default
    ]
    return args, "python benchmarks/train_demo.py" + "".join(given)


def main() -> None:
    args, command = parse_arguments()
    torch.set_num_threads(args.threads)
    train, held_out, shipped = load_text(args.cache_dir)
    texts = {"held_out": held_out, "shipped": shipped}
    if args.evaluate or args.baselines:
        tokenizer = AutoTokenizer.from_pretrained(args.folder)
    if args.baselines:
        print(json.dumps(measure_baselines(train, tokenizer, texts), indent=2))
        return
    if args.evaluate:
        model = GPT2LMHeadModel.from_pretrained(args.folder).eval()
        rows = model_rows({name: measure_model(model, tokenizer, text) for name, text in texts.items()})
        print(rows)
        print("heldout.txt is as trained:", (args.folder / "heldout.txt").read_text(encoding="utf-8") == shipped)
        print("README.md has these rows:", rows in (args.folder / "README.md").read_text(encoding="utf-8"))
        return

    tokenizer = train_tokenizer(train, args.vocab, args.context)
    model, facts = train_model(encode_chapters(tokenizer, train), tokenizer, args)
    measured = {name: measure_model(model, tokenizer, text) for name, text in texts.items()}
    base = measure_baselines(train, tokenizer, texts)
    size = len(held_out.encode())
    card = CARD.format(
        **vars(args) | facts,
        parameters=model.num_parameters(),
        command=command,
        minutes=facts["seconds"] / 60,
        stride=args.context // 2,
        held_bytes=size,
        held_share=100 * size / (size + len("\n\n".join(train).encode())),
        ship_bytes=len(shipped.encode()),
        sha=hashlib.sha256(held_out.encode()).hexdigest(),
        model_rows=model_rows(measured),
        baseline_rows=baseline_rows(measured, base),
    )
    write_demo(args.folder, model, tokenizer, shipped, card)
    print(model_rows(measured), baseline_rows(measured, base), sep="\n")


if __name__ == "__main__":
    main()
