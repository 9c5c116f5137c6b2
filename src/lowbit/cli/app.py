"""The command line: its subcommands, and how whatever goes wrong becomes one line and an exit status.

0 done · 1 an error, in one line on stderr · 2 a wrong option or a bar that was not met · 130 interrupted
"""

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated, NoReturn, TextIO

import typer

import lowbit
from lowbit.cli.compare import compare
from lowbit.cli.compress import compress
from lowbit.cli.diagnose import diagnose
from lowbit.cli.export import export
from lowbit.cli.formats import formats
from lowbit.cli.pack import pack, unpack
from lowbit.cli.process import collect_garbage_rarely, keep_freed_memory, leave
from lowbit.cli.quantize import quantize
from lowbit.cli.run import run
from lowbit.cli.search import search
from lowbit.cli.show import show
from lowbit.cli.train import train
from lowbit.errors import InputError, LowbitError

COMMANDS = (quantize, train, search, compare, diagnose, show, run, export, formats, compress, pack, unpack)
app = typer.Typer(
    name="lowbit",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
for command in COMMANDS:
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lowbit {lowbit.__version__}")
        raise typer.Exit


@app.callback(
    epilog="A first try:  lowbit quantize net.onnx --data samples.npz -o net.int8.onnx\n\n"
    "then:  lowbit compare net.onnx net.int8.onnx --data test.npz"
)
def lowbit_command(
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error arose; may stand anywhere in a command.")
    ] = False,
    modules: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            metavar="MODULE",
            help="A Python module, or a .py file, that adds formats of yours to lowbit.FORMATS; may stand anywhere.",
        ),
    ] = None,
) -> None:
    """Quantize a trained network to few bits, and prove on the deployed file that it still does its job."""


def run_process() -> NoReturn:
    """The process `lowbit`."""
    collect_garbage_rarely()
    keep_freed_memory()
    try:
        main()
    except SystemExit as end:
        leave(end.code if isinstance(end.code, int) else 0)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit, as SystemExit: for callers in the same process."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    wants_traceback = "--traceback" in given
    given = [word for word in given if word != "--traceback"]
    warnings.showwarning = _show_warning
    if not given or given in ([command.__name__] for command in COMMANDS if command is not formats):
        given.append("--help")  # `lowbit quantize` alone asks what it wants
    try:
        given = _import_modules(given)
        status = app(given, prog_name="lowbit", standalone_mode=False)
        sys.stdout.flush()
        if status == 130:  # typer's own word for Ctrl-C
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; nothing was written", 130, wants_traceback)
    except BrokenPipeError:  # the reader of our output (head, less) is gone: nothing to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (LowbitError, OSError) as error:
        _fail(f"error: {error}", 1, wants_traceback)
    except MemoryError:
        _fail("error: out of memory. Use a smaller --batch.", 1, wants_traceback)
    except Exception as error:
        if hasattr(error, "format_message"):  # a wrong option: click's exception, or that of the click inside typer
            context = getattr(error, "ctx", None)
            hint = f" Try 'lowbit {context.info_name} --help'." if context is not None and context.parent else ""
            _fail(f"error: {error.format_message()}{hint}", getattr(error, "exit_code", 2), wants_traceback)
        what = f"{type(error).__name__}: {error}"
        _fail(f"internal error: {what} (a bug in lowbit or its input; --traceback shows where)", 1, wants_traceback)
    sys.exit(status if isinstance(status, int) else 0)


def _import_modules(given: list[str]) -> list[str]:
    """The words of the command without `--import MODULE`, wherever it stands; the modules are imported."""
    rest: list[str] = []
    words = iter(given)
    for word in words:
        option, equals, name = word.partition("=")
        if option != "--import":
            rest.append(word)
            continue
        name = name if equals else next(words, "")
        if not name:
            raise InputError("--import needs the name of a module, or a .py file.")
        from lowbit.data.sources import imported_module

        imported_module(name)
    return rest


_show_elsewhere = warnings.showwarning
_OWN_FILES = str(Path(lowbit.__file__).parent)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: TextIO | None = None, line: str | None = None,
) -> None:  # fmt: skip
    """A warning of lowbit is one line for a person; where in the source it arose says nothing to them."""
    if not filename.startswith(_OWN_FILES):
        _show_elsewhere(message, category, filename, lineno, file, line)
        return
    print("lowbit: note: " + " ".join(str(message).split()), file=file or sys.stderr)


def _fail(message: str, status: int, wants_traceback: bool) -> NoReturn:
    if wants_traceback:
        traceback.print_exc()
    print("lowbit: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(status)
