"""vLLM's side of ``benchmarks/rollouts.py``; it runs in an environment of its own and so imports nothing of ours.

It reads one JSON request per line from standard input, and answers each with a line ``TOKENS n`` on standard output.
"""

import json
import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, longest = sys.argv[1:]
    model = LLM(model=folder, dtype="bfloat16", max_model_len=int(longest) + 16, max_num_seqs=64)
    for line in sys.stdin:
        request = json.loads(line)
        tokens = 0
        if request:
            settings = SamplingParams(
                n=request["n"],
                temperature=1.0,
                min_tokens=request["tokens"],
                max_tokens=request["tokens"],
                ignore_eos=True,
                detokenize=False,
            )
            prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
            outputs = model.generate(prompts, settings, use_tqdm=False)
            tokens = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
        print("TOKENS", tokens, flush=True)
