"""The house: which layer imports which, what an import loads, what the wheel holds."""

import ast
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import orthoact

ROOT = Path(__file__).parent.parent
LAYERS = ["interp", "convert", "finetune", "cli"]
"""Each may import those before it."""

HEAVY = {"interp": {"transformers", "timm", "peft", "datasets", "accelerate"}, "convert": {"accelerate"}}
"""What a layer never imports, not even inside a function."""


def sources(layer):
    return [ROOT / "cli.py"] if layer == "cli" else sorted((ROOT / layer).glob("*.py"))


def imports(path):
    """(level, module) of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_one_way(layer):
    later = set(LAYERS[LAYERS.index(layer) + 1 :])
    for path in sources(layer):
        for level, module in imports(path):
            first = module.split(".")[0]
            assert level or first not in {*LAYERS, "orthoact"}, (
                f"{path}: absolute import of {module} inside the package"
            )
            reaches_root = level == (1 if layer == "cli" else 2)
            assert not (reaches_root and first in later), f"{path}: {layer} must not import {module}"
            assert level or first not in HEAVY.get(layer, set()), f"{path}: {layer} must not import {module}"


def run(code, cwd, *flags):
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import orthoact", ["torch", "transformers", "timm", "numpy", "scipy"]),
        ("import orthoact.interp", ["transformers", "timm", "datasets", "peft"]),
        ("import orthoact.convert", ["torch", "transformers", "timm"]),
        ("from orthoact.cli import main; main(['--help'], standalone_mode=False)", ["torch", "transformers", "numpy"]),
    ],
)
def test_what_an_import_loads(statement, absent, tmp_path):
    code = f"import sys\n{statement}\nprint([m for m in {absent!r} if m in sys.modules])"
    assert run(code, tmp_path).splitlines()[-1] == "[]"


ORDER = """
import json
{imports}
import torch, tempfile
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r})
import timm
net = timm.create_model("local-dir:" + {other!r}, pretrained=True)
print(sum(type(m).__name__ == "Activation" for n in (model, net) for m in n.modules()))
"""


@pytest.mark.parametrize(
    "imports_",
    [
        "import orthoact\nimport transformers, timm",
        "import timm, timm.models\nfrom transformers import AutoModelForCausalLM, PreTrainedModel\nimport orthoact",
        "import transformers\nimport orthoact\nimport orthoact",
    ],
    ids=["orthoact-first", "orthoact-last", "lazy-transformers-first"],
)
def test_plain_loading_works_in_either_order(imports_, tmp_path):
    import tiny_models as tiny

    from orthoact.convert.checkpoint import save

    language, vision = tiny.hf("gpt2"), tiny.timm_model("vit")
    for model, name in ((language, "a"), (vision, "b")):
        orthoact.convert_(model, degree=4)
        save(model, tmp_path / name)
    code = ORDER.format(imports=imports_, folder=str(tmp_path / "a"), other=str(tmp_path / "b"))
    assert run(code, tmp_path, "-W", "ignore").splitlines()[-1] == "4"


def test_an_untested_version_is_told():
    from unittest import mock

    import transformers

    from orthoact.convert.transformers_hooks import check_version

    check_version()
    with (
        mock.patch.object(transformers, "__version__", "5.99.0"),
        pytest.warns(UserWarning, match=r"5\.99\.0 is installed"),
    ):
        check_version()
    with (
        mock.patch.object(transformers, "__version__", "4.57.1"),
        pytest.raises(orthoact.OrthoactError, match="needs 5"),
    ):
        check_version()


WHEEL = {
    "orthoact": {"__init__.py", "__main__.py", "_version.py", "cli.py", "py.typed"},
    "orthoact/interp": {p.name for p in (ROOT / "interp").glob("*.py")},
    "orthoact/convert": {p.name for p in (ROOT / "convert").glob("*.*")},
    "orthoact/finetune": {p.name for p in (ROOT / "finetune").glob("*.py")},
    "orthoact/recipes": {p.name for p in (ROOT / "recipes").glob("*.yaml")},
    "orthoact/convert/demo": {
        *("README.md", "config.json", "generation_config.json", "heldout.txt"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    },
}
"""The exact content of the wheel, its metadata apart."""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


def test_the_exact_content_of_the_wheel(built):
    (wheel,) = built.glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert names == {f"{folder}/{name}" for folder, held in WHEEL.items() for name in held}
    assert wheel.name.startswith(f"orthoact-{orthoact.__version__}-")


def test_the_source_archive_holds_the_tests(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {n.split("/", 1)[1] for n in tar.getnames() if "/" in n}
    assert {
        "tests/test_layout.py",
        "tests/convert/test_reload.py",
        "LICENSE",
        "Makefile",
        "benchmarks/fidelity.py",
    } <= names
    assert not any("__pycache__" in n or n.startswith(".venv") for n in names)


def test_the_wheel_works_on_its_own(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path / "site")!r})
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "") + repr(f)]
import orthoact
assert orthoact.__file__.startswith({str(tmp_path)!r}), orthoact.__file__
from orthoact.cli import main
main(["convert", "demo", "-o", "out", "--json"], standalone_mode=False)
"""
    report = json.loads(run(code, tmp_path).splitlines()[-1])
    assert report["parameters"] == 54 and (tmp_path / "out" / "config.json").is_file()


def test_public_names_have_docstrings():
    for name in orthoact.__all__:
        thing = getattr(orthoact, name)
        if not isinstance(thing, str | dict):
            assert thing.__doc__ and len(thing.__doc__) > 20, name


def test_no_path_of_a_machine_and_no_pickle_in_the_repository():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = listed.stdout.split()
    assert not [f for f in files if f.endswith((".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"))]
