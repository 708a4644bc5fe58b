"""First contact at 80 columns: what `lwz` alone, `lwz recipe` and `lwz doctor` show."""

import re

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from lwzlib.base.recipe import departures, flatten, load_recipe
from lwzlib.cli import doctor, main
from lwzlib.cli.options import CLUSTER, EVALUATE, EXHIBITS, JUDGE, START, TRAIN

COMMANDS = get_command(main.app).commands


def lwz(monkeypatch, *words):
    monkeypatch.setattr(main.out, "_width", 80)
    return CliRunner().invoke(main.app, words, env={"COLUMNS": "80"}).output


def test_lwz_alone_shows_five_commands_first_and_groups_the_others(monkeypatch):
    shown = lwz(monkeypatch)
    titles = re.findall(r"^╭─ (.+?) ─+╮$", shown, re.MULTILINE)
    assert titles == ["Options", START, TRAIN, JUDGE, EVALUATE, EXHIBITS, CLUSTER]
    first = shown.partition(f"─ {START} ─")[2].partition("╰")[0]
    assert re.findall(r"^│ (\w+)", first, re.MULTILINE) == ["run", "status", "recipe", "doctor", "write"]


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_one_line_in_that_list(monkeypatch, name):
    sentence = COMMANDS[name].help.split("\n")[0]
    assert any(sentence in line for line in lwz(monkeypatch).splitlines()), f"{sentence!r} is cut or wrapped at 80 columns"


@pytest.mark.parametrize("name", COMMANDS)
def test_its_own_help_names_every_option_whole_at_80_columns(monkeypatch, name):
    shown = lwz(monkeypatch, name, "--help")
    options = [option for parameter in COMMANDS[name].params for option in parameter.opts if option.startswith("--")]
    assert not [option for option in options if not re.search(rf"{re.escape(option)}(?![\w-])", shown)]


def test_recipe_shows_departures_whole_and_all_when_asked(monkeypatch):
    loaded = load_recipe("nano")
    shown, every = lwz(monkeypatch, "recipe", "nano"), lwz(monkeypatch, "recipe", "nano", "--all")
    for name, *_ in departures(loaded):
        assert re.search(rf"^ *{re.escape(name)} ", shown, re.MULTILINE), f"{name} is broken over lines"
    assert "grpo.kl_beta" not in shown
    for name in flatten(loaded.model_dump(exclude={"arms"})):
        assert re.search(rf"^ *{re.escape(name)} ", every, re.MULTILINE) or name == "name", name


def test_doctor_ends_with_what_this_machine_can_run(monkeypatch):
    monkeypatch.setattr(doctor, "_place", lambda part: "1.0")
    ended = lwz(monkeypatch, "doctor").splitlines()[-1]
    assert re.match(r"This machine \(cores: \d+, memory: \d+ GiB\) can run ", ended)
    assert "smoke (" in ended and "paper" not in ended


def test_doctor_survives_a_wrong_profile_and_fails_without_nano(monkeypatch):
    monkeypatch.setattr(doctor, "_place", lambda part: "1.0")
    monkeypatch.setenv("LWZ_PROFILE", "generic nodez=2")
    assert "nano (" in lwz(monkeypatch, "doctor").splitlines()[-1]
    monkeypatch.setattr(doctor, "_runnable", lambda: ["smoke"])
    assert CliRunner().invoke(main.app, ["doctor"]).exit_code == 1


def test_doctor_names_what_nano_lacks(monkeypatch):
    monkeypatch.setattr(doctor, "_place", lambda part: "" if part == "kit:minilm" else "1.0")
    shown = lwz(monkeypatch, "doctor")
    assert shown.splitlines()[-1] == "This machine cannot run recipe nano before it has kit:minilm."
    assert re.search(r"kit:minilm +missing; affects the semantic half of the", shown) and "lwz prepare" in shown
