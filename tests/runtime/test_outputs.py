"""The tensor of an output that scores and corrections compare."""

import torch
from torch import nn

from vitprune.runtime.outputs import answer, main_tensor, return_logits, returning_logits


def test_the_first_tensor_of_a_tuple_answers() -> None:
    logits, tokens = torch.zeros(2, 3), torch.zeros(2, 5, 4)
    assert main_tensor((logits, tokens)) is logits
    assert main_tensor((None, tokens)) is tokens
    assert main_tensor({"tokens": tokens, "logits": logits}) is logits
    pyramid = [tokens, logits]
    assert main_tensor(pyramid) is pyramid  # no level of a pyramid stands for the others


def test_a_model_that_returns_logits_already_does_so_after_the_context() -> None:
    always, once = return_logits(nn.Identity()), nn.Identity()
    with returning_logits(always, once):
        assert [list(model._forward_hooks.values()) for model in (always, once)] == [[answer], [answer]]
    assert [list(model._forward_hooks.values()) for model in (always, once)] == [[answer], []]
