"""Writes the generated parts of the README: the table of methods. Run by `make docs`; a test checks that it is current."""

import sys
from pathlib import Path

from opdkit.catalogue import build_method, method_table
from opdkit.losses import CrossEntropy, Divergence, PolicyGradient, SupportPolicyGradient
from opdkit.support import Full, TopK

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- methods:begin (make docs) -->", "<!-- methods:end -->"
LOSSES = {
    PolicyGradient: "policy gradient",
    SupportPolicyGradient: "support policy gradient",
    Divergence: "divergence",
    CrossEntropy: "cross-entropy",
}


def row(name: str, line: str, paper: str) -> str:
    method = build_method(name, {})
    supports = [view.support for view in method.views.values()]
    support = "full" if any(isinstance(s, Full) for s in supports) else "sampled" if supports else "none"
    support = f"top-{supports[0].k}" if supports and isinstance(supports[0], TopK) else support
    losses = ", ".join(dict.fromkeys(LOSSES[type(term.loss)] for term in method.terms))
    link = f"[{paper.removeprefix('arXiv:')}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})"
    return f"| `{name}` | {line} | {support} | {losses} | {link} |"


def table() -> str:
    head = "| method | what it does | default support | loss | paper |\n|---|---|---|---|---|"
    return "\n".join([head, *(row(*entry) for entry in method_table())])


def current(text: str) -> str:
    """The README with its generated parts as they should be."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    text = README.read_text()
    if "--check" in sys.argv:
        sys.exit("README.md is out of date: run make docs" if current(text) != text else 0)
    README.write_text(current(text))
