"""Answers the benchmark's requests with vLLM, in a Python of its own that has it; `benchmarks.engine --vllm` starts it.

Reads a line of JSON from stdin for each run, [[prompt ids, new tokens], ...], and writes a line when all are answered.
"""

import json
import os
import sys


def main() -> None:
    folder, dtype, rows, compiled = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "compiled"
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's own lines go to stderr
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    llm = LLM(
        model=folder,
        dtype=dtype,
        max_num_seqs=rows,
        max_model_len=4096,
        enforce_eager=not compiled,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        requests = json.loads(line)
        llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in requests],
            [SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False) for _, new in requests],
            use_tqdm=False,
        )
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    main()
