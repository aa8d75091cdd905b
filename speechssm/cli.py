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
from speechssm.errors import ConfigError, SpeechSSMError

VERBS = {
    "prepare": "audio shards of a corpus; text models, k-means and other systems' tokenizers",
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
    # Read when torch is loaded. Waiting threads would otherwise spin, which on a machine that has
    # other work to do slows a small model's steps tenfold. Benches have the machine to themselves,
    # and there it is sleeping that slows the many small operations of peers, twofold.
    if words[:1] != ["bench"]:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
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
    if "--help" in words or "-h" in words:
        print(verb_help(verb))
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    if "--cfg" in words:
        import yaml

        words = [word for word in words if word not in ("--cfg", "job")]
        print(yaml.safe_dump(verb_config(verb, words), sort_keys=False), end="")
        return 0
    ACTIONS[verb](verb_config(verb, words))
    return 0


def run_train(words: list[str]) -> int:
    """Hand the words to Hydra; it calls `train` once, or the launcher for each job of a sweep."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from speechssm.configuration import conf_folder, explain
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
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, "train", [word for word in words if "=" in word]) from error
    finally:
        sys.argv = started_with
    if failures:
        raise failures[0]
    return 0


def verb_config(verb: str, words: Sequence[str]) -> dict[str, Any]:
    """Compose `conf/VERB.yaml` with the overrides; a word without `=` is the subject.

    Raises:
        ConfigError: an unknown key or value, or a key without value.
        UsageError: an unknown flag, or two subjects.
    """
    from omegaconf import OmegaConf

    from speechssm.configuration import UsageError, check_types, compose, missing_value, plain_keys
    from speechssm.loading import WEIGHTS_VARIABLE

    subjects = [word for word in words if "=" not in word and not word.startswith("~")]
    flags = [word for word in subjects if word.startswith("-")]
    if flags:
        raise UsageError(f"unknown flag {flags[0]}; see speechssm {verb} --help")
    if subjects and "subject" not in plain_keys(verb):
        raise UsageError(f"{verb} takes key=value words only, not {subjects[0]!r}")
    if len(subjects) > 1:
        raise UsageError(f"{verb} takes one subject, not {', '.join(subjects)}")
    overrides = [word for word in words if word not in subjects]
    config = compose(verb, [*overrides, *(f"subject={word}" for word in subjects)])
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise missing_value(verb, missing)
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    check_types(verb, resolved)
    os.environ[WEIGHTS_VARIABLE] = str(resolved.get("paths", {}).get("weights") or "")
    return {str(key): value for key, value in resolved.items()}


def verb_help(verb: str) -> str:
    """The comment at the head of `conf/VERB.yaml`, then its keys with their comments."""
    from speechssm.configuration import conf_folder, group_options

    lines = (conf_folder() / f"{verb}.yaml").read_text().splitlines()
    start = next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))
    head = [line.removeprefix("#").removeprefix(" ") for line in lines[:start]]
    keys, groups, in_defaults = [], [], False
    for line in lines[start:]:
        if line.startswith("defaults:"):
            in_defaults = True
        elif in_defaults and line.startswith("  - "):
            group = line.removeprefix("  - ").partition(":")[0]
            if group not in ("_self_", "paths"):
                groups.append(f"{group}=NAME, one of: {', '.join(group_options(group))}")
        elif line.strip():
            in_defaults = False
            keys.append(line.replace("???", "(must be given)"))
    return "\n".join(
        [*head, "", *groups, *([""] if groups else []), "Keys and their defaults:", *keys]
    )


def prepare(config: dict[str, Any]) -> None:
    from speechssm.configuration import choose

    subject = choose("subject", config.get("subject") or "corpus", tuple(PREPARATIONS))
    for key in ("vocab_size", "pool_size"):
        value = config[key]
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise ConfigError(f"{key}={value} must be a whole number")
    if subject in ("sentencepiece", "kmeans") and not config["data"]:
        raise ConfigError("data is not set; add data=FOLDER, the out of an earlier prepare")
    print(PREPARATIONS[subject](config))


def prepare_corpus(config: dict[str, Any]) -> str:
    from hydra.utils import instantiate

    from speechssm.data.prepare import prepare as write

    options = ("segment_seconds", "minimum_seconds", "sample_rate", "shard_megabytes", "workers")
    corpus = instantiate(config["corpus"])
    options = {key: config[key] for key in (*options, "progress")}
    return write(corpus, config["out"], **options).describe()


def prepare_sentencepiece(config: dict[str, Any]) -> Path:
    from speechssm.data.text import prepare_sentencepiece as fit

    return fit(
        config["data"],
        config["out"],
        vocab_size=64 if config["vocab_size"] is None else config["vocab_size"],
        model_type=config["model_type"],
    )


def prepare_kmeans(config: dict[str, Any]) -> Path:
    from hydra.utils import instantiate

    from speechssm.adaptation import prepare_kmeans as fit

    features = instantiate(config["features"])
    keys = ("seed", "pool_size", "passes", "max_hours", "device", "progress")
    options = {key: config[key] for key in keys}
    options["vocab_size"] = 500 if config["vocab_size"] is None else config["vocab_size"]
    return fit(features, config["data"], config["out"], **options)


def prepare_tokenizer(config: dict[str, Any]) -> Path:
    from hydra.utils import instantiate

    from speechssm.adaptation import prepare_tokenizer as write
    from speechssm.configuration import group_options

    if not config.get("adapter"):
        raise ConfigError(f"adapter is not set; add adapter={'|'.join(group_options('adapter'))}")
    return write(instantiate(config["adapter"]), config["out"])


PREPARATIONS: dict[str, Callable[[dict[str, Any]], object]] = {
    "corpus": prepare_corpus,
    "sentencepiece": prepare_sentencepiece,
    "kmeans": prepare_kmeans,
    "tokenizer": prepare_tokenizer,
}


def tokenize(config: dict[str, Any]) -> None:
    from functools import partial

    from speechssm.data.tokenize import tokenize_shards
    from speechssm.data.workers import plan_devices
    from speechssm.loading import load

    devices = plan_devices(config["device"], config["workers"])
    load_tokenizer = partial(load, "tokenizer", config["tokenizer"], windows=config["windows"])
    # With workers, which load their own, this one only says whose units they are.
    tokenizer = load_tokenizer(device=devices[0] if len(devices) == 1 else "cpu")
    options = {key: config[key] for key in ("index", "count", "threads", "progress")}
    options |= {"devices": devices, "load": load_tokenizer}
    tokenize_shards(config["data"], config["out"], tokenizer, **options)


def encode(config: dict[str, Any]) -> None:
    from speechssm.data.encode import encode_shards
    from speechssm.loading import load

    codec = load("soundstream", config["codec"], device=config["device"])
    keys = ("index", "count", "max_shards", "max_seconds", "max_document_seconds", "progress")
    options = {key: config[key] for key in keys}
    encode_shards(config["data"], config["units"], config["out"], codec, **options)


def generate(config: dict[str, Any]) -> None:
    from speechssm.audio.io import read_audio
    from speechssm.loading import load
    from speechssm.pipeline import generate_to_file

    options = dict(config)
    for key in ("paths", "windows", "device", "prompt", "voice", "out", "seconds", "seed"):
        options.pop(key, None)
    stages = {
        "tokenizer": "tokenizer",
        "lm": "lm",
        "soundstorm": "soundstorm",
        "codec": "soundstream",
    }
    for key in ("prompt", "voice"):
        if config.get(key) and Path(config[key]).resolve() == Path(config["out"]).resolve():
            raise ConfigError(f"out={config['out']} would overwrite the {key}; choose another out=")
    audio, rate = read_audio(config["prompt"]) if config.get("prompt") else (None, None)
    if config.get("voice"):
        options["voice"] = read_audio(config["voice"])
    for key, stage in stages.items():
        windows = config.get("windows") if stage == "tokenizer" else None
        options[key] = load(stage, config[key], device=config.get("device", "cpu"), windows=windows)
    if config.get("prompt"):
        options["prompt_name"] = str(config["prompt"])
    asked = (config["out"], audio, rate, config["seconds"], config["seed"])
    generate_to_file(*asked, **options)


def evaluate(config: dict[str, Any]) -> None:
    from speechssm.evaluation.command import evaluate as run_evaluation

    run_evaluation(config)
    print(f"{Path(config['out']) / 'metrics.json'}")


def bench(config: dict[str, Any]) -> None:
    from speechssm.benchmark.command import bench as run_bench

    run_bench(config)
    print(f"{Path(config['out']) / 'bench.json'}")


def report(config: dict[str, Any]) -> None:
    from speechssm.report.page import report as write

    for path in write(config).values():
        print(path)


def export(config: dict[str, Any]) -> None:
    from speechssm.loading import export as write

    keys = ("checkpoint", "format", "dtype", "data", "licence")
    print(write(config["model"], config["out"], **{key: config[key] for key in keys}))


ACTIONS: dict[str, Callable[[dict[str, Any]], None]] = {
    "prepare": prepare,
    "tokenize": tokenize,
    "encode": encode,
    "generate": generate,
    "evaluate": evaluate,
    "bench": bench,
    "report": report,
    "export": export,
}


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
    """A full disk, missing rights and the like as ours; what Hydra wraps, unwrapped."""
    if isinstance(error.__cause__, SpeechSSMError):  # raised by a class that a config names
        return error.__cause__
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
