"""Where `conf/` lies, how a config is composed from it, and what its mistakes are in one line."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from speechssm.errors import ConfigError, SpeechSSMError

PACKAGE = Path(__file__).resolve().parent


class UsageError(SpeechSSMError):
    """The command line itself cannot be read; exit status 2."""


def conf_folder() -> Path:
    """The folder of configs: `conf/` of a checkout, or the copy that an installed wheel carries."""
    for folder in (PACKAGE.parent / "conf", PACKAGE / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(f"no conf/ beside {PACKAGE}: reinstall speechssm")


def project_folder(name: str) -> str:
    """Folder `name` of the checkout that this package runs from, else of the current folder."""
    checkout = PACKAGE.parent / name
    if (PACKAGE.parent / "conf" / "train.yaml").is_file() and checkout.is_dir():
        return str(checkout)
    return name


def group_options(group: str) -> list[str]:
    """Names of the YAMLs in `conf/GROUP`, for messages."""
    return sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))


def plain_keys(config_name: str) -> set[str]:
    """Top-level keys that `conf/NAME.yaml` itself defines (not through its defaults list)."""
    config = OmegaConf.load(conf_folder() / f"{config_name}.yaml")
    assert isinstance(config, DictConfig)
    return {str(key) for key in config} - {"defaults", "hydra"}


def compose(
    config_name: str, overrides: Sequence[str] = (), *, hydra_node: bool = False
) -> DictConfig:
    """Compose `conf/NAME.yaml` with overrides, as the command line does.

    Some verbs have plain keys that are called like a config group (`data=FOLDER`), where Hydra
    would look for a file of that group; and `format=html,markdown` is a list to them, not a sweep.
    Such keys are set after the composition.

    Args:
        config_name: a primary config, for example `train` or `evaluate`.
        overrides: Hydra overrides.
        hydra_node: keep Hydra's own node.

    Raises:
        ConfigError: an unknown key or value. UsageError: an override that cannot be read.
    """
    from speechssm.runtime.resolvers import register_resolvers

    register_resolvers()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            parsed = OverridesParser.create().parse_overrides(list(overrides))
            plain = plain_keys(config_name)
            groups = {path.name for path in conf_folder().iterdir() if path.is_dir()}
            late = [
                entry
                for entry in parsed
                if entry.key_or_group in plain
                and (entry.key_or_group in groups or entry.is_sweep_override())
                and not uses_group(config_name, entry)
            ]
            early = [entry.input_line for entry in parsed if entry not in late]
            config = hydra_compose(config_name, early, return_hydra_config=hydra_node)
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, config_name, overrides) from error
    for entry in late:
        with open_dict(config):
            config[entry.key_or_group] = late_value(entry)
    return config


def late_value(override: Any) -> Any:
    """Value of an override; `a,b` is a list."""
    if override.is_sweep_override():
        return [str(value) for value in override.sweep_iterator()]
    return override.value()


def check_types(config_name: str, config: dict[str, Any]) -> None:
    """Raises ConfigError where a value is not of the kind that `conf/NAME.yaml` has there.

    Keys without a default (null, ???) are names and folders, `seconds` excepted.
    """
    defaults = OmegaConf.to_container(OmegaConf.load(conf_folder() / f"{config_name}.yaml"))
    assert isinstance(defaults, dict)
    defaults["seconds"] = 1.0 if "seconds" in defaults else None

    def walk(default: Any, value: Any, key: str) -> None:
        if isinstance(default, dict) and isinstance(value, dict):
            for name in default.keys() & value.keys():
                walk(default[name], value[name], f"{key}.{name}" if key else str(name))
        for kind, accepted, words in (
            (bool, bool, "true or false"),
            (int, int, "a whole number"),
            (float, (int, float), "a number"),
            (list, list, "a list such as [16,1]"),
        ):
            if type(default) is kind:
                right = isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)
                if not right:
                    raise ConfigError(f"{key}={value} must be {words}")

    walk(defaults, config, "")


def uses_group(config_name: str, override: Any) -> bool:
    """Whether the primary config composes the group that an override names."""
    defaults = OmegaConf.load(conf_folder() / f"{config_name}.yaml").get("defaults", [])
    return any(
        isinstance(entry, DictConfig) and override.key_or_group in entry for entry in defaults
    )


def explain(error: BaseException, config_name: str, overrides: Sequence[str]) -> SpeechSSMError:
    """An exception of Hydra or OmegaConf as one line that names the mistake and the choices."""
    cause = root_cause(error)
    if isinstance(cause, SpeechSSMError):
        return cause
    if isinstance(cause, OverrideParseException):
        return UsageError(f"cannot read the override {cause.override!r}; write key=value")
    if isinstance(cause, MissingConfigException):
        return missing_config(cause, config_name)
    if isinstance(cause, MissingMandatoryValue):
        key = re.search(r"Missing mandatory value: (\S+)", str(cause))
        name = key.group(1) if key else getattr(cause, "full_key", "a key")
        return ConfigError(f"{name} is not set; add {name}=...")
    unknown = re.search(r"Could not (?:override|append|delete).*?'([^']+)'", str(error))
    if unknown and isinstance(error, ConfigCompositionException):
        return unknown_key(unknown.group(1).split("@")[0], config_name, overrides)
    if isinstance(error, InstantiationException):
        full_key = re.search(r"full_key: (\S+)", str(error))
        where = f"{full_key.group(1)}: " if full_key else ""
        return ConfigError(f"{where}{one_line(cause)}")
    return ConfigError(one_line(error))


def root_cause(error: BaseException) -> BaseException:
    """The first exception of a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def one_line(error: BaseException) -> str:
    """An exception's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def missing_config(error: MissingConfigException, config_name: str) -> ConfigError:
    """Unknown value of a group: `model=griffon`."""
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    options = sorted(error.options or group_options(group))
    if group == "recipe":
        stage, _, scale = name.rpartition("_")
        return ConfigError(
            f"no recipe for stage={stage} scale={scale}; there is: {', '.join(options) or 'none'}"
        )
    if not group:
        return ConfigError(f"no config {name!r} in {conf_folder()}")
    return ConfigError(
        f"{group}={name} is unknown{guess(name, options)}; choose one of: {', '.join(options)}"
    )


def unknown_key(key: str, config_name: str, overrides: Sequence[str]) -> ConfigError:
    """Unknown key or group: lists what stands beside it in the config without that override."""
    parent, _, name = key.rpartition(".")
    rest = [entry for entry in overrides if entry.lstrip("+~").split("=")[0].split("@")[0] != key]
    try:
        config = compose(config_name, rest)
        node = OmegaConf.select(config, parent) if parent else config
        options = sorted(str(entry) for entry in node) if isinstance(node, DictConfig) else []
    except SpeechSSMError:
        options = []
    where = f"in {parent}" if parent else "in the config"
    if not options:
        return ConfigError(f"{key} is unknown: this config has no {parent or 'such key'}")
    return ConfigError(
        f"{key} is unknown{guess(name, options)}; keys {where}: {', '.join(options)}"
    )


def guess(name: str, options: Sequence[str]) -> str:
    """` (did you mean X?)` when an option is spelt almost like the name."""
    close = difflib.get_close_matches(name, options, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def choose(key: str, value: Any, options: Sequence[str]) -> Any:
    """`value` if it is one of `options`, else a ConfigError that lists them."""
    if value not in options:
        raise ConfigError(
            f"{key}={value} is unknown{guess(str(value), options)}; choose one of: "
            f"{', '.join(options)}"
        )
    return value


def missing_value(verb: str, keys: Sequence[str]) -> SpeechSSMError:
    """Keys without a value: a wrong usage where it is the subject."""
    if "subject" in keys:
        return UsageError(f"say what to {verb}: speechssm {verb} SUBJECT ...; see --help")
    return ConfigError(f"{keys[0]} is not set; add {keys[0]}=...")
