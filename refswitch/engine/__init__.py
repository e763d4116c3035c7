# May import: nothing.
"""The engine: switch, block, model and step for a backend (who computes) and a world (which ranks).

What a trainer calls, in `step`:

    setup = Setup(config, precision("float32"), Optimizer("adafactor"), seed)      frozen; microbatches, recompute, smoothing are in it
    backend = registry.backend("cpu")                                             or "reference"
    check(setup, backend)                                                         InputError that names what is not computed
    state = initial_state(params, setup, backend)                                 TrainState(step, params, optimizer); copies
    state, told = train_step(state, batch, setup, learning_rate, backend)         the state that goes in is used up
    told.losses.cross_entropy, told.gradient_norm, told.layers[0].dropped         StepMetrics
    evaluate(state.params, batch, setup, step, backend)                           Evaluation: sums, to be added over batches
    state_arrays(state), state_from(arrays, like)                                 to a file and back, to the same bits

`decoding.generate` yields the tokens of answers as they come. `step.loss_and_gradients` is the part of a step before the update;
`model.model_forward` and `model_backward` are the pass itself, under an explicit noise, with the reference's records for parameters, batch, outputs
and losses. A step whose objective is no number raises `NonFiniteError` with the first place that holds none, and leaves the state as it was.

Randomness is by address: a step draws what (seed, step, layer and purpose, position in the batch) say, so a run goes on from (parameters, optimizer
state, step) as if it had not stopped. Arrays that a backend returns may be overwritten from the next step on.

Reading order: noise, switch, block, model, metrics, optimizer, step, decoding.
"""
