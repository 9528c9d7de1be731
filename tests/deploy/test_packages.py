"""What the packages hold, and what is generated from the flags."""

from __future__ import annotations

import argparse
import gzip
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.__main__ import make_packages
from deploy.manual import SHELLS, render_completion, render_manual
from exporter.cli import COMMANDS, build_parser
from tests.deploy.distributions import ROOT
from tests.deploy.unit_file import FULL, UNITS, read_values
from tests.waiting import wait_until

OWN = {"/etc/default", "/usr/bin", "/usr/lib/kvm-notify-exporter", "/usr/lib/systemd/system", "/usr/lib/sysusers.d"}


def find_actions(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    """Every flag that users are told of, with the command that it belongs to."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield from ((name, flag) for _, flag in find_actions(command))
        elif action.help != argparse.SUPPRESS and action.option_strings:
            yield "", action


FLAGS = list(find_actions(build_parser()))


def test_every_flag_has_a_help() -> None:
    assert [(command, flag.option_strings) for command, flag in FLAGS if not flag.help] == []


def strip_roff(text: str) -> str:
    return re.sub(r"\\(f.|[,/&|^])", "", text).replace("\\-", "-")


def test_the_manual_has_every_command_and_flag() -> None:
    text = strip_roff(render_manual("1.2.3"))
    assert "kvm-notify-exporter - Prometheus exporter for KVM notify VM exits" in text
    assert "1.2.3" in text
    for command in COMMANDS:
        section = text.partition(f"OPTIONS 'kvm-notify-exporter {command}'")[2].partition(".SH COMMAND")[0]
        options = [option for name, flag in FLAGS if name == command for option in flag.option_strings]
        assert len(options) > 2
        assert [option for option in options if option not in section and option not in ("-h", "--help")] == []
    assert "--trigger.function" not in text  # a flag for tests


@pytest.mark.skipif(not shutil.which("man"), reason="man is not installed")
def test_the_manual_is_good_roff(tmp_path: Path) -> None:
    page = tmp_path / "page.1"
    page.write_text(render_manual("1.2.3"))
    words = ["man", "--warnings=w", "--encoding=UTF-8", "-l", str(page)]
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "MANROFFSEQ": "", "MANWIDTH": "120"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "serve --help" in done.stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_completions_know_every_flag(shell: str) -> None:
    text = render_completion(shell).replace("\\", "")
    options = {option for _, flag in FLAGS for option in flag.option_strings}
    names = {option if shell != "fish" else option.lstrip("-") for option in options}
    assert [name for name in sorted(names) if name not in text] == []


@pytest.mark.parametrize(
    ("line", "wanted"),
    [("kvm-notify-exporter ch", "check"), ("kvm-notify-exporter serve --web.listen", "--web.listen-address")],
)
def test_bash_completes(line: str, wanted: str, tmp_path: Path) -> None:
    script = tmp_path / "completion"
    script.write_text(render_completion("bash"))
    program = """
        . "$1"; COMP_LINE=$2; COMP_POINT=${#2}; read -ra COMP_WORDS <<< "$2"; COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
        $(complete -p kvm-notify-exporter | sed 's/.*-F \\([^ ]*\\).*/\\1/') kvm-notify-exporter
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    done = subprocess.run(["bash", "-c", program, "bash", script, line], capture_output=True, text=True, check=True)
    assert wanted in done.stdout.split()


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {path.suffix: path for path in make_packages(tmp_path_factory.mktemp("packages"))}


def test_the_same_commit_gives_the_same_bytes(packages: dict[str, Path], tmp_path: Path) -> None:
    first = min(path.stat().st_mtime for path in packages.values())
    wait_until(lambda: time.time() >= first + 2, "another second, which is what packages know of time")
    again = {path.suffix: path for path in make_packages(tmp_path)}
    assert {form: path.read_bytes() for form, path in again.items()} == {
        form: path.read_bytes() for form, path in packages.items()
    }


@pytest.fixture(scope="module")
def unpacked(packages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unpacked")
    subprocess.run(["dpkg-deb", "--extract", packages[".deb"], root], check=True)
    return root


def list_files(root: Path) -> set[str]:
    return {f"/{path.relative_to(root)}" for path in root.rglob("*") if not path.is_dir()}


def test_the_program_is_in_a_directory_of_its_own(unpacked: Path) -> None:
    files = list_files(unpacked)
    assert {"/usr/lib/kvm-notify-exporter/exporter/cli.py", "/usr/lib/kvm-notify-exporter/kvm/model.py"} <= files
    assert [name for name in files if "-packages/" in name] == []
    assert [name for name in files if not name.startswith((*OWN, "/usr/share/"))] == []
    text = (unpacked / read_values(FULL, "ExecStart")[0].removeprefix("/")).read_text()
    assert 'sys.path.insert(0, "/usr/lib/kvm-notify-exporter")' in text


def test_what_the_units_name_is_there(unpacked: Path) -> None:
    for unit in UNITS:
        assert (unpacked / "usr/lib/systemd/system" / unit).read_bytes() == (
            ROOT / "deploy/systemd" / unit
        ).read_bytes()
        for path in (read_values(unit, "ExecStart")[0], read_values(unit, "EnvironmentFile")[0].removeprefix("-")):
            assert (unpacked / path.removeprefix("/")).is_file()
    sysctl = re.findall(r"cp (/usr/share/\S+)", "".join((ROOT / "deploy/systemd" / unit).read_text() for unit in UNITS))
    assert len(sysctl) == 1
    assert (unpacked / sysctl[0].removeprefix("/")).is_file()
    with gzip.open(unpacked / "usr/share/man/man1/kvm-notify-exporter.1.gz", "rt") as page:
        assert ".SH SYNOPSIS" in page.read()


@pytest.mark.parametrize(
    ("source", "pattern", "target"),
    [
        ("grafana/alerts", "*.rules.yml", "alerts"),
        ("grafana/dashboards", "*.json", "dashboards"),
    ],
)
def test_rules_and_dashboards_are_there(source: str, pattern: str, target: str, unpacked: Path) -> None:
    wanted = {path.name: path.read_bytes() for path in (ROOT / source).glob(pattern)}
    assert wanted
    found = (unpacked / "usr/share/kvm-notify-exporter" / target).iterdir()
    assert {path.name: path.read_bytes() for path in found} == wanted


@pytest.mark.skipif(not shutil.which("rpm"), reason="rpm is not installed")
def test_the_rpm_holds_what_the_deb_holds(packages: dict[str, Path], unpacked: Path, tmp_path: Path) -> None:
    query = ["rpm", f"--dbpath={tmp_path}", "--query", "--package", str(packages[".rpm"])]

    def ask(*words: str) -> set[str]:
        done = subprocess.run([*query, *words], capture_output=True, text=True, check=True)
        return set(done.stdout.splitlines())

    files = ask("--queryformat", "[%{FILEMODES:perms} %{FILENAMES}\\n]")
    names = {line.partition(" ")[2] for line in files if not line.startswith("d")}
    share, name = "/usr/share", "kvm-notify-exporter"
    only_deb = {f"{share}/doc/{name}/{file}" for file in ("copyright", "changelog.gz", "changelog.Debian.gz")}
    only_deb |= {f"{share}/lintian/overrides/{name}", f"{share}/zsh/vendor-completions/_{name}"}
    only_rpm = {f"{share}/doc/{name}/CHANGELOG.md.gz", f"{share}/licenses/{name}/LICENSE"}
    only_rpm |= {f"{share}/zsh/site-functions/_{name}"}
    assert names - only_rpm == list_files(unpacked) - only_deb
    assert ask("--configfiles") == {"/etc/default/kvm-notify-exporter"}
    assert {"python3-aiohttp >= 3.8.4", "python3-prometheus_client >= 0.16"} <= ask("--requires")


@pytest.mark.skipif(not shutil.which("lintian"), reason="lintian is not installed")
def test_lintian_has_nothing_to_say_that_is_not_justified(packages: dict[str, Path]) -> None:
    words = ["lintian", "--allow-root", "--fail-on=error,warning", str(packages[".deb"])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize("script", sorted((ROOT / "deploy/scripts").iterdir()))
def test_scripts_are_posix_shell(script: Path) -> None:
    subprocess.run(["dash", "-n", script], check=True)
