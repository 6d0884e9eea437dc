"""Does trace -> episode -> batch hold? Findings over stored rollouts, each with its remedy.

Pure functions over episodes; nothing is run and nothing is changed. `agl doctor` gathers and prints.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from agentlightning.bridge import (
    LearningSettings,
    RolloutService,
    counts,
    deciding_attempt,
    learnable_groups,
    make_batch,
)
from agentlightning.errors import AgentLightningError, NothingToLearn
from agentlightning.learning.air import apply_air
from agentlightning.reading import read_episode
from agentlightning.types import Attempt, Batch, Episode, Mode, Rollout, RolloutStatus, Span


class Level(StrEnum):
    """ERROR: training cannot work. WARNING: it works worse than it could. OK: as it should be."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing seen, and what to do about it."""

    level: Level
    what: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A rollout as stored, with all it left behind."""

    rollout: Rollout
    attempts: Sequence[Attempt]
    spans: Sequence[Span]


def diagnose(recorded: Sequence[Recorded], learning: LearningSettings | None = None) -> list[Finding]:
    """Check stored rollouts from the first span to the batch that they would make."""
    learning = learning or LearningSettings()
    if not recorded:
        return [
            Finding(
                Level.ERROR,
                "no rollout is stored",
                "start a runner (`agl run MODULE:FUNCTION --server URL`), or call an agent with the adapter "
                "installed and AGENTLIGHTNING_URL set",
            )
        ]
    findings = _outcomes(recorded)
    episodes, problems = _episodes(recorded, learning)
    findings += problems
    if episodes:
        findings += _calls(episodes) + _rewards(episodes) + _agents(episodes, learning)
        findings += _batch(episodes, learning)
    return findings


def _outcomes(recorded: Sequence[Recorded]) -> list[Finding]:
    counts = Counter(record.rollout.status for record in recorded)
    good = counts[RolloutStatus.SUCCEEDED]
    findings = [Finding(Level.OK, f"{good} of {len(recorded)} rollouts succeeded")] if good else []
    failed = [r for r in recorded if r.rollout.status is RolloutStatus.FAILED]
    if failed:
        errors = Counter(_last_line(deciding_attempt(r.attempts)) for r in failed)
        sentence, count = errors.most_common(1)[0]
        level = Level.WARNING if good else Level.ERROR
        findings.append(
            Finding(level, f"{len(failed)} rollouts failed, {count}x with: {sentence}", "mend the agent")
        )
    waiting = counts[RolloutStatus.QUEUED]
    if waiting and waiting == len(recorded):
        findings.append(
            Finding(Level.ERROR, f"all {waiting} rollouts wait for a worker", "start a runner: `agl run`")
        )
    return findings


def _last_line(attempt: Attempt | None) -> str:
    lines = ((attempt.error if attempt else None) or "no error was recorded").strip().splitlines()
    return lines[-1] if lines else "no error was recorded"


def _episodes(
    recorded: Sequence[Recorded], learning: LearningSettings
) -> tuple[list[Episode], list[Finding]]:
    episodes: list[Episode] = []
    findings: list[Finding] = []
    for record in recorded:
        attempt = deciding_attempt(record.attempts)
        if attempt is None or not counts(record.rollout):
            continue
        try:
            episode = read_episode(
                record.rollout, attempt, record.spans, reward_weights=learning.reward_weights
            )
        except AgentLightningError as error:
            findings.append(Finding(Level.ERROR, f"rollout {record.rollout.id}: {error}"))
            continue
        episodes.append(apply_air(episode, learning.air) if learning.air else episode)
    return episodes, findings


def _calls(episodes: Sequence[Episode]) -> list[Finding]:
    calls = [call for episode in episodes for call in episode.calls]
    exact = [call for call in calls if call.prompt_ids is not None]
    findings: list[Finding] = []
    if not calls:
        return [
            Finding(
                Level.ERROR,
                "no model call was recorded",
                "send the agent's calls to the gateway: OPENAI_BASE_URL, or base_url=ctx.base_url",
            )
        ]
    if not exact:
        findings.append(
            Finding(
                Level.ERROR,
                f"{len(calls)} model calls were traced, none went through the gateway",
                "an explicit base_url in the agent wins over OPENAI_BASE_URL: set it to the server's /v1",
            )
        )
    else:
        findings.append(Finding(Level.OK, f"{len(exact)} of {len(calls)} model calls have exact token ids"))
    greedy = [call for call in exact if call.temperature == 0]
    if greedy:
        findings.append(
            Finding(
                Level.WARNING,
                f"{len(greedy)} of {len(exact)} policy calls were greedy (temperature 0)",
                "train with temperature 1: a group of equal answers has no gradient",
            )
        )
    cut = [call for call in exact if call.finish_reason == "length"]
    if cut:
        share = len(cut) / len(exact)
        findings.append(
            Finding(
                Level.WARNING,
                f"{share:.0%} of the policy's responses were cut at max_tokens",
                "raise max_tokens, or keep AIR's truncated rule so that short answers win",
            )
        )
    unusable = Counter(s.split(": ", 1)[-1] for e in episodes for s in e.untrainable)
    findings += [Finding(Level.WARNING, f"{n} calls left out: {s}") for s, n in unusable.items()]
    return findings


def _rewards(episodes: Sequence[Episode]) -> list[Finding]:
    rewarded = [e for e in episodes if e.final_reward is not None]
    if not rewarded:
        return [
            Finding(
                Level.ERROR,
                "no episode has a final reward",
                "return a number from the agent function, call emit_reward(value), or POST "
                "/api/rollouts/{id}/rewards",
            )
        ]
    findings = [Finding(Level.OK, f"{len(rewarded)} of {len(episodes)} episodes have a final reward")]
    signals = Counter(signal.rule for e in episodes for signal in e.signals)
    if signals:
        listed = ", ".join(f"{rule} {count}x" for rule, count in signals.most_common())
        findings.append(Finding(Level.OK, f"AIR found: {listed}"))
    return findings


def _agents(episodes: Sequence[Episode], learning: LearningSettings) -> list[Finding]:
    transitions = [t for e in episodes for t in e.transitions]
    agents = Counter(t.agent_name or "(no name)" for t in transitions)
    listed = ", ".join(f"{name} {count}" for name, count in agents.most_common())
    findings = [Finding(Level.OK, f"calls of the policy by agent: {listed or 'none'}")]
    if learning.select is not None and not any(learning.select(t) for t in transitions):
        findings.append(
            Finding(Level.ERROR, "the agent selector matches no call", f"choose from: {listed or 'none'}")
        )
    return findings


def _batch(episodes: Sequence[Episode], learning: LearningSettings) -> list[Finding]:
    trainable = [e for e in episodes if e.final_reward is not None]
    if not trainable:
        return []
    try:
        batches = _batches(trainable, learning)
    except AgentLightningError as error:
        return [Finding(Level.ERROR, f"no batch can be made: {error}")]
    findings = [Finding(Level.OK, _described(batch, several=len(batches) > 1)) for batch in batches]
    return findings + _variance(trainable, learning)


def _batches(episodes: Sequence[Episode], learning: LearningSettings) -> list[Batch]:
    """A batch of each policy that was called and may train. Raises NothingToLearn when there is none."""
    batches: list[Batch] = []
    problems: list[NothingToLearn] = []
    called = sorted({t.policy for e in episodes for t in e.transitions})
    for policy in called or [learning.policy]:
        try:
            batches.append(make_batch(episodes, replace(learning, policy=policy)))
        except NothingToLearn as problem:
            problems.append(problem)
    if not batches:
        raise problems[0]
    return batches


def _described(batch: Batch, *, several: bool) -> str:
    merged = 1 - batch.rows / batch.transitions
    return (
        f"batch{f' of policy {batch.policy}' if several else ''}: {batch.transitions} transitions in "
        f"{batch.rows} rows ({merged:.0%} merged), {batch.tokens} tokens instead of {batch.unmerged_tokens}"
    )


def _variance(episodes: Sequence[Episode], learning: LearningSettings) -> list[Finding]:
    mean = sum(e.final_reward or 0.0 for e in episodes) / len(episodes)
    learnable = learnable_groups(episodes, learning)
    mixed, groups = len(learnable.mixed), learnable.groups
    remedy = (
        "put a worked example into the prompt, warm-start with a little supervised fine-tuning, choose "
        "tasks of middling difficulty, or enlarge the group"
    )
    if groups == len(episodes):
        return [Finding(Level.OK, f"mean reward {mean:.3f}; every rollout is its own group (no GRPO yet)")]
    if mixed == 0:
        return [
            Finding(Level.ERROR, f"mean reward {mean:.3f} and no group has a difference: no gradient", remedy)
        ]
    level = Level.OK if mixed * 4 >= groups else Level.WARNING
    what = f"mean reward {mean:.3f}; {mixed} of {groups} groups have a difference to learn from"
    return [Finding(level, what, "" if level is Level.OK else remedy)]


def gather(rollouts: Sequence[Rollout], service: RolloutService, limit: int = 512) -> list[Recorded]:
    """The newest training rollouts with attempts and spans; validation and live ones where there are none."""
    training = [r for r in rollouts if r.mode is Mode.TRAIN] or list(rollouts)
    return [Recorded(r, service.attempts(r.id), service.spans(r.id)) for r in training[-limit:]]
