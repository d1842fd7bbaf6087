"""Options and progress bars that several commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from kvexport.progress import Progress

provider_option = click.option(
    "--provider",
    type=click.Choice(("auto", "cpu", "cuda", "tensorrt")),
    default="auto",
    show_default=True,
    help="Execution provider: cpu and cuda use ONNX Runtime, tensorrt uses an engine of the bundle; "
    "auto takes an engine that fits this machine, else CUDA, else the CPU.",
)
device_option = click.option(
    "--device",
    metavar="auto|cpu|cuda|cuda:N",
    default="auto",
    show_default=True,
    help="Device on which PyTorch computes: cpu, cuda (an NVIDIA GPU), or cuda:N for the GPU with index N; "
    "auto takes cuda if PyTorch can use it, else cpu.",
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    help="Number of CPU threads for one operator.  [default: one per core]",
)


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Progress]:
    """Show the progress of one command, or pass it on to the `Progress` that `main` was given."""
    from kvexport.cli.bars import BarProgress
    from kvexport.cli.report import PlainConsole

    context = click.get_current_context(silent=True)
    given = None if context is None else context.find_object(Progress)
    if given is not None:
        yield given
        return
    progress = BarProgress(PlainConsole(stderr=True), quiet)
    with progress.bars:
        yield progress
