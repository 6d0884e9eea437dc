"""`agl air` and `agl rescore`: what stored rollouts teach, and would teach under other learning settings.

Nothing is run: both read the spans of a run's folder or of a live server.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agentlightning import rescoring
from agentlightning.doctor import Recorded
from agentlightning.errors import InvalidInput
from agentlightning.learning.air import AIR
from agentlightning.learning.explaining import Evidence, Explanation, RuleTotal, explain, rule_totals
from agentlightning.named_learning import NamedLearning
from agentlightning.rescoring import RescoredCall, Rescoring, Worth
from agentlightning.types import Episode
from agentlightning_server.cli import options
from agentlightning_server.cli.option_groups import INTERMEDIATE, LEARNING, Given, learning_of, option_group
from agentlightning_server.cli.options import say
from agentlightning_server.cli.sources import stored
from agentlightning_server.training.reporting import read_object

RunArgument = Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Folder of a run.")]
ServerOption = Annotated[str | None, typer.Option(help="URL of a live server instead.")]
KeyOption = Annotated[str | None, typer.Option(envvar="AGENTLIGHTNING_KEY")]
WORDS: Final = 40  # characters of an answer that a table shows


@option_group("learning", INTERMEDIATE)
def air(
    run_folder: RunArgument = None,
    server: ServerOption = None,
    key: KeyOption = None,
    rollout_id: Annotated[
        str | None,
        typer.Option("--explain", metavar="ROLLOUT", help="Each call of this rollout with its signals."),
    ] = None,
    as_json: options.JsonOption = False,
    *,
    learning: Given,
) -> None:
    """Show the intermediate rewards that AIR gives: by rule over a run, or call by call for one rollout."""
    names, _ = _names_of(run_folder)
    rules = learning_of(learning, names).air or AIR(())
    recorded = _recorded(run_folder, server, key)
    if rollout_id is not None:
        explained = explain(_one(recorded, rollout_id), rules)
        _print_explanation(explained, as_json)
        return
    found = [explain(episode, rules) for episode in _training(recorded)]
    _print_rules(rule_totals(found), rules.bound, found, as_json)


@option_group("learning", LEARNING)
def rescore(
    run_folder: RunArgument = None,
    server: ServerOption = None,
    key: KeyOption = None,
    calls: Annotated[bool, typer.Option("--calls", help="Show every call.")] = False,
    rollout_id: Annotated[
        str | None, typer.Option("--rollout", metavar="ID", help="Show every call of this rollout.")
    ] = None,
    as_json: options.JsonOption = False,
    *,
    learning: Given,
) -> None:
    """Compute returns and advantages of stored rollouts anew, under other settings, and show what changes."""
    names, unknown = _names_of(run_folder)
    if unknown:
        say(f"not recorded for this run, so the defaults stand for: {', '.join(unknown)}")
    before, after = learning_of({}, names), learning_of(learning, names)
    episodes = _training(_recorded(run_folder, server, key))
    found = rescoring.rescore(episodes, before, after, _trained(run_folder))
    shown = [call for call in found.calls if calls or call.rollout_id == rollout_id]
    if rollout_id is not None and not shown:
        raise InvalidInput(f"no call of a rollout {rollout_id} trains, neither before nor after")
    if as_json:
        settings = {"before": names.to_json(), "after": names.changed(learning).to_json()}
        typer.echo(json.dumps(_rescoring_json(found, shown, settings)))
    else:
        _show_rescoring(found, shown)


# --- what is stored ------------------------------------------------------------------------------


def _recorded(run_folder: Path | None, server: str | None, key: str | None) -> Iterator[Recorded]:
    with stored(run_folder, server, key) as source:
        for rollout in source.rollouts():
            yield Recorded(rollout, source.service.attempts(rollout.id), source.service.spans(rollout.id))


def _one(recorded: Iterator[Recorded], rollout_id: str) -> Episode:
    for record in recorded:
        if record.rollout.id == rollout_id:
            return rescoring.read_recorded(record)
    raise InvalidInput(f"there is no rollout {rollout_id}")


def _training(recorded: Iterator[Recorded]) -> list[Episode]:
    episodes, problems = rescoring.training_episodes(recorded)
    for sentence, count in problems.most_common():
        say(f"left out: {count} x {sentence}")
    return episodes


def _names_of(run_folder: Path | None) -> tuple[NamedLearning, list[str]]:
    """The learning settings that a run had, and those that are not known; they have their defaults."""
    values = _run_file(run_folder)
    return NamedLearning.from_json(values), [name for name in NamedLearning.names() if name not in values]


def _trained(run_folder: Path | None) -> list[str] | None:
    """The policies that a run trains; None where that is not known."""
    policies = _run_file(run_folder).get("policy")
    return policies.split(", ") if isinstance(policies, str) else None


def _run_file(run_folder: Path | None) -> Mapping[str, Any]:
    path = run_folder / "run.json" if run_folder is not None else None
    return read_object(path) if path is not None and path.exists() else {}


# --- AIR -----------------------------------------------------------------------------------------


def _print_explanation(explained: Explanation, as_json: bool) -> None:
    if as_json:
        calls = [{**asdict(call), "total": call.total} for call in explained.calls]
        typer.echo(json.dumps({**asdict(explained), "total": explained.total, "calls": calls}))
        return
    table = _table("call", "agent", "said", "tools", "rule", "value", "counts", "evidence")
    for number, call in enumerate(explained.calls):
        head = (str(number), call.agent_name or "", _words(call.said), ", ".join(call.tools))
        rows = [(s.rule, f"{s.value:+.3g}", f"{s.counted:+.3g}", _shown(s.evidence)) for s in call.signals]
        for row in rows[:1] or [("", "", "", "" if call.trainable else "no call of the policy")]:
            _add(table, *head, *row)
        for row in rows[1:]:
            _add(table, "", "", "", "", *row)
        if len(rows) > 1:
            _add(table, "", "", "", "", "in all", "", f"{call.total:+.3g}", "")
    console = Console()
    console.print(table)
    final = "none" if explained.final_reward is None else f"{explained.final_reward:.3g}"
    _line(console, f"final reward {final}, AIR {explained.total:+.3g}; {_acted(explained)}")


def _acted(explained: Explanation) -> str:
    acted = [
        f"the {name} signals count {factor:.0%}"
        for name, factor in (("good", explained.good), ("bad", explained.bad))
        if factor < 1
    ]
    return f"the bound {explained.bound:g} {'acted: ' + ', '.join(acted) if acted else 'did not act'}"


def _print_rules(
    totals: Mapping[str, RuleTotal], bound: float, found: Sequence[Explanation], as_json: bool
) -> None:
    bounded = sum(min(e.good, e.bad) < 1 for e in found)
    if as_json:
        rules = {rule: asdict(total) for rule, total in totals.items()}
        result = {"episodes": len(found), "bound": bound, "bounded_episodes": bounded, "rules": rules}
        typer.echo(json.dumps(result))
        return
    table = _table("rule", "signals", "episodes", "value", "counts")
    for rule, total in totals.items():
        numbers = (str(total.signals), str(total.episodes), f"{total.value:+.3f}", f"{total.counted:+.3f}")
        _add(table, rule, *numbers)
    console = Console()
    console.print(table)
    _line(console, f"{len(found)} episodes; the bound {bound:g} acted in {bounded}")


def _shown(evidence: Evidence) -> str:
    if evidence.tool is None:
        return "the answer"
    return f"{evidence.tool} {evidence.status}" + (f": {_words(evidence.error)}" if evidence.error else "")


# --- rescoring -----------------------------------------------------------------------------------


def _rescoring_json(
    found: Rescoring, shown: Sequence[RescoredCall], settings: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "settings": settings,
        "groups": {"all": found.groups, "before": found.mixed_before, "after": found.mixed_after},
        "agents": {agent: asdict(rescored) for agent, rescored in found.agents.items()},
        "calls": [asdict(call) for call in shown],
    }


def _show_rescoring(found: Rescoring, shown: Sequence[RescoredCall]) -> None:
    console = Console()
    table = _table("agent", "calls", "mean return", "mean advantage", "positive")
    for agent, change in found.agents.items():
        before, after = change.before, change.after
        _add(
            table,
            agent or "(no name)",
            _change(str(before.calls), str(after.calls)),
            _change(f"{before.mean_return:.3f}", f"{after.mean_return:.3f}"),
            _change(_signed(before.mean_advantage), _signed(after.mean_advantage)),
            _change(f"{before.positive:.0%}", f"{after.positive:.0%}"),
        )
    console.print(table)
    if shown:
        console.print(_call_table(shown))
    changed = _change(str(found.mixed_before), str(found.mixed_after))
    _line(console, f"groups with a difference to learn from: {changed} of {found.groups}")


def _call_table(shown: Sequence[RescoredCall]) -> Table:
    table = _table("rollout", "call", "agent", "return", "advantage")
    for call in shown:
        returned = _change(_returned(call.before), _returned(call.after))
        advantage = _change(_advantage(call.before), _advantage(call.after))
        _add(table, call.rollout_id, str(call.number), call.agent_name or "", returned, advantage)
    return table


def _returned(worth: Worth | None) -> str:
    return "-" if worth is None else f"{worth.returned:.3f}"


def _advantage(worth: Worth | None) -> str:
    return "-" if worth is None else _signed(worth.advantage)


def _signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"  # a zero has one sign only


def _change(before: str, after: str) -> str:
    return before if before == after else f"{before} -> {after}"


# --- tables --------------------------------------------------------------------------------------


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _add(table: Table, *cells: str) -> None:
    table.add_row(*(Text(cell) for cell in cells))  # what agents said is no markup


def _line(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _words(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= WORDS else flat[: WORDS - 1] + "…"
