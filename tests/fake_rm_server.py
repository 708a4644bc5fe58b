"""A scoring server without a model: `python fake_rm_server.py FOLDER '{"port": 0, ...}'`.

A text's score is a hash of it. Each batch is a line of FOLDER/batches.jsonl. Some answers make the scorer misbehave;
`gate` makes it wait until FOLDER/gate is gone.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

from lwzlib.endpoints import rm_server


def expected(text):
    return int.from_bytes(hashlib.sha256("\0".join(text).encode()).digest()[:6]) / 2**48


def main(folder, port=0, identity="rm-a", delay_s=0.0, grace_s=5.0, **limits):
    def score(texts):
        answers = [answer for _, answer in texts]
        with (folder / "batches.jsonl").open("a") as file:
            file.write(json.dumps(answers) + "\n")
        while "gate" in answers and (folder / "gate").exists():
            time.sleep(0.01)
        time.sleep(delay_s)
        if "raise" in answers:
            raise RuntimeError("boom")
        if "stop" in answers:
            raise StopIteration
        scores = [float(text[1]) if text[1] in ("nan", "inf") else expected(text) for text in texts]
        return scores[1:] if "too few" in answers else scores

    def count_tokens(texts):
        if any(answer == "uncountable" for _, answer in texts):
            raise RuntimeError("cannot count")
        return [len(f"{prompt} {answer}".split()) for prompt, answer in texts]

    settings = {"max_tokens": 20_000, "batch_texts": 16, "queue_texts": 64} | limits
    application = rm_server.app(score, count_tokens=count_tokens, identity=identity, **settings)
    rm_server.serve(application, port=port, grace_s=grace_s)


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
