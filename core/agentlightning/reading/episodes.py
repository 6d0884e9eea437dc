"""Spans of one attempt -> `Episode`: the policy's own calls in call order, with the rewards that were given.

No rewards are invented here (AIR does that) and none are spread (credit assignment does that). A call of the
policy that cannot be trained on is named in `Episode.untrainable`, never trained on silently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agentlightning.errors import InvalidInput
from agentlightning.reading.join import JoinedCalls, join_calls
from agentlightning.reading.requests import with_requests
from agentlightning.reading.views import read_trace
from agentlightning.types import Attempt, Episode, LLMCall, Reward, Rollout, Span, Transition

FINAL = "reward"


def read_episode(
    rollout: Rollout,
    attempt: Attempt,
    spans: Sequence[Span],
    *,
    reward_weights: Mapping[str, float] | None = None,
) -> Episode:
    """Read one attempt.

    `reward_weights` combines named reward dimensions into the final reward; without it the dimension called
    "reward" is the final one, or the only one there is. The last reward given under a name counts.
    Raises InvalidInput when several dimensions exist, none is called "reward", and no weights are given.
    """
    trace = read_trace([span for span in spans if span.attempt_id in (None, attempt.id)])
    joined = join_calls(trace)
    final = [reward for reward in trace.rewards if reward.target is None]
    targeted = [reward for reward in trace.rewards if reward.target is not None]
    named = {reward.name: reward.value for reward in sorted(final, key=lambda r: r.time_ns)}
    transitions, problems = _transitions(joined, targeted)
    return Episode(
        rollout_id=rollout.id,
        attempt_id=attempt.id,
        group_id=rollout.group_id,
        task_id=rollout.task.id if rollout.task else None,
        transitions=transitions,
        final_reward=_final_reward(named, reward_weights),
        rewards=named,
        calls=joined.calls,
        tool_calls=with_requests(trace.tool_calls, joined.calls),
        agent_runs=trace.agent_runs,
        untrainable=problems,
    )


def _final_reward(named: Mapping[str, float], weights: Mapping[str, float] | None) -> float | None:
    if not named:
        return None
    if weights is not None:
        present = {name: weight for name, weight in weights.items() if name in named}
        return sum(weight * named[name] for name, weight in present.items()) if present else None
    if FINAL in named:
        return named[FINAL]
    if len(named) == 1:
        return next(iter(named.values()))
    raise InvalidInput(
        f"several reward dimensions ({', '.join(sorted(named))}) and none is called '{FINAL}': "
        f"name one of them '{FINAL}', or pass reward_weights, e.g. {{'correctness': 1.0, 'format': 0.1}}"
    )


def _transitions(joined: JoinedCalls, targeted: Sequence[Reward]) -> tuple[list[Transition], list[str]]:
    transitions: list[Transition] = []
    problems = [f"call {call.span_id}: its answer never reached the agent" for call in joined.unseen]
    targets = {reward.target for reward in targeted}
    for call in joined.calls:
        own = {call.span_id, call.gateway_span_id}
        given = sum(reward.value for reward in targeted if reward.target in own)
        made = _transition(call, given)
        if isinstance(made, Transition):
            targets -= own
            transitions.append(made)
        elif made is not None:
            problems.append(f"call {call.span_id}: {made}")
    problems += [f"a reward targets span {target}, which is no call of the policy" for target in targets]
    return transitions, problems


def _transition(call: LLMCall, reward: float) -> Transition | str | None:
    """The transition of a call, a sentence why it cannot be one, or None for a call of another model."""
    if call.policy is None:
        return None
    if call.prompt_ids is None or call.response_ids is None or call.logprobs is None:
        return None if call.error else "its gateway span has no token ids"
    if len(call.response_ids) == 0:
        return "the policy sampled no token"
    if len(call.response_ids) != len(call.logprobs):
        return f"{len(call.response_ids)} response tokens but {len(call.logprobs)} logprobs"
    if call.policy_version is None:
        return "its policy version is not recorded"
    return Transition(
        span_id=call.span_id,
        prompt_ids=call.prompt_ids,
        response_ids=call.response_ids,
        logprobs=call.logprobs,
        messages=call.messages,
        output=call.output,
        agent_name=call.agent_name,
        policy=call.policy,
        policy_version=call.policy_version,
        temperature=call.temperature,
        reward=reward,
        node_path=call.node_path,
        finish_reason=call.finish_reason,
    )
