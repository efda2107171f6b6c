"""The command line: ``vpd train | eval | compare | plan | report | settings | init | doctor``."""

from __future__ import annotations

import json
import logging
import os
import sys
import textwrap
import tomllib
import warnings
from dataclasses import fields
from datetime import datetime
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from vpd.config import ConfigError, VPDConfig
from vpd.config.describe import described, environments
from vpd.config.overrides import apply_override
from vpd.config.starter import needed_settings, starter_config
from vpd.runs.files import RunError, atomic_write_text

app = typer.Typer(
    name="vpd",
    help="Train language models from textual feedback: Variational Policy Distillation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Replace a setting: section.key=value, or section={...}. It may be repeated."),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vpd {version('vpd-rl')}")
        raise typer.Exit()


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A TOML file of settings.")],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Sample one group and show both prompts and the verdicts; train nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
) -> None:
    """Train as the config says, and write everything about the run to its run.output_dir."""
    settings = VPDConfig.load(config, overrides)
    from transformers.utils.logging import disable_progress_bar

    from vpd.trainer import VPDTrainer

    disable_progress_bar()
    trainer = VPDTrainer(args=settings)
    if dry_run:
        from vpd.dry_run import show_one_group

        show_one_group(trainer, Console())
        return
    output = trainer.train(resume_from_checkpoint=resume)
    if not trainer.accelerator.is_main_process:
        return
    console = Console()
    if output.metrics["rows"]:
        console.print(_result_table(output.metrics["rows"]))
    console.print(f"Everything about this run is in {settings.run.output_dir}: open report.html there first.")
    if output.metrics["interrupted"] is not None:
        console.print(f"Interrupted after step {output.global_step}; a checkpoint is saved, go on with --resume.")
        raise typer.Exit(128 + output.metrics["interrupted"])


@app.command(name="eval")
def evaluate_model(
    model: Annotated[str, typer.Argument(help="A hub id, a folder such as RUN/model, a GGUF file, or a short name.")],
    env: Annotated[
        str,
        typer.Option(
            "--env",
            help="A config file with a data section, or an environment's name together with --set data.key=value.",
        ),
    ],
    k: Annotated[
        int,
        typer.Option(
            "--k", min=1, help="Completions per question: 1 is greedy; more are sampled at temperature 0.6, top-p 0.95."
        ),
    ] = 1,
    split: Annotated[str, typer.Option(help="The split of questions: selection or final.")] = "final",
    tasks: Annotated[int | None, typer.Option(min=1, help="The number of questions, by default all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of the table.")] = False,
    save: Annotated[
        Path | None,
        typer.Option(help="The file that gets the numbers and each question's outcome, by default in evaluations/."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Measure a model's accuracy on an environment, show it and save it."""
    if split not in ("selection", "final"):
        raise ConfigError(f"--split is selection or final, got {split!r}.")
    # Several greedy completions would be the same one k times.
    sampling = ["eval.temperature=0.6", "eval.top_p=0.95"] if k > 1 else ["eval.temperature=0.0"]
    changes = [*sampling, *(overrides or []), f"eval.k={k}", f'model.name="{model}"']
    if env.endswith(".toml") or "/" in env:
        settings = VPDConfig.load(env, changes)
    else:
        settings = VPDConfig.from_overrides([f"data.environment={env}", *changes])
    from transformers.utils.logging import disable_progress_bar

    from vpd.evaluation import evaluate_standalone

    disable_progress_bar()
    evaluation = evaluate_standalone(settings, split, tasks)
    found = {"model": model, "env": env, "split": split, "k": k, **evaluation.summary()}
    path = save or Path("evaluations") / f"{Path(model).name}-{split}-{datetime.now():%Y%m%d-%H%M%S-%f}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, _json_text({**found, "outcomes": evaluation.outcomes, "settings": settings}) + "\n")
    if as_json:
        typer.echo(_json_text({**found, "saved": str(path)}))
        return
    console = Console()
    console.print(_result_table([{"name": model, **evaluation.summary()}]))
    console.print(f"Saved in {path}.", soft_wrap=True, highlight=False)


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(help="The folder of a run, of one of its checkpoints, or of an adapter.")],
    output: Annotated[Path | None, typer.Argument(help="The folder to write, by default RUN/merged.")] = None,
) -> None:
    """Write a run's adapter and its base as one model, which needs neither PEFT nor the base."""
    from vpd.policy.load import load_policy
    from vpd.policy.verified import save_verified

    source, target = run / "model" if (run / "model").is_dir() else run, output or run / "merged"
    if target.resolve() == source.resolve():
        raise ConfigError(f"{target} holds the adapter itself: choose another folder to write.")
    loaded = load_policy(str(source), chats=False)
    try:
        save_verified(loaded.model, loaded.tokenizer, target)
    except OSError as error:
        raise RunError(str(error)) from error
    Console().print(f"The merged model is in {target}.", markup=False, soft_wrap=True)


@app.command()
def compare(
    study: Annotated[Path, typer.Argument(help="A TOML file that names one config, several arms and several seeds.")],
    workers: Annotated[int, typer.Option(min=1, help="The number of runs at the same time.")] = 1,
) -> None:
    """Run several settings by several seeds from one start, and set them side by side.

    When it is started again, it keeps the finished runs and goes on with the others.
    """
    from vpd.studies.comparison import report_folder, write_comparison
    from vpd.studies.study import Study, run_study

    plan, console = Study.load(study), Console()
    try:
        run_study(plan, workers, say=lambda text: console.print(text, markup=False, soft_wrap=True))
    except KeyboardInterrupt:
        console.print("Interrupted; the same command goes on from here.")
        raise typer.Exit(130) from None
    console.print(write_comparison(plan), markup=False, soft_wrap=True)
    console.print(f"The table, the plots and all numbers are in {report_folder(plan)}.")


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="A TOML file of settings.")],
    prompt: Annotated[int, typer.Option(min=1, help="The tokens of a typical prompt.")],
    completion: Annotated[int, typer.Option(min=1, help="The tokens of a typical completion.")],
    feedback: Annotated[
        int, typer.Option(min=0, help="The tokens that the teacher's prompt has after the question.")
    ] = 100,
    hardware: Annotated[
        str, typer.Option(help="The device: this (measured now), a100, h100, h200, l40s or rtx4090.")
    ] = "this",
    overrides: Overrides = None,
) -> None:
    """Predict the tokens, operations, memory and time of a training step."""
    from vpd.planning import calibration
    from vpd.planning import plan as planning
    from vpd.planning.step_passes import Lengths
    from vpd.policy.load import config_of

    settings = VPDConfig.load(config, overrides)
    lengths = Lengths(prompt, completion, feedback)
    network = config_of(settings.model.name)
    device = (
        calibration.this_machine(settings, network, lengths)
        if hardware == "this"
        else planning.hardware_named(hardware)
    )
    teacher = settings.make_algorithm().passes(settings.rollout.prompts_per_step).teacher_model
    teacher_size = None if teacher is None else planning.network_size_of(config_of(teacher))
    found = planning.predict(settings, planning.network_size_of(network), lengths, device, teacher_size)
    table = Table(title=f"A step on {device.name}")
    table.add_column("")
    for column in ("tokens", "TFLOP", "seconds"):
        table.add_column(column, justify="right")
    for part in (*(each.name for each in fields(planning.Step)), "total"):
        tokens, flops, seconds = (getattr(step, part) for step in (found.tokens, found.flops, found.seconds))
        table.add_row(part, f"{tokens:,.0f}", f"{flops / 1e12:,.2f}", f"{seconds:.3g}")
    console = Console()
    console.print(table)
    training = found.tokens.student + found.tokens.teacher
    console.print(
        f"The peak of memory is about {found.memory / 1e9:.1f} GB of {device.memory / 1e9:.0f} GB. Student and "
        f"teacher compute {training:,.0f} tokens; without prefix sharing it would be {found.tokens_unshared:,.0f}."
    )


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Write the run's report.html again from the run's files."""
    from vpd.report import write_report

    if not run.is_dir():
        raise ConfigError(f"There is no run folder {run}.")
    Console().print(f"Wrote {write_report(run)}.")


@app.command()
def settings(
    section: Annotated[
        str | None, typer.Argument(help="A section such as run, data, data.prompts or algorithm.grpo; all by default.")
    ] = None,
) -> None:
    """Show each setting with its type, its default and what it does."""
    for name, found in described(section).items():
        head, _, kind = name.partition(".")
        typer.echo(f"[{head}]" + (f"  {'environment' if head == 'data' else 'type'} = {kind}" if kind else ""))
        for setting in found:
            typer.echo(f"  {setting.name}: {setting.type} = {setting.default}")
            typer.echo(textwrap.fill(setting.text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6))
        typer.echo()


@app.command()
def init(
    config: Annotated[Path, typer.Argument(help="The TOML file to write.")] = Path("config.toml"),
    env: Annotated[str | None, typer.Option("--env", help="The environment: prompts, mcq, code, math, ...")] = None,
    given: Annotated[
        list[str] | None,
        typer.Option("--data", help="A setting of the environment as key=value, such as path=rows.jsonl; repeatable."),
    ] = None,
    model: Annotated[str, typer.Option(help="The model: a hub id or a folder.")] = "smollm2-135m-instruct",
    output_dir: Annotated[str, typer.Option(help="The run's folder.")] = "runs/mine",
) -> None:
    """Write a commented config for your own data; what the options leave open is asked for."""
    if config.exists():
        raise ConfigError(f"There is a file {config} already: choose another name.")
    asks = sys.stdin.isatty()
    question = f"Environment ({', '.join(environments())})"
    name: str = env or (typer.prompt(question, default="prompts") if asks else "prompts")
    values: dict[str, Any] = {"data": {}}
    for part in given or []:
        apply_override(values, f"data.{part}")
    for setting in needed_settings(name):
        if setting.name not in values["data"]:
            if not asks:
                raise ConfigError(f"data.{setting.name} is missing: give --data {setting.name}=VALUE. {setting.text}")
            apply_override(values, f"data.{setting.name}={typer.prompt(f'{setting.text} {setting.name}')}")
        value = values["data"][setting.name]
        if setting.type.startswith("list") and not isinstance(value, list):
            values["data"][setting.name] = [value]
    text = starter_config(name, values["data"], model, output_dir)
    VPDConfig.parse(tomllib.loads(text), origin="what was given")
    config.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(config, text)
    typer.echo(f"Wrote {config}. Look at one group first: vpd train {config} --dry-run")


@app.command()
def doctor() -> None:
    """Show what this machine can do, and how to get what is missing."""
    from vpd import doctor as examination

    examination.render(examination.report(), Console())


def _json_text(values: dict[str, Any]) -> str:
    """Write numbers as JSON; those that are not finite become null, which other parsers read."""
    plain = {name: value.model_dump(mode="json") if name == "settings" else value for name, value in values.items()}
    plain = {name: None if isinstance(value, float) and not isfinite(value) else value for name, value in plain.items()}
    return json.dumps(plain, allow_nan=False)


def _result_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Accuracy")
    table.add_column("", overflow="fold")
    for column, justify in {"accuracy": "right", "95% interval": "right", "n": "right"}.items():
        table.add_column(column, justify=justify)  # pyright: ignore[reportArgumentType]
    table.add_column("training s", justify="right")
    table.add_column("evaluation s", justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['accuracy']:.1%}",
            f"{row['low']:.1%} to {row['high']:.1%}",
            str(row["n"]),
            f"{row.get('train_seconds') or 0:.0f}",
            f"{row['seconds']:.0f}",
        )
    return table


def main() -> None:
    """Run the command line; errors that the user can mend are one sentence and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False)])
    warnings.filterwarnings("ignore", module=r"(transformers|accelerate|torch|peft)\..*")
    # Reward functions and classes of one's own are found where the command is run, as ``python -m`` finds them.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        app()
    except (ConfigError, RunError) as error:
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
