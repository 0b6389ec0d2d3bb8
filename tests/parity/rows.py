"What a comparison says."
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Row:
    "One quantity of one case."
    case: str
    quantity: str
    error: float  # the largest absolute difference; for whole numbers how many differ
    tolerance: str
    ok: bool

    def __str__(self):
        return f"{self.case:22} {self.quantity:64} {self.error:9.2e}  {self.tolerance:26} {'ok' if self.ok else 'FAILED'}"


def failure(case: Path, reason: object) -> Row: return Row(case.name, str(reason), float("nan"), "", False)


@dataclass(frozen=True)
class Case:
    "A folder with a case, and rows about it."
    folder: Path

    def tensors(self, name: str, dtype=None) -> dict[str, Tensor]:
        "All tensors of NAME.safetensors; those with fractions as `dtype`."
        return {key: t.to(dtype) if dtype and t.is_floating_point() else t for key, t in load_file(self.folder / f"{name}.safetensors").items()}

    @property
    def config(self) -> dict: return json.loads((self.folder / "config.json").read_text(encoding="utf-8"))

    def close(self, quantity: str, got: Tensor, wanted: Tensor, atol: float, rtol: float = 0.0) -> Row:
        "|got - wanted| <= atol + rtol·|wanted| everywhere; NaN is never close."
        tolerance = f"atol {atol:g}" + (f" rtol {rtol:g}" if rtol else "")
        if got.shape != wanted.shape: return Row(self.folder.name, f"{quantity}: {[*got.shape]} not {[*wanted.shape]}", float("nan"), tolerance, False)
        error = (got.double() - wanted.double()).abs()
        return Row(self.folder.name, quantity, error.max().item() if error.numel() else 0.0, tolerance,
                   bool((error <= atol + rtol * wanted.double().abs()).all()))

    def same(self, quantity: str, got: Tensor, wanted: Tensor) -> Row:
        "Equal, every one."
        if got.shape != wanted.shape: return Row(self.folder.name, f"{quantity}: {[*got.shape]} not {[*wanted.shape]}", float("nan"), "exact", False)
        wrong = (got.cpu() != wanted.to(got.dtype)).sum().item()
        return Row(self.folder.name, quantity, float(wrong), "exact", wrong == 0)


def rows_of(family, folder: Path) -> Iterator[Row]:
    "The rows of a case; one that breaks ends with a failure."
    torch.manual_seed(0)
    try: yield from family.check(Case(folder))
    except Exception as error: yield failure(folder, f"{type(error).__name__}: {error}"[:200])
