"""Write docs/benchmarks.md from the measurements in bench/*.json.

    python -m bench.benchmarks_page

The make targets of the measurements end with this.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import overhead, recipes
from bench.measurement import DATASET
from pipeline.errors import UserError, run_command
from pipeline.model.cnn import Architecture, parameter_count

BENCH, PAGE = Path("bench"), Path("docs/benchmarks.md")
NAMES = {
    "Keras": "Keras 3.15 on TensorFlow 2.21, `model.fit`",
    "convtrack, float32": "**convtrack**, float32",
    "DataLoader loop": "PyTorch, torchvision data set and `DataLoader`",
    "convtrack, bfloat16": "**convtrack**, bfloat16",
    "DataLoader loop, 2 workers": "PyTorch, `DataLoader` with 2 workers",
    "Lightning": "PyTorch Lightning 2.6, `Trainer.fit`",
}
Row = Sequence[str]


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())


def page() -> str:
    """The whole of docs/benchmarks.md."""
    return f"""# Benchmarks

The make targets below write this page from `bench/*.json`: do not edit it by hand. A figure with ± is a mean and a
standard deviation over n seeds. Repeated timings are given as a median, with minimum and maximum.

{_results()}
{_speed()}
{_short_recipes()}
{_tuning()}
{_overhead()}
{_pooling()}"""


def _results() -> str:
    measured = _read("seeds")
    accuracies = [row["test_accuracy"] for row in measured["rows"]]
    ours, loss = (_mean(measured["summary"][name]) for name in ("test_accuracy", "test_loss"))
    keras = "the same network and recipe in Keras, [as published](https://keras.io/examples/vision/mnist_convnet/)"
    rows = [
        ("convtrack, `make seeds`", ours, loss, str(len(accuracies))),
        (keras, "0.9923", "0.0234", "1"),
    ]
    return f"""## Accuracy

The recipe of `params.yaml` on MNIST: 54,000 training, 6,000 validation and 10,000 test images.

{_table(("", "test accuracy", "test loss", "n"), rows)}

One run says little: the seeds lie between {min(accuracies):.4f} and {max(accuracies):.4f}, and with 10,000 test images
the sampling error of a single accuracy near 99.2 % is 0.09 points.

{_origin(measured)}
"""


def _speed() -> str:
    measured = _read("results")
    turns: dict[str, list[dict[str, Any]]] = measured["turns"]
    by_speed = sorted(turns, key=lambda name: statistics.median(_seconds(turns[name])))
    rows = [(NAMES[name], _spread(_seconds(turns[name])), _memory(turns[name])) for name in by_speed]
    of_rounds = [
        statistics.median(b["seconds"]) / statistics.median(f["seconds"])
        for b, f in zip(turns["convtrack, bfloat16"], turns["convtrack, float32"], strict=True)
    ]
    peak = statistics.median(measured["float32_peak_gflops"])
    second = statistics.median(_seconds(turns["convtrack, float32"]))
    every, needed = measured["gflop_an_epoch"].values()
    return f"""## Speed of the training

{_table(("one epoch with its validation pass", "seconds: median (min ... max)", "peak memory"), rows)}

![Seconds for one epoch, as bars](speed.png)

`make bench-training` runs them in turn: three rounds of two epochs each, after one to warm up. All do the same work,
54,000 training images in batches of 128 and the 6,000 validation images; Keras has an environment of its own. In
bfloat16 an epoch took {min(of_rounds):.2f} to {max(of_rounds):.2f} times as long as in float32. The memory is that of
the largest process. `make bench-training ARGS=--quick` measures the epochs alone, in three minutes.

Lightning and the `DataLoader` loops run with glibc set to keep freed memory (`MALLOC_TRIM_THRESHOLD_`). By default it
returns the memory to the system at every step, and Lightning took 12.8 s instead of 10.0 s (two runs each).

The measurement fails if a figure misses one of these bounds:

{_bounds(measured)}

Ratios and shares are computed within each round. The time of a whole process includes loading the libraries and the
images; its loops were compiled by an earlier run. MLflow's share is the time that it adds to a short stage on the
packaged images (fifteen pairs), relative to a whole stage.

The float32 peak is what the machine sustains for half a second in the fastest matrix product or convolution:
{peak:.0f} GFLOP/s. Counting all gradients, an epoch has {every:.0f} GFLOP, {100 * every / second / peak:.0f} % of that
peak; counting only gradients that are not zero, {needed:.0f} GFLOP, {100 * needed / second / peak:.0f} %.

{_origin(measured)}

### Where the time is saved

- **The images are one tensor of bytes.** A batch is a list of row numbers: no queue, no worker processes.
- **Pixels that cannot reach a logit are skipped.** Pooling drops rows and columns that do not fill a window: of each
  28 x 28 image the network sees 26 x 26.
- **The operations of a block are fused.** In the first block, convolution, pooling and ReLU are one loop that reads
  bytes and writes pooled maps; in other blocks pooling and ReLU are fused. The loops are
  [compiled by Numba](../pipeline/model/cpu_kernels.py) once, in a few seconds, and cached.
- **Convolutions by 3 x 3 filters take less than half the multiplications**: 16 instead of 36 per channel for four
  outputs ([Winograd](../pipeline/model/winograd.py)), in float32 with at least 32 channels and filters; with batch
  normalisation the gradients too. The figures of 24 November 2026 were measured with an earlier form of it.
- **Zero gradients are skipped.** In each pooling window only the argmax has a gradient; with ReLU and dropout, more
  than nine in ten outputs of the second convolution have gradient zero.
- **Dropout and the dense layer are fused** into one loop each for the forward and the backward pass.
- **Threads split the batch, not each operation**, into chunks of 64 images. With batches of 128 or more, one thread and
  two give the same bits.

A test compares logits and gradients with those of the plain network in float64: within 1e-5 in float32. In bfloat16 the
logits are within 1e-2. Rounding can change which value of a window is the largest, so in bfloat16 the
gradients are compared, within 1e-2, with those of a network that rounds at the same places.

With batch normalisation the threads tell each other the sums of their chunks, so that the mean and the variance are
those of the whole batch, and one loop normalises, applies ReLU and pools. Chunks of larger images are smaller, so that
a layer's output has at most 8 MB. A GPU
always uses PyTorch's operations, with the images and the whole loop on the device; it has not been timed.
"""


def _short_recipes() -> str:
    studies, candidates, whole = _read("results")["studies"], _read("candidates"), _read("results")["whole_processes"]
    default = _read("seeds")["summary"]["test_loss"]["mean"]
    parts = []
    for name, overrides, count in (("short", recipes.SHORT, 10), ("shortest", recipes.SHORTEST, 30)):
        epochs = overrides["train.epochs"]
        chosen = candidates[f"{epochs} epochs"]
        best = chosen["decided"][0]
        decided = _mean({"mean": best["validation_accuracy"], "deviation": best["deviation"]})
        seconds = statistics.median(whole[f"{name} recipe"])
        parts.append(f"""In {epochs} epochs, {seconds:.1f} s for the whole process: test accuracy
{_mean(studies[name]["test_accuracy"])} (n = {count}), test loss {studies[name]["test_loss"]["mean"]:.3f}.

```bash
dvc exp run {_command(overrides)}
```

It is the best of {len(chosen["screened"])} candidates by validation accuracy, {decided} (n = {len(best["seeds"])}).
""")
    return f"""## Short recipes

{parts[0]}
{parts[1]}
The test images had no part in the choice. `python -m bench.choose` repeats it in half an hour;
`bench/candidates.json` has all scores. Label smoothing lowers the confidence of the predictions: the test
loss of the short recipe is {studies["short"]["test_loss"]["mean"]:.3f}, that of the default recipe {default:.3f}.
Undo a recipe with `git restore . && dvc checkout -f`.
"""


def _tuning() -> str:
    measured = _read("tuning")
    two, one, plain, kept = measured["trials_an_hour"].values()
    studies = [
        ("**convtrack**, two workers", _spread(two, 0)),
        ("**convtrack**, one worker with two threads", _spread(one, 0)),
        ("a plain Optuna study around a `DataLoader`, as in Optuna's own example", _spread(plain, 0)),
    ]
    return f"""## Tuning

`make tune` took 29 minutes on MNIST: 50 trials, 28 of them pruned, then three finalists and the current values with
five seeds each. Its winner with the rest of the recipe as in `params.yaml` (`make seeds`), on test images that no trial
had seen:

{_table(("filters", "dropout", "parameters", "test accuracy", "n"), [_network("seeds"), _network("tuned")])}

The difference is {_difference()}

![Validation accuracy of the trials against their parameters](accuracy_against_size.png)

Speed: {measured["trials"]} trials of {measured["epochs"]} epochs, the same networks in all studies, which take turns
(`make bench-tuning`, half an hour).

{_table(("trials per hour", "median (min ... max)"), studies)}

{_bounds(measured)}

The plain study runs {kept[0]:.0f} trials per hour with glibc set to keep freed memory (one run). A second worker
gains little here, since the two threads of one worker keep both cores busy too: in earlier rounds it was between 0.98
and 1.09 times as fast.

{_origin(measured)}
"""


def _overhead() -> str:
    measured = _read("overhead")
    epochs = [overhead.Timed(**each) for each in measured["epochs"]]
    rows = []
    for name, way in (("live images", overhead.LIVE), ("a checkpoint", overhead.CHECKPOINT)):
        costs = overhead.costs(epochs, way)
        error = statistics.stdev(costs) / math.sqrt(len(costs))
        rows.append((f"{name} after each epoch", f"{statistics.fmean(costs):.2f} % ± {error:.2f}", str(len(costs))))
    return f"""## Overhead of live images and checkpoints

{_table(("", "share of an epoch: mean ± standard error", "n"), rows)}

`make overhead` measures both within one training, in five minutes: the time that the training waits, plus the processor
time of the thread that sends to MLflow. `train.live_images: false` switches the images off.

{_origin(measured)}
"""


def _pooling() -> str:
    measured = _read("pooling")
    places = [measured["shifts"].index(pixels) for pixels in (0, 2, 4)]
    rows = [
        (kind, f"{each['parameters']:,}", *(_percent(each["mean"][at], each["deviation"][at]) for at in places))
        for kind, each in measured["kinds"].items()
    ]
    return f"""## Pooling and shifted images

The same recipe with other kinds of pooling and none, {measured["seeds"]} seeds each (`make pooling`, half an hour):
percentage of the test images classified correctly after a shift to the right.

{_table(("", "parameters", "0 pixels", "2 pixels", "4 pixels"), rows)}

![Accuracy of four kinds of network after a shift](accuracy_after_shifts.png)

[What the CNN learned](what-the-cnn-learned.md) discusses this table.

{_origin(measured)}
"""


def _read(name: str) -> dict[str, Any]:
    """A file of figures. Raises UserError where they are those of other images, which the page would call MNIST's."""
    path = BENCH / f"{name}.json"
    content: dict[str, Any] = json.loads(path.read_text())
    if content.get("dataset", DATASET) != DATASET:
        raise UserError(
            f"{PAGE} is unchanged: {path} has figures of {content['dataset']}, and the page is about {DATASET}: copy "
            f"that file if you need it, then `git restore {path}`"
        )
    return content


def _table(head: Row, rows: Sequence[Row]) -> str:
    return "\n".join(
        f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")
        for cells in (head, ["---"] * len(head), *rows)
    )


def _bounds(measured: Mapping[str, Any]) -> str:
    rows = []
    for bound in measured["bounds"]:
        spread = f" ({min(bound['figures']):.2f} ... {max(bound['figures']):.2f})" if len(bound["figures"]) > 1 else ""
        must = f"{'at most' if bound['low'] else 'at least'} {bound['bound']:g}"
        missed = "" if bound["holds"] else ", **missed**"
        rows.append(
            (bound["what"], f"{bound['figure']:.2f} {bound['unit']}{spread}", must + missed, f"{bound['aim']:g}")
        )
    return _table(("what", "measured", "bound", "aim"), rows)


def _origin(measured: Mapping[str, Any]) -> str:
    machine = measured["machine"]
    return (
        f"*{machine['processor']} with {machine['cpu_capability']}, {machine['threads']} threads, "
        f"PyTorch {machine['torch']}; {measured['date']}, code of commit `{measured['code']}`.*"
    )


def _mean(figure: Mapping[str, float]) -> str:
    return f"{figure['mean']:.4f} ± {figure['deviation']:.4f}"


def _percent(mean: float, deviation: float) -> str:
    return f"{100 * mean:.2f} ± {100 * deviation:.2f}"


def _seconds(turns: Sequence[Mapping[str, Any]]) -> list[float]:
    return [second for turn in turns for second in turn["seconds"]]


def _spread(values: Sequence[float], digits: int = 2) -> str:
    median, least, most = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({least} ... {most})"


def _memory(turns: Sequence[Mapping[str, Any]]) -> str:
    return f"{max(turn['peak_mb'] for turn in turns) / 1000:.2f} GB"


def _network(name: str) -> Row:
    measured = _read(name)
    model = recipes.published().changed(recipes.from_words(measured["overrides"])).model
    parameters = parameter_count(Architecture((28, 28, 1), tuple("0123456789"), **model.model_dump()))
    accuracy = _mean(measured["summary"]["test_accuracy"])
    filters = ", ".join(map(str, model.filter_counts()))
    return filters, str(model.dropout), f"{parameters:,}", accuracy, str(len(measured["rows"]))


def _difference() -> str:
    default, tuned = ([row["test_accuracy"] for row in _read(name)["rows"]] for name in ("seeds", "tuned"))
    gained = statistics.fmean(tuned) - statistics.fmean(default)
    error = math.sqrt(statistics.variance(default) / len(default) + statistics.variance(tuned) / len(tuned))
    return f"{100 * gained:.2f} points, {gained / error:.1f} times its standard error."


def _command(overrides: Mapping[str, object]) -> str:
    words = [f"-S {word}" for word in recipes.as_words(overrides)]
    return " \\\n    ".join(" ".join(words[at : at + 3]) for at in range(0, len(words), 3))


if __name__ == "__main__":
    run_command(main)
