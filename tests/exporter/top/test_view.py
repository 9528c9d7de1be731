"""What each key does."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from exporter.top.comparison import EXITS_KEY, NOTIFY_KEY
from exporter.top.view import KEYS, Opened, Place, Question, Shown, View, find_selected, find_statistics, press
from kvm.model import VmKey

VMS = [Place(VmKey(pid, 7, 9)) for pid in range(5)]
STATISTICS = (NOTIFY_KEY, EXITS_KEY, "vcpu/halt_exits", "vcpu/halt_poll_fail_ns", "vm/exits_of_vm")
SHOWN = Shown(VMS, 2, (NOTIFY_KEY, EXITS_KEY, "vcpu/halt_exits"), STATISTICS)


def type_keys(keys: Iterable[str], view: View | None = None, shown: Shown = SHOWN) -> View:
    current = view or View()
    for key in keys:
        pressed = press(current, key, shown)
        assert pressed is not None, f"{key!r} ends it"
        current = pressed
    return current


def select(*keys: str) -> int:
    return find_selected(type_keys(keys), VMS)


def test_only_q_ends_it() -> None:
    assert press(View(), "q", SHOWN) is None
    assert type_keys(["/", "q"]).search == "q"


def test_the_selection_moves_and_stays_within() -> None:
    assert select() == 0
    assert select("down", "j", "up") == 1
    assert select("up") == 0
    assert select("pagedown", "down") == 3
    assert select("pagedown", "pageup") == 0
    assert select("end", "down") == 4
    assert select("end", "home") == 0
    assert type_keys(["down", "enter"], shown=SHOWN._replace(rows=())) == View()


def test_the_selected_row_is_followed_and_replaced_by_the_next_when_it_has_gone() -> None:
    view = type_keys(["down", "down"])
    assert find_selected(view, [VMS[2], VMS[0]]) == 0
    assert find_selected(view, [VMS[0], VMS[1], VMS[3]]) == 2
    assert find_selected(view, [VMS[0]]) == 0
    assert find_selected(view, []) == 0


def test_it_sorts_by_keys_by_columns_and_by_name() -> None:
    assert View().sort == NOTIFY_KEY
    assert type_keys("e").sort == EXITS_KEY
    assert type_keys("en").sort == NOTIFY_KEY
    assert type_keys(["right", ">"]).sort == "vcpu/halt_exits"
    assert type_keys(["right", "right", "right", "left"]).sort == EXITS_KEY
    assert type_keys(["left"]).sort == NOTIFY_KEY
    assert type_keys(["s", *"poll", "enter"]).sort == "vcpu/halt_poll_fail_ns"
    assert type_keys(["s", *"nothing", "enter"]).sort == NOTIFY_KEY
    assert type_keys(["s", *"poll", "escape"]).sort == NOTIFY_KEY
    assert type_keys(["right"], View(sort="vcpu/gone")).sort == "vcpu/gone"


def test_the_likeliest_statistic_is_first() -> None:
    assert find_statistics("exits", STATISTICS)[:2] == [EXITS_KEY, "vm/exits_of_vm"]
    assert find_statistics("vm/", STATISTICS) == ["vm/exits_of_vm"]
    assert find_statistics(" HALT_EXITS ", STATISTICS) == ["vcpu/halt_exits"]


def test_it_searches_while_one_types() -> None:
    assert type_keys(["/", *"wxb", "backspace"]).search == "wx"
    assert type_keys(["/", *"web", "enter"]).question is None
    assert type_keys(["/", *"web", "enter", "/"]).typed == "web"
    assert type_keys(["/", *"web", "escape"]) == View()
    assert type_keys(["/", *"web", "enter", "escape"]).search == ""
    assert len(type_keys(["/", *"x" * 500]).search) == 60
    assert type_keys(["/", "\x1b", "\t", "up", "日"]).search == "日"


def test_it_drills_down_and_comes_back_to_where_it_was() -> None:
    down = type_keys(["down", "enter"])
    assert down.opened == (Opened(VMS[1], False),)
    vcpus = [Place(VMS[1].vm, 0), Place(VMS[1].vm, 4)]
    deeper = type_keys(["down", "enter"], down, SHOWN._replace(rows=vcpus))
    assert deeper.opened == (Opened(VMS[1], False), Opened(vcpus[1], True))
    statistics = SHOWN._replace(rows=list(STATISTICS))
    assert type_keys(["enter", "a"], deeper, statistics) == deeper
    back = type_keys(["escape"], deeper, statistics)
    assert find_selected(back, vcpus) == 1
    assert find_selected(type_keys(["backspace"], back), VMS) == 1
    assert type_keys(["escape"]) == View()


def test_all_statistics_of_a_vm_are_one_key_away() -> None:
    assert type_keys("a").opened == (Opened(VMS[0], True),)


def test_it_freezes_shows_help_and_switches_to_vcpus() -> None:
    assert type_keys("f").is_frozen
    assert not type_keys("f ").is_frozen
    assert type_keys("?").has_help
    assert type_keys("?q") == View(), "any key goes back"
    assert type_keys(["enter", "v"]) == View(all_vcpus=True)
    assert type_keys("vv") == View()


@given(st.lists(st.sampled_from([*KEYS, "x", "\x00", "enter", "KEY_F(1)", "\udc80"]), max_size=30))
def test_no_keys_break_it(keys: list[str]) -> None:
    view = type_keys(keys)
    assert 0 <= find_selected(view, VMS) < len(VMS)
    assert isinstance(view.question, Question | None)
