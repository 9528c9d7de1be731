"""Every expression of the rules, the dashboards and the documents, as questions for a Prometheus."""

from __future__ import annotations

import re
from collections.abc import Iterator

import promql_parser

from tests.documents import find_blocks_anywhere
from tests.grafana.dashboard_queries import find_queries
from tests.grafana.promql import find_selectors, walk
from tests.live.history_writer import read_groups
from tests.live.monitored_hosts import Question, find_rule_files

# What somebody may choose in a dashboard: one host, or some of them.
CHOICES = ("demo:9750", "real:9750", "blind:9750", "(demo:9750|twin:9750)")
# What stands in the runbook's queries for what an alert says.
PLACEHOLDERS = re.compile('="(HOST|VM|MICROCODE)"')


def find_rule_questions() -> list[Question]:
    questions = []
    for group in read_groups(find_rule_files()):
        for rule in group["rules"]:
            kind = "alert" if "alert" in rule else "record"
            questions.append(Question(f"{kind} {rule[kind]}", rule["expr"]))
    return questions


def find_dashboard_questions(instance: str = ".+") -> list[Question]:
    queries = find_queries(instance=instance)
    return [Question(f"{query.dashboard}: {query.place}", query.expr, query.label) for query in queries]


def find_document_questions() -> list[Question]:
    """What the documents tell people to ask: their blocks that are PromQL and about a metric of ours."""
    questions = []
    for block in find_blocks_anywhere("", "promql"):
        try:
            selectors = find_selectors(block)
        except ValueError:
            continue
        if any(re.match(r"(\w+:)?kvm_", selector.metric) for selector in selectors):
            questions.append(Question("documents", PLACEHOLDERS.sub('=~".+"', block.strip())))
    return questions


def find_branches(questions: list[Question]) -> Iterator[Question]:
    """What stands on either side of an ``or``: one side alone would make the whole find something."""
    for question in questions:
        for node in walk(promql_parser.parse(question.expr)):
            if isinstance(node, promql_parser.BinaryExpr) and str(node.op) == "or":
                yield Question(question.place, str(node.lhs))
                yield Question(question.place, str(node.rhs))


def find_questions() -> list[Question]:
    """All of them, once each, with the dashboards' variables set to everything; and their branches."""
    whole = [*find_rule_questions(), *find_dashboard_questions(), *find_document_questions()]
    return list(dict.fromkeys([*whole, *find_branches(whole)]))


def find_choices() -> dict[str, list[Question]]:
    """What the dashboards ask for each choice of an instance."""
    return {choice: list(dict.fromkeys(find_dashboard_questions(choice))) for choice in CHOICES}
