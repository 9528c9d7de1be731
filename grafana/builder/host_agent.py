"""The rows of a host's dashboard about its agent."""

from __future__ import annotations

from exporter.prometheus import metrics as m
from grafana.builder.colors import MISSING, WORKS
from grafana.builder.layout import Row
from grafana.builder.panels import COUNT, PER_HOUR, Query, make_graph, make_timeline
from grafana.builder.queries import HOST_KEYS, UP, rate, seen_agents, select


def make_agent_row() -> Row:
    """Return the row about what the agent can read, and how long it takes."""
    return Row(
        30,
        "Agent",
        [
            make_timeline(
                31,
                "Up",
                "Whether Prometheus could scrape the agent.",
                Query(seen_agents(select(UP)), "{{instance}}"),
                mappings=WORKS,
            ),
            make_timeline(
                32,
                "Sources",
                "Whether a source of KVM statistics works. debugfs does not work under Secure Boot, and need not.",
                Query(f"max by ({HOST_KEYS}, source) ({select(m.SOURCE_UP)})", "{{instance}} {{source}}"),
                mappings=WORKS,
            ),
            make_timeline(
                37,
                "Sees every VM",
                "Whether the agent saw every VM of the host. Where it did not, VMs may be missing from every panel.",
                Query(f"min by ({HOST_KEYS}) ({select(m.COMPLETE)})", "{{instance}}"),
                mappings=WORKS,
            ),
            make_timeline(
                38,
                "Why VMs may be missing",
                "hidden_processes: /proc hides some. pid_namespace: a container's. no_source: nothing can be read.",
                Query(f"max by ({HOST_KEYS}, reason) ({select(m.INCOMPLETE_REASON)})", "{{instance}} {{reason}}"),
                mappings=MISSING,
                no_value="no reason is known",
            ),
            make_graph(
                393,
                "VMs over budget",
                "VMs that have no series because their process or their user has too many; the log names the user.",
                [Query(f"max by ({HOST_KEYS}) ({select(m.HOST_VMS_OVER_BUDGET)})", "{{instance}}")],
                unit=COUNT,
            ),
            make_graph(
                39,
                "Age of what is shown",
                "How long ago the agent read the host. A file of the textfile collector that nobody renews grows old.",
                [Query(f"time() - max by ({HOST_KEYS}) ({select(m.SNAPSHOT_TIMESTAMP)})", "{{instance}}")],
                unit="s",
            ),
            make_timeline(
                33,
                "Collectors",
                "Whether each part of a scrape succeeded.",
                Query(f"min by ({HOST_KEYS}, collector) ({select(m.SCRAPE_SUCCESS)})", "{{instance}} {{collector}}"),
                mappings=WORKS,
            ),
            make_timeline(
                394,
                "Web configuration",
                "Whether the last reload of --web.config.file succeeded. If not, the one before stays in force.",
                Query(f"min by ({HOST_KEYS}) ({select(m.WEB_CONFIG_RELOAD_SUCCESS)})", "{{instance}}"),
                mappings=WORKS,
            ),
            make_timeline(
                395,
                "State file",
                "Whether --state.file could be read and written. If not, the host's total begins at 0 after a restart.",
                Query(f"min by ({HOST_KEYS}) ({select(m.STATE_FILE_SUCCESS)})", "{{instance}}"),
                mappings=WORKS,
            ),
            make_graph(
                396,
                "Statistics left out",
                "Statistics of KVM that --collector.stats selects and that cannot be exported, by reason.",
                [Query(f"max by ({HOST_KEYS}, reason) ({select(m.STATISTICS_LEFT_OUT)})", "{{instance}} {{reason}}")],
                unit=COUNT,
                lines=4,
                no_value="none is known",
            ),
            make_graph(
                34,
                "Read errors",
                "What was left out because it could not be read or made no sense; the log names the VM and the reason. "
                "The first of a kind starts the line.",
                [
                    Query(
                        f"sum by ({HOST_KEYS}, source, kind) ({rate(m.READ_ERRORS)}) * 3600",
                        "{{instance}} {{source}} {{kind}}",
                    )
                ],
                unit=PER_HOUR,
                lines=5,
                no_value="no read error is known",
            ),
            make_graph(
                35,
                "Duration of a scrape",
                "By part; the collector snapshot is the reading of the host, before the others.",
                [Query(f"max by ({HOST_KEYS}, collector) ({select(m.SCRAPE_DURATION)})", "{{instance}} {{collector}}")],
                unit="s",
                lines=5,
                stacked=True,
            ),
            make_graph(
                36,
                "Poll period",
                "How often counters are polled for notify exits; 0 where an exit itself tells of it.",
                [Query(f"max by ({HOST_KEYS}) ({select(m.POLL_PERIOD)})", "{{instance}}")],
                unit="s",
            ),
            make_graph(
                391,
                "CPU time of the agent",
                "By kind of thread: its event loop (main) and its pools of workers. 1 is one CPU, all the time.",
                [Query(f"max by ({HOST_KEYS}, thread) ({rate(m.THREAD_CPU)})", "{{instance}} {{thread}}")],
                unit="none",
                lines=5,
                stacked=True,
            ),
            make_graph(
                392,
                "Threads and context switches of the agent",
                "Switches per second. Many involuntary ones: the host has no CPU to spare for its agent.",
                [
                    Query(f"max by ({HOST_KEYS}) ({select(m.THREADS)})", "threads {{instance}}"),
                    Query(f"max by ({HOST_KEYS}, kind) ({rate(m.CONTEXT_SWITCHES)})", "{{kind}} {{instance}}"),
                ],
                unit="none",
                lines=5,
            ),
        ],
        collapsed=True,
    )


def make_tracing_row() -> Row:
    """Return the row about trace sessions, and what was logged of them."""
    return Row(
        40,
        "Tracing and warnings",
        [
            make_graph(
                41,
                "Traced vCPUs",
                "vCPU threads whose exits are traced: at most 16 at once, none while nothing happens.",
                [Query(f"max by ({HOST_KEYS}) ({select(m.TRACED_VCPUS)})", "{{instance}}")],
                unit=COUNT,
            ),
            make_graph(
                42,
                "Trace sessions",
                "How often a vCPU's exits began to be traced, and how often one had to wait because enough is traced "
                "already: a guest that provokes notify exits cannot cost more than this.",
                [
                    Query(f"sum by ({HOST_KEYS}) ({rate(m.TRACE_ARMINGS)}) * 3600", "begun on {{instance}}"),
                    Query(
                        f"sum by ({HOST_KEYS}) ({rate(m.TRACE_BUDGET_EXHAUSTED)}) * 3600", "had to wait on {{instance}}"
                    ),
                ],
                unit=PER_HOUR,
            ),
            make_graph(
                43,
                "Trace records",
                "Records of notify exits that were read, and that were lost. Lost ones prove nothing. Missed are vCPUs "
                "with notify exits of which the BPF trigger told nothing.",
                [
                    Query(f"sum by ({HOST_KEYS}) ({rate(m.TRACE_RECORDS)})", "read on {{instance}}"),
                    Query(f"sum by ({HOST_KEYS}) ({rate(m.TRACE_LOST_RECORDS)})", "lost on {{instance}}"),
                    Query(f"sum by ({HOST_KEYS}) ({rate(m.TRIGGER_MISSED)})", "missed on {{instance}}"),
                ],
                unit="cps",
            ),
            make_graph(
                44,
                "Warnings",
                "Lines about stalls that were logged, and stalls that were not logged at once, so that no guest can "
                "fill the log.",
                [
                    Query(f"sum by ({HOST_KEYS}) ({rate(m.WARNINGS)}) * 3600", "logged on {{instance}}"),
                    Query(f"sum by ({HOST_KEYS}) ({rate(m.WARNINGS_SUPPRESSED)}) * 3600", "withheld on {{instance}}"),
                ],
                unit=PER_HOUR,
            ),
            make_graph(
                45,
                "Drills",
                "vCPUs that a drill says are stuck, to test who is called. No drill counts anywhere else.",
                [Query(f"sum by ({HOST_KEYS}) ({select(m.VCPU_DRILL)})", "{{instance}}")],
                unit=COUNT,
                no_value="no drill is known",
            ),
            make_timeline(
                46,
                "Evidence",
                "What tells where notify exits are: kernel, KVM's own statistics, or trace. Where nothing does, no "
                "stall is found.",
                Query(f"max by ({HOST_KEYS}, evidence) ({select(m.EVIDENCE)})", "{{instance}} {{evidence}}"),
                mappings=WORKS,
            ),
        ],
        collapsed=True,
    )
