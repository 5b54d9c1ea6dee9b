"""fastnorm.fuse on torch.export's graphs of all the forms of test_fuse.py: what is fused, values, gradients, and back.

An exported graph holds aten's operators in the order of their calls: which name a value has had, who kept it and which
function of the model made the call is no longer seen, and so forms are fused that the text of a method leaves.
"""

from __future__ import annotations

import copy

import pytest
import torch

import fastnorm
from tests.test_fuse import LEFT, ONE, form, fused, refusals
from tests.test_fuse_graph import operations, results_of

#: What torch.export refuses: ways that depend on data, and a write into an input that wants a gradient.
NOT_EXPORTED = ("if x.sum()", "if r.sum()", "r += self.norm(x)", "r += y if i else x")

#: Forms that are fused in another number of places than in the text.
OTHERWISE = {
    "for _ in range(2):\n    x = F.relu(self.norm(self.conv(x)))\nreturn x + r": ["relu", "relu"],
    "y = self.norm(x)\ny.add_(r).relu_()\nreturn y": ["add + relu"],
    "y = self.norm(x)\nz = y\nz.add_(r)\nreturn z + y": ["add"],
    "y = self.norm(x)\ny = y if r is None else F.relu(y)\nreturn y": ["relu"],
    "y = self.norm(x)\nlater = lambda: F.relu(y)\nreturn later() + r": ["relu"],
    "return F.relu(self.norm(x)) + F.silu(self.norm(r))": ["relu", "silu"],
    "return F.relu(self.norm(x)) + self.norm(r)": ["relu", "add"],
    "return getattr(self, 'no' + 'rm')(x).relu() + r": ["relu"],
    "n = self.norm\nreturn n(x).relu() + r": ["relu"],
    "for layer in self.layers:\n    x = layer(x)\nreturn x + r": ["relu"],
    "y = self.norm(self.conv(x))\nr = self.half(r)\ny += r\nreturn y": ["add"],
    "self.kept = self.norm(x)\nreturn F.relu(self.kept) + r": ["relu"],
    "y = [self.norm(x)]\nreturn F.relu(y[0]) + r": ["relu"],
    "try:\n    y = self.norm(x)\n    y = F.relu(y)\nexcept ValueError:\n    r = y\nreturn r": ["relu"],
    "y = self.norm.__call__(x)\nreturn F.relu(y) + self.norm(r)": ["relu", "add"],
    "y = self.norm(x)\nself.relu.inplace = False\ny = self.relu(y)\nreturn y + r": ["relu"],
    "y = self.norm(x)\nself.relu = nn.SiLU()\ny = self.relu(y)\nreturn y + r": ["silu"],
    "y = self.norm(x)\ntorch.set_grad_enabled(True)\ny = F.relu(y)\nreturn y + r": ["relu"],
    "y = self.norm(x)\nlocals()\nreturn F.relu(y) + r": ["relu"],
    "y = self.norm(x)\ndef f():\n    return self.norm(r)\nreturn F.relu(y) + f()": ["relu", "add"],
}
EXPECTED = {text: [expected] for text, expected in ONE.items()} | {text: [] for text in LEFT} | OTHERWISE
EXPORTED = [text for text in EXPECTED if not any(part in text for part in NOT_EXPORTED)]


def test_the_tables_fit() -> None:
    """A form that is written anew in test_fuse.py is none of these tables' any more."""
    assert OTHERWISE.keys() <= ONE.keys() | LEFT.keys()
    assert len(EXPORTED) == len(ONE) + len(LEFT) - 5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("text", EXPORTED)
def test_exported_forms(text: str, training: bool) -> None:
    torch.set_default_dtype(torch.float64)
    native = form(text).train(training)
    torch.nn.init.normal_(native.norm.weight, 1, 0.3)
    torch.nn.init.normal_(native.norm.bias, 0, 0.3)
    x, r = torch.randn(2, 2, 4, 5, 5)
    exported = torch.export.export(copy.deepcopy(native), (x, r)).module()
    assert isinstance(exported, torch.fx.GraphModule)
    before = operations(exported)
    fastnorm.fuse(exported)
    assert list(fused(exported).values()) == EXPECTED[text], refusals(exported)
    for _ in range(2):  # running statistics move between the calls
        torch.testing.assert_close(results_of(exported, x, r), results_of(native, x, r))
    fastnorm.revert(exported)
    assert operations(exported) == before
    torch.testing.assert_close(results_of(exported, x, r), results_of(native, x, r))
