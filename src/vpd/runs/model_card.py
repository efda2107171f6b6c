"""Writes the README.md beside a trained model, which tells how the model was made and how good it is."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.constants import REPOCARD_NAME
from torch import nn

from vpd.config import VPDConfig
from vpd.policy.gguf import SMOLLM2
from vpd.runs.files import atomic_write_text

_LICENSE_FIELDS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class BaseModel:
    """The model that training began with.

    Attributes:
        name: The name that the run gives it, a hub id or a path; None for a network that was made in Python.
        hub_id: The name on the Hugging Face hub of the model, or of the hub's model that it was trained from; None
            where neither is known.
        license: The fields of a model card that state its licence; empty where it is not known.
    """

    name: str | None
    hub_id: str | None = None
    license: Mapping[str, str] = field(default_factory=dict)


_SHORT_NAMES = {
    SMOLLM2: BaseModel(SMOLLM2, "HuggingFaceTB/SmolLM2-135M-Instruct", {"license": "apache-2.0"}),
}


def base_model_of(model: nn.Module) -> BaseModel:
    """Tell from which model ``model`` was loaded, as far as its name, its config and its card say.

    The hub is not asked: see :func:`vpd.runs.hub.with_license`.
    """
    name = str(getattr(model, "name_or_path", None) or "")
    if not name:
        return BaseModel(None)
    if name.lower() in _SHORT_NAMES:
        return _SHORT_NAMES[name.lower()]
    licensed = getattr(getattr(model, "config", None), "license", None)
    known = {"license": str(licensed)} if licensed else {}
    folder = Path(name).expanduser()
    if not folder.exists():
        return BaseModel(name, name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None, known)
    if not (folder / REPOCARD_NAME).is_file():
        return BaseModel(name, None, known)
    card = ModelCard.load(folder / REPOCARD_NAME, ignore_metadata_errors=True).data
    hub_id = card.get("base_model")
    return BaseModel(name, hub_id if isinstance(hub_id, str) else None, known | license_fields(card))


def license_fields(card: Any) -> dict[str, str]:
    """Select the fields of a card's data that state the licence, without a link to a file beside the card."""
    found = {name: card.get(name) for name in _LICENSE_FIELDS}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, str) and (name != "license_link" or value.startswith("http"))
    }


def write_model_card(
    folder: Path, args: VPDConfig, base: BaseModel, rows: Sequence[Mapping[str, Any]], steps: int
) -> None:
    """Write the card of the model in ``folder``.

    Args:
        folder: The folder of a model, or of an adapter, which is recognised by its files.
        args: The settings of the run.
        base: The model that training began with.
        rows: The rows of the final table.
        steps: How many rollout batches were done.
    """
    is_adapter = (folder / "adapter_config.json").is_file()
    data = ModelCardData(
        base_model=base.hub_id,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["vpd", "variational-policy-distillation", "reinforcement-learning", args.algorithm.type],
        license=base.license.get("license"),
        license_name=base.license.get("license_name"),
        license_link=base.license.get("license_link"),
    )
    name = f"[{base.name}](https://huggingface.co/{base.hub_id})" if base.hub_id == base.name else f"`{base.name}`"
    origin = "a network that was made in Python" if base.name is None else name
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {Path(base.name or 'A language model').name}, trained with {args.algorithm.title}",
        f"This {'is an adapter of' if is_adapter else 'model began as'} {origin}. It was trained by vpd-rl "
        f"{version('vpd-rl')}, a trainer for [Variational Policy Distillation](https://arxiv.org/abs/2605.15113), with "
        f"the algorithm `{args.algorithm.type}` in a run of {steps} rollout batches.",
        *_results(args, rows),
        "## Settings",
        "These are the settings that differ from the defaults; `vpd.VPDConfig.parse` reads them.",
        f"```json\n{json.dumps(shared_settings(args), indent=2)}\n```",
    ]
    atomic_write_text(folder / REPOCARD_NAME, "\n\n".join(parts) + "\n")


def _results(args: VPDConfig, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    how = "one completion" if args.eval.k == 1 else f"the mean of {args.eval.k} completions"
    temperature = f"temperature {args.eval.temperature:g}" if args.eval.temperature else "greedy"
    lines = [
        f"| {row['name']} | {row['accuracy']:.1%} | {row['low']:.1%} to {row['high']:.1%} | {row['n']} |"
        for row in rows
    ]
    return [
        "## Results",
        f"Accuracy on questions that were not trained on ({how} a question, {temperature}):",
        "\n".join(["| | accuracy | 95% interval | questions |", "|---|---|---|---|", *lines]),
    ]


def shared_settings(args: VPDConfig) -> dict[str, Any]:
    """Return the settings that differ from the defaults, without the folders of the machine that they name."""
    values = args.model_dump(mode="json", exclude_defaults=True)
    # These two say which settings a section has, so that they are written even where they are the defaults.
    values["algorithm"] = {"type": args.algorithm.type, **values.get("algorithm", {})}
    if args.data is not None:
        values["data"] = {"environment": args.data.environment, **values["data"]}
    values.get("run", {}).pop("output_dir", None)
    return _without_folders(values)


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value
