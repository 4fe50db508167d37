"""Writes what follows from the code: `MLproject`, `docs/commands.md`, the tables and pictures of `docs/methods.md`.

Run `python docs/generate.py` after changing an option or a training method; the tests compare the files with what this
gives.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from smp_ensemble.cli import COMMANDS, default_text, flag

ROOT = Path(__file__).resolve().parents[1]


def mlproject() -> str:
    """`MLproject`: each command is an entry point, each option a parameter of the same name.

    `python -m` and not the console script: MLflow keeps environments by their specification, and this runs the code in
    the project's folder as it is now.
    """
    lines = [
        "# Written by docs/generate.py from the options of the commands.",
        "name: smp_ensemble",
        "",
        "python_env: python_env.yaml",
        "",
        "entry_points:",
    ]
    for name, command in COMMANDS.items():
        lines += [f"  {name}:", "    parameters:"]
        options = fields(command.options)
        for known in options:
            required = known.metadata.get("required")
            default = "" if required else f", default: {json.dumps(default_text(known))}"
            lines.append(f"      {known.name}: {{type: string{default}}}")
        typed = " ".join(f"{flag(known.name)} {{{known.name}}}" for known in options)
        lines.append(f'    command: "python -m smp_ensemble.cli {name} {typed}"')
    return "\n".join(lines) + "\n"


def commands_page() -> str:
    """`docs/commands.md`: every command with its options."""
    lines = [
        "# Commands",
        "",
        "Each is `smp-ensemble COMMAND --option value` and `mlflow run . -e COMMAND -P option=value`. Written by",
        "`docs/generate.py`.",
    ]
    for name, command in COMMANDS.items():
        lines += ["", f"## {name}", "", f"{command.summary[0].upper()}{command.summary[1:]}.", ""]
        lines += [f"    {command.example}", "", "| option | default | meaning |", "|---|---|---|"]
        for known in fields(command.options):
            default = f"`{text}`" if (text := default_text(known)) else ""
            meaning = known.metadata["help"].replace("|", "\\|")
            lines.append(f"| `{flag(known.name)}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes all of it; pictures only where they would change."""
    import method_tables  # from this script's folder
    import schedule_plots

    written = {ROOT / "MLproject": mlproject(), ROOT / "docs" / "commands.md": commands_page(), **method_tables.pages()}
    for path, text in written.items():
        path.write_text(text, encoding="utf-8", newline="\n")
    epochs, steps = method_tables.PLOT_EPOCHS, method_tables.PLOT_STEPS
    for name, kind in method_tables.trainers().items():
        path = schedule_plots.FOLDER / f"{name}.png"
        schedule = kind().schedule(epochs, steps)
        averaged = method_tables.averaged_epochs(kind(), epochs, steps)
        if schedule_plots.drawn(path) != schedule_plots.fingerprint(schedule, averaged):
            schedule_plots.draw(schedule, steps, averaged, path)


if __name__ == "__main__":
    main()
