"""What each part of VPD is worth on the quickstart's task: four arms, equal seconds, one shared warm start.

    python benchmarks/quickstart_arms.py --seconds 300 --seeds 0 1 2

Arms: VPD; the same loop without E-steps; more supervised steps on the warm start's demonstrations; VPD with its
feedback permuted across tasks, a control that a teacher who reads its feedback must win against. Every arm starts from
the same saved weights, trains for the same seconds, and is measured on the final split. Runs take turns, one at a time:
arms that ran side by side would take each other's cores.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
from pathlib import Path

from vpd import VPDConfig
from vpd.evaluation.standalone import evaluate_standalone

# Student's t for a 95% interval of a mean, by the number of seeds.
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "quickstart.toml"


def arms(seconds: float, seed: int) -> dict[str, list[str]]:
    """Settings of each arm on top of the quickstart's."""
    loop = ["warm_start.demonstrations=0", "run.max_steps=100000", f"run.max_seconds={seconds}"]
    supervised = [
        "run.max_steps=0",
        "warm_start.epochs=100000",
        f"warm_start.max_seconds={seconds}",
        f"warm_start.seed={seed + 1}",
    ]
    return {
        "VPD": loop,
        "without E-steps": [*loop, 'algorithm={type="sdpo", divergence="js", teacher="live"}'],
        "more supervised steps": supervised,
        "VPD, permuted feedback": [*loop, "feedback.permute=true"],
    }


def train(folder: Path, overrides: list[str]) -> Path:
    """Train into ``folder``, unless that was done before; return the model's folder."""
    if not (folder / "result.json").exists():
        settings = [*overrides, "eval.final_tasks=0", f"run.output_dir={folder}"]
        command = ["vpd", "train", str(CONFIG)]
        subprocess.run([*command, *(part for setting in settings for part in ("--set", setting))], check=True)
    return folder / "model"


def accuracy(model: Path) -> float:
    """Greedy accuracy on the final split, in percent, measured once."""
    kept = model.parent / "final.json"
    if not kept.exists():
        evaluation = evaluate_standalone(VPDConfig.load(CONFIG, [f'model.name="{model}"']), "final", None)
        kept.write_text(json.dumps(evaluation.summary()))
    return 100 * json.loads(kept.read_text())["accuracy"]


def interval(values: list[float]) -> str:
    """Mean and 95% t interval over seeds, in points."""
    mean = statistics.fmean(values)
    if len(values) not in T_95:
        return f"{mean:+.1f}"
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="of training, evaluation left aside")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart_arms"))
    options = parser.parse_args()

    start = train(options.output / "warm-start", ["run.max_steps=0"]).resolve()
    warm = accuracy(start)
    rows: dict[str, list[float]] = {}
    for seed in options.seeds:
        for name, settings in arms(options.seconds, seed).items():
            folder = options.output / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            common = [f'model.name="{start}"', f"run.seed={seed}", "eval.preflight_tasks=0", "eval.margin_tasks=0"]
            rows.setdefault(name, []).append(accuracy(train(folder, [*settings, *common])))

    print(f"\nThe shared warm start answers {warm:.1f}% right.\n")
    print(
        "| | "
        + " | ".join(f"seed {seed}" for seed in options.seeds)
        + " | points above the warm start (95% interval) |"
    )
    print("|---|" + "---|" * (len(options.seeds) + 1))
    for name, values in rows.items():
        cells = " | ".join(f"{value:.1f}%" for value in values)
        print(f"| {name} | {cells} | {interval([value - warm for value in values])} |")


if __name__ == "__main__":
    main()
