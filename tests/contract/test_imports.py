"""What importing costs, in a fresh interpreter each; a wheel beside numpy alone is enough to train with."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import embstore
from embstore.training import DensitySampler, load_weights

ROOT = Path(embstore.__file__).parent.parent
HEAVY = {
    "torch",
    "transformers",
    "zarr",
    "numcodecs",
    "google_crc32c",
    "hnswlib",
    "typer",
    "rich",
    "sklearn",
    "scipy",
    "pandas",
    "polars",
    "pyarrow",
    "datasets",
}


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in ``sys.modules`` after one statement in a fresh interpreter."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


def test_training_imports_numpy_only() -> None:
    loaded = loaded_by(
        "from embstore.training import *; weights = [0.5, 0.25, 0.25]; "
        "list(GroupRepeat(DensitySampler(weights, rank='auto'), 2)); resample_indices(weights, 5, method='iid'); "
        "importance_weights(weights); prompt_keys(['a', [{'role': 'user', 'content': 'b'}]])"
    )
    assert "numpy" in loaded
    assert not loaded & HEAVY


def test_the_package_alone_imports_not_even_numpy() -> None:
    assert not loaded_by("import embstore") & (HEAVY | {"numpy"})


def test_inspecting_loads_neither_model_nor_search() -> None:
    loaded = loaded_by("import embstore.views.info, embstore.views.export, embstore.views.report.write")
    assert "embstore" in loaded
    assert not loaded & {"torch", "transformers", "hnswlib", "typer", "rich", "plotly", "matplotlib", "umap"}


@pytest.mark.parametrize("name", sorted(set(embstore.__all__) - {"__version__"}))
def test_every_public_name_resolves_and_is_documented(name: str) -> None:
    assert name in dir(embstore)
    public = getattr(embstore, name)
    assert public.__module__.startswith("embstore.")
    assert len(inspect.getdoc(public) or "") > 20
    if inspect.isfunction(public):
        assert all(
            parameter.annotation is not parameter.empty for parameter in inspect.signature(public).parameters.values()
        )


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'biuld'"):
        embstore.biuld  # noqa: B018


def test_a_wheel_beside_numpy_alone_maps_weights_and_draws(finished_store: Path, tmp_path: Path) -> None:
    """As on a training node: ``pip install --no-deps``, nothing else importable than the standard library and numpy."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    wheels, installed, site = tmp_path / "wheels", tmp_path / "installed", tmp_path / "site"
    built = subprocess.run(
        [*pip, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--no-index", "-w", str(wheels)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = wheels.glob("embstore-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(installed), str(wheel)], check=True)
    site.mkdir()
    packages = Path(np.__file__).parent.parent
    for name in ("numpy", "numpy.libs"):
        if (packages / name).exists():
            (site / name).symlink_to(packages / name)
    code = """
import json, sys
sys.path += sys.argv[1:3]
import embstore
from embstore.training import DensitySampler, load_weights
weights = load_weights(sys.argv[3])
sampler = DensitySampler(weights, num_samples=30, seed=4, positional=True)
found = {}
for name in ("torch", "zarr", "hnswlib"):
    try:
        __import__(name)
    except ImportError:
        found[name] = False
print(json.dumps({"file": embstore.__file__, "found": found, "sum": float(weights.array.sum()), "drawn": list(sampler)}))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(installed), str(site), str(finished_store)],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    result = json.loads(done.stdout)
    assert Path(result["file"]).is_relative_to(installed)
    assert {path.suffix for path in (installed / "embstore" / "views" / "report").iterdir()} >= {".py", ".js", ".css"}
    assert result["found"] == {"torch": False, "zarr": False, "hnswlib": False}
    assert result["sum"] == pytest.approx(1, abs=1e-5)
    weights = load_weights(finished_store)
    assert result["drawn"] == DensitySampler(weights, num_samples=30, seed=4, positional=True).plan(0).tolist()
