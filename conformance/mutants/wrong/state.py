# May import: numpy, the standard library, the subject's files and record.
"""Mutants that remember a call, or write to what they were given.

The first call is right. What is overwritten counts as seen from outside: the runner hands out copies and reports those that changed.
"""

import numpy as np

from ..record import Changed, mutant

# inputs


@mutant("S-STATE-1", "state", "layer", "noise", "RNG02 huggingface/transformers#33969")
def noise_written_into_x(layer):
    """The noise is multiplied into the caller's x, so that the experts see it too."""

    def call(case):
        if case.get("noise") is not None:
            case["x"][...] *= case["noise"]
        return layer(Changed(case, noise=None))

    return call


@mutant("S-STATE-1", "state", "layer", "padding that holds values")
def padding_zeroed_in_place(layer):
    """The caller's padding is zeroed."""

    def call(case):
        if case.get("valid") is not None:
            case["x"][~case["valid"]] = 0
        return layer(case)

    return call


@mutant("S-STATE-1", "state", "layer", "dout, overflow or padding", "EDG10 lucidrains/mixture-of-experts@04201ee")
def dout_masked_in_place(layer):
    """The caller's dout is cleared where the output is 0."""

    def call(case):
        results = layer(case)
        if case.get("dout") is not None:
            case["dout"][results["out"] == 0] = 0
        return results

    return call


# what is kept from call to call


@mutant("S-STATE-2", "state", "layer", "a call with another capacity, overflow")
def capacity_of_first_call(layer):
    """The capacity is cached at the first call."""
    first = []

    def call(case):
        first.append(case["capacity"])
        return layer(Changed(case, capacity=first[0]))

    return call


@mutant(
    "S-STATE-2",
    "state",
    "layer",
    "two calls of the same shapes with different weights",
    "COM07 vllm-project/vllm-ascend#10942 (cache key too narrow)",
)
def router_cached_by_shape(layer):
    """The router's weights are prepared once for each shape."""
    prepared = {}

    def call(case):
        w_DE = case["w_router"]
        return layer(Changed(case, w_router=prepared.setdefault(w_DE.shape, w_DE.copy())))

    return call


@mutant("S-STATE-2", "state", "layer", "two calls", "AUX16 NVIDIA/Megatron-LM@e6d56d6828")
def aux_loss_accumulates(layer):
    """The aux loss is added to that of the calls before."""
    total = [0]

    def call(case):
        results = layer(case)
        total[0] = total[0] + results["aux_loss"]
        return results | {"aux_loss": np.asarray(total[0], results["aux_loss"].dtype)}

    return call


@mutant("S-STATE-2", "state", "layer", "two calls of the same shapes, dout", "AUX16 (its gradient), megablocks databricks/megablocks#69")
def router_gradient_accumulates(layer):
    """dw_router is added to a buffer that nobody clears."""
    buffers = {}

    def call(case):
        results = layer(case)
        if "dw_router" not in results:
            return results
        shape = results["dw_router"].shape
        buffers[shape] = buffers.get(shape, 0) + results["dw_router"]
        return results | {"dw_router": buffers[shape].copy()}

    return call


@mutant(
    "S-STATE-2",
    "state",
    "layer",
    "two calls of the same shapes, the second with a row of zeros where the first has none (overflow)",
    "DIS14 NVIDIA/TransformerEngine#2547, EDG02 pytorch/torchtitan#1237",
)
def dropped_rows_are_stale(layer):
    """The output's buffer is used again and rows without an expert are not cleared."""
    buffers = {}

    def call(case):
        results = layer(case)
        out_GSD = buffers.setdefault(results["out"].shape, np.zeros_like(results["out"]))
        written_GS = results["out"].any(-1)
        out_GSD[written_GS] = results["out"][written_GS]
        return results | {"out": out_GSD.copy()}

    return call


@mutant("S-STATE-2", "state", "layer", "two calls of the same shapes, dout", "GRD12 laekov/fastmoe@6c68b56")
def weight_gradients_from_stale_x(layer):
    """The buffer of x that dw_in needs is filled at the first call of a shape only."""
    saved = {}

    def call(case):
        first_x_GSD = saved.setdefault((case["x"].shape, case["w_in"].shape), case["x"].copy())
        results = layer(case)
        if "dw_in" not in results:
            return results
        return results | {"dw_in": layer(Changed(case, x=first_x_GSD))["dw_in"]}

    return call


@mutant("S-STATE-2", "state", "layer", "three calls, exact or not", "RTE15 pytorch/pytorch#196177 (a race, made regular)")
def every_third_call_differs(layer):
    """Every third call loses the last token's row."""
    calls = [0]

    def call(case):
        results = layer(case)
        calls[0] += 1
        if calls[0] % 3 == 0 and results["out"].shape[1]:
            results["out"] = results["out"].copy()
            results["out"][:, -1] = 0
        return results

    return call
