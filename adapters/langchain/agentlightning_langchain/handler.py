"""What the user adds: the callback handler, for one run or for the whole process.

Handlers hold no state of runs; all of them write to the process's one recorder, which records each run once
however many handlers see it. LangChain swallows and logs what a handler raises, but each hook is guarded here
too, so that the log says what it means for the recording.
"""

# ruff: noqa: ARG002 (callbacks are called with more than each one needs)
from __future__ import annotations

from typing import Any, Final, cast
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import BaseMessage
from langchain_core.outputs import LLMResult
from langchain_core.tracers.context import register_configure_hook

from agentlightning import openai_sdk
from agentlightning.tracing.guard import guarded
from agentlightning_langchain.recorder import Recorder

_OWNER: Final = "langchain"
_recorder: Final = Recorder()


class LightningCallbackHandler(BaseCallbackHandler):
    """Records what runs under it: pass it in `config={"callbacks": [handler]}`.

    Works for invoke, stream, batch and their async forms, and for agents in several threads at once.
    """

    # Inline, because a context variable set by a hook must reach the very request that follows it.
    run_inline = True
    raise_error = False

    def __init__(self) -> None:
        super().__init__()
        self._last_rollout_id: str | None = None
        openai_sdk.install_if_loaded(_OWNER)

    @property
    def rollout_id(self) -> str | None:
        """The rollout of the last run that started under this handler, for a reward that comes later.

        For an agent that runs by itself it is the live rollout of the run's trace. None before the first run,
        and when nothing is recorded. With several runs at once, give each a handler of its own.
        """
        return self._last_rollout_id

    # Handlers are shared: a copy of a chain or of its config must not copy them.
    def __copy__(self) -> LightningCallbackHandler:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> LightningCallbackHandler:
        return self

    @property
    def ignore_retriever(self) -> bool:
        return True

    @property
    def ignore_retry(self) -> bool:
        return True

    @property
    def ignore_custom_event(self) -> bool:
        return True

    @guarded
    def on_chain_start(self, serialized: Any, inputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self._note(_recorder.chain_started(run_id, serialized, **kwargs))

    @guarded
    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        _recorder.chain_ended(run_id, outputs)

    @guarded
    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        _recorder.chain_failed(run_id, error)

    @guarded
    def on_chat_model_start(
        self, serialized: Any, messages: list[list[BaseMessage]], *, run_id: UUID, **kwargs: Any
    ) -> None:
        openai_sdk.install_if_loaded(_OWNER)
        self._note(_recorder.llm_started(run_id, messages[0], **kwargs))

    @guarded
    def on_llm_start(self, serialized: Any, prompts: list[str], *, run_id: UUID, **kwargs: Any) -> None:
        openai_sdk.install_if_loaded(_OWNER)
        self._note(_recorder.llm_started(run_id, prompts, **kwargs))

    @guarded
    def on_llm_new_token(self, token: Any, *, run_id: UUID, **kwargs: Any) -> None:
        _recorder.token_arrived(run_id)

    @guarded
    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> None:
        _recorder.llm_ended(run_id, response)

    @guarded
    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        _recorder.failed(run_id, error)

    @guarded
    def on_tool_start(self, serialized: Any, input_str: str, *, run_id: UUID, **kwargs: Any) -> None:
        self._note(_recorder.tool_started(run_id, serialized, input_str, **kwargs))

    @guarded
    def on_tool_end(self, output: Any, *, run_id: UUID, **kwargs: Any) -> None:
        _recorder.tool_ended(run_id, output)

    @guarded
    def on_tool_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        _recorder.tool_failed(run_id, error)

    def _note(self, rollout_id: str | None) -> None:
        if rollout_id is not None:
            self._last_rollout_id = rollout_id


class _Switch:
    """Stands in for the context variable of LangChain's global hook, which cannot be unregistered.

    Unlike a context variable it is seen in every thread.
    """

    def __init__(self) -> None:
        self.handler: LightningCallbackHandler | None = None
        self.registered = False

    def get(self) -> LightningCallbackHandler | None:
        return self.handler


_switch: Final = _Switch()


def instrument() -> LightningCallbackHandler:
    """Record every LangChain run of this process from now on; returns the handler that does.

    Runs that are given a handler of their own stay with it. Calling it again changes nothing.
    """
    if _switch.handler is None:
        _switch.handler = LightningCallbackHandler()
    if not _switch.registered:
        register_configure_hook(cast("Any", _switch), inheritable=True, handle_class=LightningCallbackHandler)
        _switch.registered = True
    return _switch.handler


def uninstrument() -> None:
    """Take it back."""
    _switch.handler = None
    openai_sdk.uninstall(_OWNER)
