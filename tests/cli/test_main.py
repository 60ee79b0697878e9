"""The `pronghorn` command itself: its help, its options, its exit codes."""

import subprocess
import sys

import jax
import pytest

from pronghorn.cli import COMMANDS, main
from pronghorn.errors import InputError, RunError
from tests.cli.conftest import invoke


@pytest.fixture
def failing(monkeypatch):
    """Make `doctor` raise something."""

    def fail(error):
        def examine(**_):
            raise error

        monkeypatch.setattr("pronghorn.verification.doctor.examine", examine)

    return fail


def test_without_a_command_help_names_them_all(capsys):
    assert main([]) == 2
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("pronghorn 0.")


def test_unknown_command_is_bad_input(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["trian"])
    assert stopped.value.code == 2 and "train" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert shown.startswith(f"usage: pronghorn {command}") and "--json" in shown


@pytest.mark.parametrize("arguments", [["train"], ["generate"], ["merge", "base"], ["plan", "x", "--nope"]])
def test_missing_and_unknown_arguments_are_bad_input(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and f"usage: pronghorn {arguments[0]}" in capsys.readouterr().err


def test_options_may_stand_between_the_settings(tmp_path):
    arguments = [
        "model=x",
        "--json",
        tmp_path / "n.json",
        "train.max_steps=2",
        "--rows",
        1,
        "data.seedling=1",
    ]
    finished = invoke("preview", *arguments)
    assert finished.code == 2 and "data.seedling: unknown key" in finished.err


def test_long_first_setting_is_no_file_name():
    finished = invoke("preview", f"data.system_prompt={'x' * 5000}", "data.seedling=1")
    assert finished.code == 2 and "data.seedling: unknown key" in finished.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("model: missing; give one."), 2),
        (RunError("disk: full; free space."), 1),
        (KeyboardInterrupt(), 130),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes."), 1),
    ],
)
def test_expected_failures_are_one_sentence_and_an_exit_code(failing, error, code):
    failing(error)
    finished = invoke("doctor")
    assert finished.code == code
    assert finished.err.startswith("pronghorn doctor: ") and finished.err.count("\n") == 1


@pytest.mark.parametrize("error", [KeyError("x"), jax.errors.JaxRuntimeError("INTERNAL: a fault")])
def test_faults_of_the_program_keep_their_traceback(failing, error):
    failing(error)
    with pytest.raises(type(error)):
        invoke("doctor")


def test_help_loads_nothing_heavy():
    code = (
        "import sys, pronghorn.cli\n"
        "try: pronghorn.cli.main(['generate', '--help'])\n"
        "except SystemExit: pass\n"
        "found = {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "sys.exit(', '.join(found) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
