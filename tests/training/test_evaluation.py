"""What ranks tell each other of a step."""

import torch

from llama2tut.training.evaluation import StepLoss
from llama2tut.training.schedule import Turn


def test_ranks_act_on_what_was_asked_when_they_added_up_and_not_on_what_came_later():
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.zeros(2)
    model, step = torch.nn.ParameterList([weight]), StepLoss()
    step.add(torch.tensor(3.0), Turn(rows=[[0]], share=1.0, number=0, tokens=4, done=1, last=True))
    assert step.read([True, False]) == [3.0, 1.0, 0.0]  # alone, nobody else is waited for
    step.add_up(model, [False, False])
    assert step.read([True, False]) == [3.0, 0.0, 0.0]
