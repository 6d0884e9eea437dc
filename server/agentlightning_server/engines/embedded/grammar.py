"""Keeps a completion within a grammar: which tokens may come next, by the library llguidance.

Not here: where grammars come from (`gateway.grammars`). Invariant: once a grammar is satisfied and cannot go
on, only tokens that end the turn are allowed, so a completion that was not cut off satisfies it.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import threading
from collections import OrderedDict
from functools import cached_property

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from agentlightning.errors import InvalidInput

KEPT = 64  # compiled grammars; agents ask with the same few schemas again and again
MAX_GRAMMAR = 200_000  # characters; the compiler takes about a second for a schema of that size


class Matcher:
    """One completion's place in its grammar. Not thread-safe."""

    def __init__(self, inner: LLMatcher, vocabulary: int) -> None:
        self._inner = inner
        self._vocabulary = vocabulary

    def allowed(self) -> Tensor:
        """The tokens that may come next: bool [V], never all False."""
        bits = np.frombuffer(self._inner.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(bits, count=self._vocabulary, bitorder="little").view(np.bool_))

    def accept(self, token: int) -> None:
        """Go on by a token that was allowed."""
        self._inner.consume_token(token)


class Grammars:
    """Makes matchers for one tokenizer. Preparing the tokenizer takes a second, at the first grammar."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._eos_ids = sorted(eos_ids)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    @cached_property
    def _prepared(self) -> LLTokenizer:
        return from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=self._eos_ids)  # pyright: ignore[reportArgumentType]

    def matcher(self, grammar: str) -> Matcher:
        """A matcher at the start of a Lark grammar. Blocks while it is compiled, once for equal grammars.

        Raises InvalidInput when it cannot be read.
        """
        if len(grammar) > MAX_GRAMMAR:
            raise InvalidInput(
                f"the JSON schemas of the answer and of the tools have {len(grammar)} characters, of at most "
                f"{MAX_GRAMMAR}: ask for less at once"
            )
        with self._lock:  # so that the choices of one request compile it once
            compiled = self._compiled.get(grammar)
            if compiled is None:
                compiled = LLMatcher(self._prepared, LLMatcher.grammar_from_lark(grammar), log_level=0)
                self._compiled[grammar] = compiled
                if len(self._compiled) > KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            inner = compiled.deep_copy()
        if inner.is_error():
            raise InvalidInput(
                f"the JSON schema of the response format or of a tool cannot be followed: {inner.get_error()}"
            )
        return Matcher(inner, self._vocabulary)
