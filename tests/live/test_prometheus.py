"""From the stall of a vCPU to a message with the VM's name and owner: agent, Prometheus, our rules, Alertmanager."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from exporter.stalls.drill import DRILL_SECONDS
from kvm.simulated.host import STUCK_SECONDS
from tests.live.monitored_hosts import DRILL_VM, PAGE, STUCK_VM, Episode, is_alert
from tests.live.receiver import Notification

pytestmark = pytest.mark.live

FOR_SECONDS, KEPT_SECONDS, GROUP_SECONDS = 30, 60, 15
# Scrapes, evaluations and deliveries of each second, on a busy machine.
PATIENCE_SECONDS = 10


def find_notification(episode: Episode, status: str, **labels: str) -> Notification:
    """The first one; what else was delivered and what the servers said is in the error if there is none."""
    for notification in episode.notifications:
        if is_alert(notification, status, **labels):
            return notification
    delivered = [
        (notification.path, alert["status"], alert["labels"])
        for notification in episode.notifications
        for alert in notification.document.get("alerts", ())
    ]
    raise AssertionError(f"no {status} {labels} among {delivered}\n{episode.prometheus_log[-4000:]}")


def read_texts(notification: Notification) -> tuple[dict[str, str], str]:
    (alert,) = notification.document["alerts"]
    return alert["labels"], " ".join(alert["annotations"].values())


def test_a_stall_is_delivered_with_the_vms_name_and_owner(episode: Episode, tell: Callable[[str], None]) -> None:
    page = find_notification(episode, "firing", name=STUCK_VM, instance="demo:9750")
    labels, text = read_texts(page)
    assert (labels["alertname"], labels["severity"], labels["project"]) == (PAGE, "page", "research")
    assert STUCK_VM in text
    assert "owner research" in text
    assert "demo:9750" in text
    assert "vCPU 0" in text
    waited = page.seconds - episode.stuck_at[0]
    assert FOR_SECONDS - 1 <= waited <= FOR_SECONDS + GROUP_SECONDS + PATIENCE_SECONDS
    tell(
        f"a stalled vCPU in the demo was delivered by Alertmanager {waited:.0f} s after Prometheus first saw it, of "
        f"which {FOR_SECONDS} s are the rule's own"
    )


def test_a_chat_message_by_alertmanagers_template_names_them_too(episode: Episode) -> None:
    texts = [
        attachment["text"]
        for notification in episode.notifications
        if notification.path == "/chat"
        for attachment in notification.document["attachments"]
        if "demo:9750" in attachment["title"]
    ]
    assert texts
    assert all(STUCK_VM in text and "owner research" in text for text in texts)


def test_when_it_goes_on_that_is_delivered(episode: Episode, tell: Callable[[str], None]) -> None:
    stuck_for = episode.stuck_at[-1] - episode.stuck_at[0]
    assert stuck_for == pytest.approx(STUCK_SECONDS, abs=PATIENCE_SECONDS)
    resolved = find_notification(episode, "resolved", name=STUCK_VM, instance="demo:9750")
    assert STUCK_VM in read_texts(resolved)[1]
    waited = resolved.seconds - episode.stuck_at[-1]
    assert KEPT_SECONDS - 1 <= waited <= KEPT_SECONDS + 2 * GROUP_SECONDS + PATIENCE_SECONDS
    tell(
        f"that it went on was delivered {waited:.0f} s after Prometheus last saw it stalled, {KEPT_SECONDS} s of which "
        "the rule keeps firing"
    )


def test_a_drill_is_delivered_like_a_stall(episode: Episode) -> None:
    drill = find_notification(episode, "firing", name=DRILL_VM, instance="twin:9750")
    labels, text = read_texts(drill)
    assert labels["vmm"] == "cloud-hypervisor"
    assert DRILL_VM in text
    assert "DRILL, not real" in text
    assert labels["drill"] == "yes"
    resolved = find_notification(episode, "resolved", name=DRILL_VM, instance="twin:9750")
    assert resolved.seconds - drill.seconds < DRILL_SECONDS + KEPT_SECONDS


def test_a_vm_on_two_hosts_is_one_alert_for_each(episode: Episode) -> None:
    """Both demos have a VM of that id that gets stuck, as if it had migrated there."""
    (one,) = find_notification(episode, "firing", name=STUCK_VM, instance="demo:9750").document["alerts"]
    (two,) = find_notification(episode, "firing", name=STUCK_VM, instance="twin:9750").document["alerts"]
    assert one["labels"]["vm"] == two["labels"]["vm"]
    assert {**one["labels"], "instance": ""} == {**two["labels"], "instance": ""}


def test_each_alert_is_delivered_once(episode: Episode) -> None:
    delivered = [
        (notification.path, alert["status"], tuple(sorted(alert["labels"].items())))
        for notification in episode.notifications
        for alert in notification.document.get("alerts", ())
    ]
    assert len(delivered) == len(set(delivered))


def test_prometheus_and_its_agents_get_along(episode: Episode, tell: Callable[[str], None]) -> None:
    """Samples that are refused (two of one name and time, a wrong type) would be warnings in its log."""
    assert [line for line in episode.prometheus_log.splitlines() if "level=warn" in line or "level=error" in line] == []
    tell(f"the whole episode with agents, Prometheus and Alertmanager took {episode.seconds:.0f} s")
