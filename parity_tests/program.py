"""A program for `alibi conformance --command`: serves "module:factory" by lines of JSON.

What an implementation in another language has to write; it knows nothing of the kit but README.md.
"""

import importlib
import json
import sys

import numpy as np
from safetensors.numpy import load_file, save_file

RESULTS = {  # of functions that return one array
    "biased_logits": "biased_logits",
    "attention": "attention",
    "decode": "logits",
    "uniforms": "uniforms",
}
FUNCTIONS = (*RESULTS, "forward", "gradients", "train_step", "sample", "to_flax")


def answer(implementation, request):
    if request["call"] == "describe":
        offered = [name for name in FUNCTIONS if hasattr(implementation, name)]
        return {"name": f"{implementation.name} in a program", "functions": offered}
    arguments = dict(request["options"])
    for path, array in load_file(request["inputs"]).items():
        name, _, entry = path.partition("/")
        if entry:
            arguments.setdefault(name, {})[entry] = array
        else:
            arguments[name] = array
    try:
        found = getattr(implementation, request["call"])(**arguments)
    except NotImplementedError as refusal:
        return {"refused": str(refusal)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    if request["call"] in RESULTS:
        found = {RESULTS[request["call"]]: found}
    save_file(
        {name: np.array(array, order="C") for name, array in found.items()}, request["outputs"]
    )
    return {"ok": True}


if __name__ == "__main__":
    module, _, factory = sys.argv[1].partition(":")
    implementation = getattr(importlib.import_module(module), factory)()
    for line in sys.stdin:
        print(json.dumps(answer(implementation, json.loads(line))), flush=True)
