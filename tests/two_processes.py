"""Run by a launcher in every process of tests/test_processes.py: trains the recipes of a file, one after the other."""

import json
import os
import sys
from pathlib import Path

from opdkit.config import parse_recipe
from opdkit.errors import OpdkitError
from opdkit.train.loop import train

rank = os.environ["RANK"]
for number, entry in enumerate(json.loads(Path(sys.argv[1]).read_text())):
    data = entry["recipe"] | entry.get(f"rank{rank}", {})  # one process may be given something else
    os.chdir(entry.get(f"cwd{rank}", os.getcwd()))  # as if the file systems of two machines differed
    try:
        train(parse_recipe(data), resume=entry.get("resume", False))
    except OpdkitError as error:
        Path(f"{sys.argv[1]}.error-{number}-{rank}").write_text(f"{type(error).__name__}: {error}")
