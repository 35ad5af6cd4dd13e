"""vLLM's side of `sample.py`: run by the interpreter of another environment, where opdkit is not installed.

    PYTHON benchmarks/sample_vllm.py FOLDER CONTEXT THREADS FD

Reads one workload a line (JSON) from standard input and writes seconds, CPU seconds and tokens to the file descriptor:
standard output belongs to vLLM's log. Only `generate` is timed. The prefix cache is emptied before each run, so that
groups share their prompt but runs do not. Left out: multiprocessing, so that CPU time is this process's.
"""

import json
import os
import sys
import time
from typing import Any


def run(llm: Any, work: dict[str, Any]) -> dict[str, float]:
    """Sample one workload."""
    from vllm import SamplingParams

    how = SamplingParams(
        n=work["group"], temperature=1.0, max_tokens=work["new"], ignore_eos=not work["ends"],
        logprobs=work["logprobs"], detokenize=False, top_p=1.0, top_k=0,
    )  # fmt: skip
    llm.reset_prefix_cache()
    wall, cpu = time.perf_counter(), time.process_time()
    found = llm.generate([{"prompt_token_ids": p} for p in work["prompts"]], how, use_tqdm=False)
    spent = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return spent | {"tokens": sum(len(o.token_ids) for r in found for o in r.outputs)}


def main() -> None:
    folder, context, threads, descriptor = sys.argv[1], *map(int, sys.argv[2:5])
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads),
    }  # fmt: skip
    from vllm import LLM

    llm = LLM(model=folder, dtype="float32", enforce_eager=True, max_model_len=context, max_num_seqs=64)
    with os.fdopen(descriptor, "w") as answers:
        print("ready", file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(run(llm, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
