"""What the README shows, runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
RUN = "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/genkit demo"
TEST = "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_the_two_commands_stand_alone_on_their_lines():
    assert [TEXT.splitlines().count(command) for command in (RUN, TEST)] == [1, 1]


# What each example prints first, in the order of the page; those that train or compile for long are slow.
EXAMPLES = [
    pytest.param(0, "(64, 1, 8, 8)", marks=pytest.mark.slow),
    pytest.param(1, "        mean", marks=pytest.mark.slow),
    pytest.param(2, "Hurst index of the Nile 0.8", marks=()),
    pytest.param(3, "(100, 20, 2)", marks=pytest.mark.slow),
    pytest.param(4, "1.", marks=()),
]


def test_every_example_has_a_test():
    assert len(blocks("python")) == len(EXAMPLES)


@pytest.mark.parametrize(("index", "start"), EXAMPLES)
def test_the_examples_run(index, start, tmp_path):
    example = blocks("python")[index]
    assert len([line for line in example.splitlines() if line.strip() and not line.startswith("#")]) <= 20
    script = tmp_path / "example.py"
    script.write_text(example)
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(start), done.stdout
    assert "nan" not in done.stdout


def test_every_command_shown_exists():
    shown = {line.split()[1] for block in blocks("sh") for line in block.splitlines() if line.startswith("genkit ")}
    for command in sorted(shown):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys, genkit.cli; sys.exit(genkit.cli.main(sys.argv[1:]))",
                command,
                "--help",
            ],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            timeout=120,
        )
        assert done.returncode == 0, f"genkit {command} --help: {done.stderr}"


def test_files_named_exist():
    named = set(re.findall(r"\b(?:models|samplers|examples)/\w+\.py", TEXT))
    assert named
    assert not [name for name in sorted(named) if not (ROOT / name).is_file()]


def test_the_name_clash_is_told():
    assert "Do not `pip install genkit`" in TEXT and "genkit-jax" in TEXT
