"""A teacher's responses: sampled once per prompt and kept on disk, so that later steps, epochs and runs find them.

One JSONL file per (teacher's weights, sampling settings, seed) in the cache folder. Every response is one line that one
write appends: several processes may append at once, and a killed writer leaves at most one broken line, which is
passed over. Left out: several responses per prompt, and teachers in other processes.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from opdkit.errors import RunError
from opdkit.models import LanguageModel, cache_folder
from opdkit.rollouts.sampler import Sampling, prompt_keys, sample

PROBED = 1024  # numbers of every parameter that tell one model from another


@dataclass(frozen=True)
class Response:
    """One kept response. `ids` includes the EOS token where the model wrote one."""

    ids: tuple[int, ...]
    text: str
    finish: str  # "stop" (EOS), "stop_string" or "length"


class ResponseStore:
    """The responses in one file, by prompt. Raises RunError where the file cannot be read or written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Response] = {}
        try:
            lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        except OSError as error:
            raise self._unusable(error) from error
        self._broken_end = lines[-1] != b""  # a writer was killed, or is at work now: no harm in one more line end
        for line in lines:
            try:
                row = json.loads(line)
                response = Response(tuple(row["ids"]), row["text"], row["finish"])
            except (ValueError, KeyError, TypeError):  # broken or empty: as if it were not there
                continue
            self.found.setdefault(row["prompt"], response)

    def get(self, prompt: Sequence[int]) -> Response | None:
        return self.found.get(_name(prompt))

    def add(self, prompt: Sequence[int], response: Response) -> None:
        """Append one response; another process may have added one for the same prompt, which then stands."""
        name = _name(prompt)
        row = {"prompt": name, "ids": list(response.ids), "text": response.text, "finish": response.finish}
        line = b"\n" * self._broken_end + json.dumps(row).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                written = os.write(file, line)
            finally:
                os.close(file)
        except OSError as error:
            raise self._unusable(error) from error
        if written < len(line):
            raise self._unusable(OSError("the disk is full"))
        self._broken_end = False
        self.found.setdefault(name, response)

    def _unusable(self, error: OSError) -> RunError:
        return RunError(
            f"teacher responses cannot be kept in {self.path}: {error}; set OPDKIT_CACHE to a folder with room that "
            "can be written"
        )


def _name(prompt: Sequence[int]) -> str:
    return hashlib.blake2b(json.dumps(list(prompt)).encode(), digest_size=16).hexdigest()


def open_store(teacher: LanguageModel, how: Sampling, seed: int) -> ResponseStore:
    """The store of this teacher under these settings and this seed; `group` and `max_rows` do not matter."""
    settings = [how.max_new_tokens, how.temperature, how.top_p, how.top_k, how.stop, how.eos_ids, seed]
    text = json.dumps([fingerprint(teacher), teacher.vocab, settings])
    key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return ResponseStore(cache_folder() / "responses" / f"{key}.jsonl")


def fingerprint(lm: LanguageModel) -> str:
    """A hash of names, shapes and PROBED evenly spaced numbers of every parameter.

    It needs no files, so it also knows Hub models and a teacher that is the student's frozen base: of a model with
    trained and frozen parameters it reads the frozen ones.
    """
    named = list(lm.model.named_parameters())
    digest = hashlib.blake2b(digest_size=16)
    for name, p in [(n, p) for n, p in named if not p.requires_grad] or named:
        numbers = p.detach().reshape(-1)
        numbers = numbers[:: max(1, numbers.numel() // PROBED)][:PROBED].contiguous().cpu()
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}".encode() + numbers.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def respond(
    teacher: LanguageModel, prompts: Sequence[Sequence[int]], how: Sampling, seed: int, store: ResponseStore
) -> list[Response]:
    """The teacher's response to every prompt: from the store, else sampled and added to it.

    A response depends on (teacher, how, seed, prompt) alone, not on the step that asks first.
    """
    missing = list(dict.fromkeys(tuple(p) for p in prompts if store.get(p) is None))
    for start in range(0, len(missing), how.max_rows):  # what is finished stays, should a later wave be killed
        part = missing[start : start + how.max_rows]
        keys = [key for p in part for key in prompt_keys([p], seed)]
        for prompt, (s,) in zip(part, sample(teacher, part, how, seed, keys=keys), strict=True):
            store.add(prompt, Response(s.ids, s.text, s.finish))
    found = [store.get(p) for p in prompts]
    return [r for r in found if r is not None]
