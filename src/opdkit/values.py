"""How the engine's values print: only the fields that differ from their defaults."""

import dataclasses


class Value:
    """Base of frozen dataclasses declared with repr=False: `TopK(k=8)`, not `TopK(k=8, of='student')`."""

    def __repr__(self) -> str:
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if f.default is dataclasses.MISSING or getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"
