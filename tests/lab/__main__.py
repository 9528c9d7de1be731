"""Boots kernels and runs the tests inside: ``python -m tests.lab [--kernel SERIES ...] [pytest arguments]``.

Without arguments for pytest every kernel is booted in each way that `plan` knows, with the tests for it; with
arguments once, with those instead. Prints a line for each kernel; exits with 1 unless all tests ran and passed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from tests.lab.apt import LabError, say
from tests.lab.boot import RunLost
from tests.lab.debian import SERIES, open_kernel
from tests.lab.patched import open_patched_kernel
from tests.lab.plan import BOOTS, PATCHED_BOOTS, Boot, Boots, Outcome, open_executor, start_boots


def parse_arguments(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses our flags; what is left is for pytest."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab", allow_abbrev=False, description=__doc__)
    parser.add_argument("--kernel", action="append", choices=SERIES, help="only this series; repeatable")
    names = dict.fromkeys(boot.name for boot in (*BOOTS, *PATCHED_BOOTS))
    parser.add_argument("--boot", choices=list(names), help="only this boot")
    parser.add_argument("--patched", action="store_true", help="KVM with the project's patches (kvm/patches)")
    parser.add_argument("--lockdown", choices=["none", "integrity", "confidentiality"], default="none")
    parser.add_argument("--verbose", action="store_true", help="print the output of the tests and the console too")
    return parser.parse_known_args(words)


def render_line(release: str, outcomes: Sequence[Outcome]) -> str:
    """Returns the line about one kernel. Boots run side by side, so that their seconds overlap."""
    seconds = sum(outcome.run.seconds for outcome in outcomes)
    tests, failed, skipped = (sum(getattr(o, name) for o in outcomes) for name in ("tests", "failed", "skipped"))
    boots = ", ".join(f"{o.boot.name} {o.run.seconds:.0f} s" for o in outcomes)
    return f"{release}: {tests} tests, {failed} failed, {skipped} skipped, {seconds:.0f} s ({boots})"


def report_kernel(series: str, boots: Boots, verbose: bool) -> bool:
    """Waits for the boots of one kernel and prints what came of them; True when all is well."""
    outcomes: list[Outcome] = []
    well = True
    for (name, _), future in boots.futures.items():
        if name != series:
            continue
        try:
            outcome = future.result()
        except RunLost as err:
            print(err)
            well = False
            continue
        outcomes.append(outcome)
        well = well and outcome.passed
        if verbose or not outcome.passed:
            print(outcome.run.output, *outcome.kernel_warnings, sep="\n")
        if verbose:
            print(outcome.run.console)
        for figure in outcome.figures:
            print(f"{outcome.run.release}: {figure}")
    print(render_line(boots.kernels[series].release, outcomes), flush=True)
    return well


def main(words: Sequence[str]) -> int:
    """Runs the lab."""
    arguments, for_pytest = parse_arguments(words)
    series = arguments.kernel or list(SERIES)
    known = PATCHED_BOOTS if arguments.patched else BOOTS
    boots_wanted: Sequence[Boot] = [boot for boot in known if arguments.boot in (None, boot.name)]
    if not boots_wanted:
        say(f"the boot {arguments.boot} is {'not ' if arguments.patched else ''}for --patched")
        return 2
    if for_pytest and arguments.boot:
        boots_wanted = [replace(boot, tests=(), arguments=(*for_pytest,)) for boot in boots_wanted]
    elif for_pytest:
        append = "" if arguments.lockdown == "none" else f"lockdown={arguments.lockdown}"
        boots_wanted = [Boot(arguments.lockdown, append, (), arguments=(*for_pytest,))]
    with open_executor() as executor:
        try:
            open_one = open_patched_kernel if arguments.patched else open_kernel
            boots = start_boots(executor, [(name, boot) for name in series for boot in boots_wanted], open_one)
        except LabError as err:
            say(str(err))
            return 1
        started = time.monotonic()
        verdicts = [report_kernel(name, boots, arguments.verbose) for name in series]
        say(f"{time.monotonic() - started:.0f} s in all")
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
