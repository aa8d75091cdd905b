"""The verbs of `speechssm`. Each composes its config, loads what it names, and calls one function.

Exit status: 0 done, 1 the user can mend it (one line says what and how), 2 wrong usage. Heavy
imports happen inside the verbs, so that --help answers at once.
"""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from speechssm import __version__
from speechssm.errors import SpeechSSMError

VERBS = {
    "prepare": "audio shards of a corpus; `prepare sentencepiece` fits a text model",
    "train": "train one stage, or sweep (the same as python train.py)",
    "tokenize": "unit shards of audio shards, by a trained tokenizer",
    "encode": "code shards of audio shards, by a trained codec",
    "generate": "speech that continues a prompt, for as long as you like",
    "evaluate": "measures of a stage, against its trivial baseline",
    "bench": "speed and memory, against peers and limits",
    "report": "one page for a run folder or a sweep folder",
    "export": "weights for use elsewhere",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name); returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("--help", "-h", "help"):
        print(overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"speechssm {__version__}")
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        complain(f"no command {verb!r}; there are: {', '.join(VERBS)}")
        return 2
    return report_errors(lambda: run(verb, rest), debug)


def run(verb: str, words: list[str]) -> int:
    """Run a verb."""
    if verb == "train":
        return run_train(words)
    from speechssm import verbs

    if "--help" in words or "-h" in words:
        print(verbs.verb_help(verb))
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    config = verbs.verb_config(verb, words)
    if "--cfg" in words:
        return 0
    getattr(verbs, verb)(config)
    return 0


def run_train(words: list[str]) -> int:
    """Hand the words to Hydra; it calls `train` once, or the launcher for each job of a sweep."""
    import hydra

    from speechssm.configuration import conf_folder
    from speechssm.runtime.resolvers import register_resolvers
    from speechssm.runtime.sweep import check_sweep, register_launcher

    register_resolvers()
    register_launcher()
    check_sweep(words)

    started_with = sys.argv
    failures: list[BaseException] = []

    def task(cfg: Any) -> float | None:
        from speechssm.runtime.training import train

        # Lightning starts the other processes of a distributed run by this command line.
        sys.argv = started_with
        try:
            return train(cfg).get("val/loss")
        except BaseException as error:  # Hydra would print lines of its own about it
            failures.append(error)
            return None

    # Hydra prints its own errors unless it is told to raise them; ours are shorter.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = ["train.py", *words]
    try:
        hydra.main(str(conf_folder()), "train", version_base="1.3")(task)()
    finally:
        sys.argv = started_with
    if failures:
        raise failures[0]
    return 0


def report_errors(action: Callable[[], int], debug: bool) -> int:
    """Run `action`; an exception becomes one line on standard error and an exit status."""
    try:
        return action()
    except KeyboardInterrupt:
        complain("stopped")
        return 130
    except SystemExit as error:  # argparse inside of Hydra
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BrokenPipeError:  # `speechssm ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        return explain_exception(error)


def explain_exception(error: Exception) -> int:
    """Print the line of an exception; returns the exit status."""
    if not isinstance(error, SpeechSSMError):
        error = translate(error)
    if isinstance(error, SpeechSSMError):
        from speechssm.configuration import UsageError

        complain(" ".join(str(error).split()))
        return 2 if isinstance(error, UsageError) else 1
    message = " ".join(str(error).split())[:300]
    complain(f"{type(error).__name__}: {message} (this is a bug; --debug shows where)")
    return 1


def translate(error: Exception) -> Exception:
    """Exceptions of Hydra and OmegaConf, of a full disk and of missing rights, as ours."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from speechssm.configuration import explain

    if isinstance(error, HydraException | OmegaConfBaseException):
        return explain(error, "train", [word for word in sys.argv[1:] if "=" in word])
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{Path(str(error.filename))}: " if error.filename else ""
        return SpeechSSMError(f"{where}{error.strerror}")
    return error


def complain(message: str) -> None:
    """One line on standard error."""
    print(f"speechssm: error: {message}", file=sys.stderr)


def overview() -> str:
    """What `speechssm --help` prints."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {text}" for verb, text in VERBS.items()]
    return "\n".join(
        [
            "speechssm VERB [SUBJECT] [key=value ...]",
            "",
            *lines,
            "",
            "speechssm VERB --help   what a verb takes",
            "--version, --debug      version; the traceback of an error",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
